"""warm_up: afterwards nothing of a step is compiled; what was compiled is not compiled again; what goes wrong is said."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import mhc
from mhc import bundle
from tests.conftest import here
from tests.mhc.bundled import ROOT
from tl_kernels import KERNELS, launch, precompile
from tl_kernels.cpu import available

C, N, T = 64, 4, 5
needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler")
#: A program that g++ has in a second.
PRE = (KERNELS["pre"], KERNELS["pre"].problem(N, C), KERNELS["pre"].default(KERNELS["pre"].problem(N, C)), "cpu")


class Model(nn.Module):
    """Every way to run a connection, and a head."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.connections = nn.ModuleList(mhc.HyperConnection(C, N, **options) for _ in range(2))
        self.head = mhc.HyperHead(C, N)

    def forward(self, h):
        return self.head(mhc.chain(mhc.expand(h, N), [(hc, torch.tanh) for hc in self.connections]))


def step(model, device="cpu"):
    h = torch.randn(T, C, device=device, dtype=torch.bfloat16, requires_grad=True)
    model(h).float().square().sum().backward()


@pytest.fixture
def launchers(monkeypatch):
    """No program loaded yet."""
    found = {}
    monkeypatch.setattr(launch, "_LAUNCHERS", found)
    return found


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(kernel, *rest):
        raise AssertionError(f"{kernel.name} is compiled")

    return lambda: monkeypatch.setattr(launch, "compile_kernel", here(refuse, launch.compile_kernel))


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"residual_mixing": False}], ids=str)
def test_afterwards_a_step_compiles_nothing(options, launchers, nothing_compiles):
    model = Model(**options)
    with mhc.use_backend("tilelang"):
        assert mhc.warm_up(model, tokens=T) == len(launchers) >= 10
        nothing_compiles()
        step(model)
        assert mhc.warm_up(model, tokens=T) == 0


@pytest.mark.gpu
def test_afterwards_a_step_on_a_gpu_compiles_nothing(launchers, nothing_compiles):
    model = Model().cuda()
    assert mhc.warm_up(model, tokens=T) > 0
    nothing_compiles()
    step(model, "cuda")
    torch.cuda.synchronize()


def test_without_gradients_and_where_pytorch_serves_less_is_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(warm_up_module(), "_make_ready", lambda programs, jobs: seen.append([kernel.name for kernel, *_ in programs]))
    connection = mhc.HyperConnection(C, N)
    with mhc.use_backend("tilelang"):
        mhc.warm_up(connection, T, backward=False)
        mhc.warm_up(connection, [T, 8192, 2 * T])  # one program serves many token counts
    with mhc.use_backend("reference"):
        mhc.warm_up(connection, T)
    assert set(seen[0]) == {"project_parts", "coefficients", "pre", "post_res_project", "post_res"}
    backward = {"pre_grad", "coefficients_bwd", "streams_grad", "sum_parts", "post_res_grads"}
    assert sorted(seen[1]) == sorted({*seen[0], *backward})
    assert seen[2] == []


def warm_up_module():
    return sys.modules["mhc.warm_up"]


OTHER = (*PRE[:2], {**PRE[2], "threads": 64}, PRE[3])


def told(*programs):
    return [precompile.told(*program) for program in programs]


@needs_compiler
def test_each_program_is_compiled_once_however_many_processes_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    assert precompile.is_writable()
    release = bundle.tilelang_release()
    counted = tmp_path / "g++"
    counted.write_text(f'#!/bin/sh\necho >> {tmp_path}/runs\nexec {shutil.which("g++") or shutil.which("c++")} "$@"\n')
    counted.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "tl_kernels.precompile", release, *told(PRE, OTHER)]
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert len((tmp_path / "runs").read_text()) == 2
    assert precompile.is_compiled(precompile.mark(release, *PRE))
    assert precompile.is_compiled(precompile.mark(release, *OTHER))
    assert not precompile.is_compiled(precompile.mark("0.0.1", *PRE))
    monkeypatch.setattr(precompile, "_compile", pytest.fail)
    precompile.main(release, *told(PRE, OTHER))
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    warm_up_module()._compile([PRE, OTHER], jobs=2)
    shutil.rmtree(tmp_path / "cache" / release)  # and the marks stay
    assert not precompile.is_compiled(precompile.mark(release, *PRE))


