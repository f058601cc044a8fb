"""Which implementation serves an operator: the TileLang program or the PyTorch reference.

``MHC_BACKEND`` sets it for the process and :func:`use_backend` for a block of code:

- ``auto`` (default): TileLang on CUDA; on the CPU TileLang where the profile has an entry that serves and does not say that the reference
  is faster, and a bundle has the program or a C++ compiler is installed; else the reference.
- ``tilelang``: TileLang always; an error where it cannot run.
- ``reference``: the PyTorch reference always.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mhc import bundle
from tl_kernels import reference
from tl_kernels.spec import Config, Kernel, Problem

logger = logging.getLogger("mhc")

BACKENDS = ("auto", "tilelang", "reference")


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    return name


_current = _validated(os.environ.get("MHC_BACKEND", "auto"), "MHC_BACKEND")


def current() -> str:
    """The backend asked for: ``auto``, ``tilelang`` or ``reference``."""
    return _current


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend (``auto``, ``tilelang``, ``reference``) inside a ``with`` block, backward passes that run in it included.

    Holds for the whole process, not for one thread: autograd runs backwards in threads of its own. Raises ValueError.
    """
    global _current
    before, _current = _current, _validated(name, "use_backend")
    try:
        yield
    finally:
        _current = before


@functools.cache
def _cpu_target() -> bool:
    """Whether TileLang compiles for the CPU here; says once why not."""
    try:
        from tl_kernels.cpu import available
    except ImportError as error:
        logger.warning("TileLang cannot be imported (%s): the PyTorch reference serves on the CPU", error)
        return False
    if not available():
        what = "what the bundle has not" if _has_cpu_bundle() else "what the profile has for the CPU"
        logger.warning("no C++ compiler on PATH: the PyTorch reference serves %s; install g++ for the TileLang kernels", what)
        return False
    return True


def _has_cpu_bundle() -> bool:
    found = bundle.loaded()
    return found is not None and found.manifest.arch == "cpu"


def _runs_on_cpu(kernel: Kernel, p: Problem, cfg: Config) -> bool:
    """Whether a program of the CPU target is there or can be compiled."""
    found = bundle.loaded()
    if found is None:
        return _cpu_target()
    # what is compiled instead is said by who compiles it
    return found.holds(kernel, p, cfg, "cpu") or _cpu_target() or found.find(kernel, p, cfg, "cpu", "PyTorch serves") is not None


def serves_tilelang(mode: str, device: torch.device) -> bool:
    """Whether TileLang is the candidate for ``device`` under backend ``mode``."""
    return mode == "tilelang" or (mode == "auto" and (device.type == "cuda" or _has_cpu_bundle() or _cpu_target()))


def program_serves(mode: str, device: torch.device, kernel: Kernel, p: Problem, impl: str, cfg: Config) -> bool:
    """Whether the program of a profile's choice (``impl``, ``cfg``) serves where :func:`serves_tilelang`, or PyTorch."""
    return mode == "tilelang" or device.type != "cpu" or (impl == "tilelang" and _runs_on_cpu(kernel, p, cfg))


def _vjp(name: str, grads: int) -> Callable[..., Any]:
    return lambda *args, **options: reference.vjp(getattr(reference, name), args[grads:], args[:grads], **options)


#: Where the answer of ``name`` is not the function of that name in the reference.
_REFERENCE: dict[str, Callable[..., Any]] = {
    "activate_bwd": _vjp("activate", 3),
    "sinkhorn_bwd": _vjp("sinkhorn", 1),
    "pre_bwd": _vjp("pre", 1),
    "post_res_bwd": _vjp("post_res", 1),
}


@contextmanager
def _autograd_reachable() -> Iterator[None]:
    # an operator's implementation runs below autograd; the reference's backwards differentiate their forward, so they need it back
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)):
        yield


def run_reference(
    name: str, args: tuple[torch.Tensor, ...], options: dict[str, Any], dtypes: list[torch.dtype]
) -> tuple[torch.Tensor, ...]:
    """The reference at float32, whatever the streams are; each result rounded once, to its entry of ``dtypes``."""
    device = args[0].device.type
    function = _REFERENCE.get(name) or getattr(reference, name)
    if name.startswith("post_res_project"):  # these project y as it is stored
        function = functools.partial(function, dtype=dtypes[0])
    with _autograd_reachable(), torch.autocast(device, enabled=False):
        out = function(*(t.detach().float() for t in args), **options)
    out = out if isinstance(out, tuple) else (out,)
    return tuple(t.detach().to(dtype).contiguous() for t, dtype in zip(out, dtypes, strict=True))
