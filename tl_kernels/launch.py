"""Compile a kernel for a target and call it on torch tensors.

A target is ``"cpu"`` or a CUDA architecture such as ``"sm_90a"``. Compiled programs land in TileLang's disk cache, so a second process
loads them in milliseconds, also when the first had no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch

from tl_kernels.scratch import Kept, scratch
from tl_kernels.spec import Config, Kernel, Problem

os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")

_LAUNCHERS: dict[Any, Launcher] = {}
_COMPILING: dict[Any, threading.Lock] = {}
_LOCK = threading.Lock()
# Tracing a program, and lowering one for CUDA, parses Python source. In Python 3.11 two threads that parse at once can fail ("AST
# constructor recursion depth mismatch"); to compile several at once take processes.
_PARSING = threading.Lock()

#: ``(kernel, problem, config, target)`` -> what takes the program's tensors, or None where it is to be compiled.
Ready = Callable[[Kernel, Problem, Config, str], Callable[..., Any] | None]
_ready: Ready | None = None


def look_first(ready: Ready) -> None:
    """Ask ``ready`` for every program from now on, and compile only what it has not."""
    global _ready
    _ready = ready


def device_arch(device: torch.device) -> str:
    """``"cpu"``, or the CUDA architecture of a device with its ``a`` suffix where the chip has one (Hopper and later)."""
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def multiprocessors(device: torch.device | None = None) -> int:
    """Of a CUDA device; None: the current one."""
    return torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device).multi_processor_count


def compile_kernel(kernel: Kernel, p: Problem, cfg: Config, target: str) -> Any:
    """The TileLang JITKernel of one configuration. Raises whatever TileLang, nvcc or g++ raise."""
    with _PARSING:
        func = kernel.build(p, cfg)
    # it advises, at every load, against loading the way this package does
    logging.getLogger("tilelang.cache.kernel_cache").setLevel(logging.ERROR)
    if target == "cpu":
        from tl_kernels.cpu import compile_cpu

        return compile_cpu(func)
    import tilelang

    with _PARSING:
        try:
            return tilelang.compile(func, target={"kind": "cuda", "arch": target}, pass_configs=kernel.pass_configs(cfg))
        finally:
            # lowering has system calls restarted after SIGINT: a wait without a limit, a data loader's say, would never see a Ctrl-C
            signal.siginterrupt(signal.SIGINT, True)
            _give_memory_back()


def _give_memory_back() -> None:
    """Lowering leaves gigabytes of freed memory with glibc, 2.5 after the largest program, more after many; it returns them when asked."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Launcher:
    """One compiled configuration: takes the kernel's inputs, allocates its results, runs, and sums two-stage results.

    The inputs must be contiguous, begin at a multiple of 16 bytes, be on the launcher's device type, and of the shapes and dtypes the
    kernel's spec names; callers check.
    """

    def __init__(self, kernel: Kernel, p: Problem, cfg: Config, target: str) -> None:
        self.kernel, self.p, self.cfg, self.target = kernel, p, dict(cfg), target
        if target != "cpu" and torch.cuda.is_available() and (why := kernel.crowded(p, cfg, multiprocessors())):
            raise ValueError(why)
        # bfloat16 is stored as float32 on the CPU target
        self._as_float = target == "cpu" and p.dtype == "bfloat16"
        ready = _ready(kernel, p, cfg, target) if _ready else None
        self._call = self._compiled() if ready is None else ready
        self._allocate = [self._plan(t) for t in kernel.outputs]
        self._partial = any(t.partial for t in kernel.outputs)
        self._sums = [i for i, t in enumerate(kernel.outputs) if t.partial or t.split]
        # where T stands: (input, dimension); a second stage has none and always runs
        self._T = next(((i, t.token_dim) for i, t in enumerate(kernel.inputs) if t.token_dim is not None), None)
        self._scratch = kernel.scratch(p, cfg) if kernel.scratch else 0
        self._kept: Kept = {}
        self._flat = [i for i, t in enumerate((*kernel.inputs, *kernel.outputs)) if t.flat]

    @functools.cached_property
    def jit(self) -> Any:
        """The TileLang JITKernel; compiled when asked for where the program was ready."""
        return compile_kernel(self.kernel, self.p, self.cfg, self.target)

    def _compiled(self):
        # the bare executable: JITKernel.__call__ costs 4 us more
        return self.jit if self.target == "cpu" else self.jit.adapter.get_exportable_executable()

    def _plan(self, tensor):
        splits = self.cfg["splits"] if tensor.partial or tensor.split else 1
        lead = (splits,) if tensor.partial else ()
        dtype = getattr(torch, tensor.dtype_name(self.p))
        stored = torch.float32 if self._as_float and dtype is torch.bfloat16 else dtype
        return tensor, lead, splits, stored, dtype

    def empty_outputs(self, T: int, device: torch.device) -> list[torch.Tensor]:
        """Result tensors as the program writes them: uninitialised, two-stage ones with their leading S."""
        return [
            torch.empty(lead + t.shape(self.p, T, splits), dtype=stored, device=device) for t, lead, splits, stored, _ in self._allocate
        ]

    def __call__(self, *inputs: torch.Tensor, out: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """Run on ``inputs`` in the spec's order. ``out``: the result of :meth:`empty_outputs`, e.g. poisoned by a test."""
        T = inputs[self._T[0]].shape[self._T[1]] if self._T else 1
        out = self.empty_outputs(T, inputs[0].device) if out is None else out
        if T > 0:
            if self._as_float:
                inputs = tuple(t.float() if t.dtype is torch.bfloat16 else t for t in inputs)
            args = [*inputs, *out]
            for i in self._flat:
                args[i] = args[i].view(T, -1)
            if self._scratch:
                args.append(scratch(self._kept, inputs[0].device, self._scratch))
            if self.target == "cpu" or inputs[0].device.index == torch.cuda.current_device():
                self._call(*args)
            else:
                with torch.cuda.device(inputs[0].device):
                    self._call(*args)
        else:
            for i in self._sums:
                out[i].zero_()
        return self.finish(out)

    def bind(self, T: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        """For many calls at one T: as calling the launcher, with all that T decides worked out once."""
        if T == 0 or self._as_float or self._partial or self.target == "cpu":
            return self
        layout = []
        for t, lead, splits, stored, _ in self._allocate:
            shape = lead + t.shape(self.p, T, splits)
            layout.append((shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), stored))
        call, flat, rows, row_stride, shared = self._call, self._flat, (T, self.p.K), (self.p.K, 1), self._scratch
        kept = self._kept
        # what Inductor's code allocates (on the current device) and views with: a third of the time of torch.empty and of view
        guards, current = torch._C._dynamo.guards, torch._C._cuda_getDevice
        empty, reinterpret = guards._empty_strided_cuda, guards._reinterpret_tensor

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if inputs[0].device.index != current():
                return self(*inputs)
            out = [empty(shape, stride, dtype) for shape, stride, dtype in layout]
            args = [*inputs, *out]
            for i in flat:
                args[i] = reinterpret(args[i], rows, row_stride, 0)
            if shared:
                args.append(scratch(kept, inputs[0].device, shared))
            call(*args)
            return tuple(out)

        return run

    def finish(self, out: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Second stage of two-stage results, and the rounding the CPU target owes."""
        if not self._partial and not self._as_float:
            return tuple(out)
        results = []
        for value, (tensor, *_, dtype) in zip(out, self._allocate, strict=True):
            results.append((value.sum(0) if tensor.partial else value).to(dtype))
        return tuple(results)


def _key(kernel: Kernel, p: Problem, cfg: Config, target: str) -> tuple[Any, ...]:
    return (kernel, p, tuple(sorted(cfg.items())), target)


def is_loaded(kernel: Kernel, p: Problem, cfg: Config, target: str) -> bool:
    """Whether :func:`get_launcher` has made the launcher of a configuration."""
    return _key(kernel, p, cfg, target) in _LAUNCHERS


def get_launcher(kernel: Kernel, p: Problem, cfg: Config, target: str) -> Launcher:
    """The process-wide launcher of a configuration, compiled at the first call only.

    Threads that ask for the same one wait for the first. Others compile beside it on the CPU target, after it for CUDA (``_PARSING``).
    """
    key = _key(kernel, p, cfg, target)
    launcher = _LAUNCHERS.get(key)
    if launcher is None:
        with _LOCK:
            lock = _COMPILING.setdefault(key, threading.Lock())
        with lock:
            launcher = _LAUNCHERS.get(key)
            if launcher is None:
                launcher = _LAUNCHERS[key] = Launcher(kernel, p, cfg, target)
    return launcher
