"""What every test shares: the gpu marker, devices, poisoned memory and a comparison that names the tensor."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import signal
import threading

os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")

import pytest
import torch

# What is tuned on this machine is not under test, and would be compiled test by test. A GPU's profile is: it ships.
if not torch.cuda.is_available():
    os.environ.setdefault("MHC_PROFILE", "none")
    # PyTorch would serve, for nothing was tuned; the programs are under test
    if shutil.which("g++") or shutil.which("c++"):
        os.environ.setdefault("MHC_BACKEND", "tilelang")

# TileLang makes and drops a prover of 100 kB at every turn. Memory that glibc gives back each time is cleared anew: a sixth of a compile
# for the CPU target. What a process may keep, here and in children: blocks, by the number of mallopt.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": (-1, 1 << 29), "MALLOC_TOP_PAD_": (-2, 1 << 26), "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 25)}
for name, (parameter, size) in KEPT_MEMORY.items():
    os.environ.setdefault(name, str(size))
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(parameter, size)

# A shell's background job inherits an ignored SIGINT, and would pass it on to whatever a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the plugin of an installed package is there already, and is not loaded twice; a source tree's is not
pytest_plugins = ["pytester", "tuner.pytest_plugin"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What has been imported stays: a benchmark collects garbage before every measurement, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Numbers that a test and its own fixtures draw from torch's generator do not depend on what ran before: xdist's order varies."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; the test is skipped on the one that is not here."""
    return torch.device(request.param)


def here(fake, real):
    """``fake`` for the thread that asks now, ``real`` for others: programs that later tests need may be compiled meanwhile."""
    thread = threading.get_ident()
    return lambda *args: (fake if threading.get_ident() == thread else real)(*args)


def python_path(*folders: object) -> str:
    """``PYTHONPATH`` for a child: these folders before what is on it already (on a GPU machine, packages that have no other place)."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill with what no kernel should leave behind: NaN, or the largest integer. Returns ``t``."""
    return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``, in float64; absolute where ``expected`` is zero."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm or 1.0)


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Fail, naming the tensor, where the relative Frobenius error exceeds ``rtol``, shapes differ or anything is NaN or infinite."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    for which, t in (("actual", actual), ("expected", expected)):
        bad = t.numel() - int(torch.isfinite(t).sum())
        assert not bad, f"{name}: {bad} of {t.numel()} {which} values are NaN or infinite"
    error = relative_error(actual, expected)
    assert error <= rtol, f"{name}: relative error {error:.3e}, wanted at most {rtol:.1e}"