def test_locks_that_somebody_else_owns_are_no_reason_to_stop(tmp_path, monkeypatch):
    """As where a folder of locks cannot be written: compiled all the same."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "nowhere"))
    tried = []
    monkeypatch.setattr(precompile, "_compile", lambda kernel, p, cfg, target: tried.append(cfg) or str(tmp_path))
    precompile.main("1", *told(PRE))
    assert tried[0] == PRE[2]


def test_what_somebody_else_compiles_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    order = []
    assert precompile.is_writable()
    left = precompile.mark("1", *PRE)
    with precompile._locked(left.with_suffix(".lock"), True):
        monkeypatch.setattr(precompile, "_compile", lambda kernel, p, cfg, target: order.append(cfg) or str(tmp_path))
        waits = threading.Thread(target=precompile.main, args=("1", *told(PRE, OTHER)))
        waits.start()
        while not order:
            time.sleep(0.01)
        waits.join(0.2)
        assert waits.is_alive()
        left.write_text(str(tmp_path))
    waits.join(10)
    assert not waits.is_alive()
    assert order == [OTHER[2]]


def test_a_program_that_cannot_be_compiled_says_so(monkeypatch, launchers, tmp_path):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))

    def broken(kernel, *rest):
        raise RuntimeError(f"{kernel.name}: no such flag")

    monkeypatch.setattr(precompile, "_compile", broken)
    with mhc.use_backend("tilelang"), pytest.raises(RuntimeError, match=r"^\w+: no such flag$"):
        mhc.warm_up(mhc.HyperConnection(C, N), T, jobs=1)


def test_ctrl_c_ends_what_compiles(monkeypatch, tmp_path):
    """The processes are gone when the interrupt arrives."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    popen, children = subprocess.Popen, []

    def slow(command, **how):
        children.append(popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", slow)
    monkeypatch.setattr(precompile, "_compile", lambda *program: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        warm_up_module()._compile([PRE, OTHER], jobs=2)
    (child,) = children
    assert child.poll() is not None


def test_ranks_share_the_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for ranks, programs, jobs in (("", 20, 12), ("8", 20, 2), ("many", 20, 12), ("0", 20, 12), ("100", 20, 1), ("", 5, 5), ("4", 5, 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert warm_up_module()._share(programs) == jobs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", T), TypeError, "module: got str, wanted a torch.nn.Module"),
        ((nn.Linear(2, 2), T), ValueError, "module: got Linear without an mhc.HyperConnection or mhc.HyperHead in it"),
        ((mhc.HyperConnection(C, device="meta"), T), ValueError, "module: got a HyperConnection with parameters on meta, wanted them"),
        ((mhc.HyperConnection(C), 0), ValueError, "tokens: got 0, wanted at least 1"),
        ((mhc.HyperConnection(C), []), ValueError, r"tokens: got \[\], wanted at least 1"),
        ((mhc.HyperConnection(C), torch.tensor(5)), TypeError, r"tokens: got tensor\(5\), wanted a whole number of tokens"),
        ((mhc.HyperConnection(C), 2.5), TypeError, r"tokens: got 2\.5, wanted a whole number of tokens"),
        ((mhc.HyperConnection(C), T, torch.int8), TypeError, r"dtype: got torch\.int8, wanted torch\.bfloat16 or"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        mhc.warm_up(*arguments)


@pytest.mark.parametrize("jobs", [0, 1.5])
def test_bad_jobs(jobs):
    with pytest.raises(ValueError, match=f"jobs: got {jobs}, wanted a whole number, at least 1"):
        mhc.warm_up(mhc.HyperConnection(C), T, jobs=jobs)


def test_where_no_mark_can_be_left_no_other_process_is_started(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    warm_up_module()._compile([PRE, OTHER], jobs=2)


@needs_compiler
def test_what_was_done_is_logged(launchers, caplog):
    with mhc.use_backend("tilelang"), caplog.at_level(logging.INFO, logger="mhc"):
        count = mhc.warm_up(mhc.HyperConnection(C, N), T, backward=False)
    assert f"{count} programs compiled or loaded in " in caplog.text


def test_parameters_that_are_made_of_others_are_looked_through():
    connection = mhc.HyperConnection(C, N)
    for name in ("fn", "base", "scale"):
        nn.utils.parametrize.register_parametrization(connection, name, nn.Identity())
    with mhc.use_backend("reference"):
        assert mhc.warm_up(connection, T) == 0


def test_options_of_numpy_are_numbers(monkeypatch):
    connection = mhc.HyperConnection(C, N, sinkhorn_iters=np.int64(3), norm_eps=np.float32(1e-6))
    monkeypatch.setattr(warm_up_module(), "_make_ready", lambda programs, jobs: len(told(*programs)))
    with mhc.use_backend("tilelang"):
        assert mhc.warm_up(connection, T) > 0
