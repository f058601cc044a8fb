"""One compile job: fills TileLang's disk cache, from which the measuring process loads the kernel in milliseconds.

It is also the first rungs of the ladder: a program that cannot launch, or spills so much that it cannot win, is told so here, as early as
it is known, and never reaches the device. Shared memory and threads are known from lowering, before nvcc, registers and spills after it.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tl_kernels.spec import SHARED_LIMIT, Config, Kernel, Problem
from tuner.cubin import Resources, blocks_per_sm, find_kernels

#: Threads a block may have, on every architecture.
MOST_THREADS = 1024
#: Stack, in bytes a thread, beyond which a program is not measured. Spilled registers are written and read again, as a rule once a tile,
#: through L1 and L2. A block of 256 threads with 256 bytes each moves 64 KiB out and 64 KiB back beside a tile of the streams of 32 to
#: 64 KiB, and a multiprocessor's path to L2 (64 bytes a cycle) has five times its share of the copy bandwidth (about 13 bytes a cycle on
#: an H100): 40% of the tile's time and more, in instructions that wait. The constraints of the specs leave few such programs; of 31
#: measured ones one had a stack, of 136 bytes, and took twice the best's time. A local array or registers spilled outside the loop may
#: still win, below the threshold the clock decides. Even outside the loop, while phi was loaded, 165 spills cost 20 us a launch (notes.md).
MOST_STACK = 256


class _WillNotRun(Exception):
    """Stops a compilation between lowering and nvcc."""

    def __init__(self, rung: str, reason: str, shared: int, threads: int | None) -> None:
        super().__init__(reason)
        self.rung, self.reason, self.shared, self.threads = rung, reason, shared, threads


def shared_limit(arch: str) -> int | None:
    """Bytes of dynamic shared memory one block may have, or None where unknown or meaningless (CPU)."""
    digits = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    kib = SHARED_LIMIT.get(int(digits[1])) if digits else None
    return None if kib is None else kib * 1024


def compile_job(name: str, p: Problem, cfg: Config, target: str) -> dict[str, Any]:
    """Compile one configuration; raises what TileLang and the compiler raise.

    Returns ``seconds``, ``shared_bytes``, ``threads`` (a block), ``registers`` and ``stack`` (bytes) a thread, each None where unknown (the
    CPU target; after nvcc was not asked), ``infeasible``: why it need not be measured, or None, and its ``rung``: ``"shared"``,
    ``"launch"`` or ``"spills"``. The default is never refused for its spills: everything is compared with it.
    """
    from tl_kernels import KERNELS
    from tl_kernels.launch import compile_kernel

    start = time.perf_counter()
    kernel = KERNELS[name]
    found: dict[str, Any] = dict.fromkeys(("shared_bytes", "threads", "registers", "stack", "infeasible", "rung"))
    if target == "cpu":
        compile_kernel(kernel, p, cfg, target)
        return {"seconds": time.perf_counter() - start, **found}
    try:
        with _before_nvcc(target) as lowered:
            jit = compile_kernel(kernel, p, cfg, target)
    except _WillNotRun as e:
        found |= {"shared_bytes": e.shared, "threads": e.threads, "infeasible": e.reason, "rung": e.rung}
        return {"seconds": time.perf_counter() - start, **found}
    folder = getattr(jit, "_tilelang_cache_path", None)  # None where TileLang's cache is switched off
    shared, threads = lowered[-1] if lowered else (cached_shared_bytes(Path(folder)) if folder else None, None)
    image = worst_kernel(Path(folder)) if folder else None
    if image is not None:
        shared = None if shared is None else shared + image.static_shared
        threads = threads or image.threads
        found |= {"registers": image.registers, "stack": image.stack}
    found |= {"shared_bytes": shared, "threads": threads}
    refused = refuse(target, shared, threads, found["registers"], None if dict(cfg) == kernel.default(p) else found["stack"])
    if refused is not None:
        found["rung"], found["infeasible"] = refused
    return {"seconds": time.perf_counter() - start, **found}


def refuse(arch: str, shared: int | None, threads: int | None, registers: int | None, stack: int | None) -> tuple[str, str] | None:
    """The rung at which a program falls and why, or None; what is None is not looked at. ``shared`` and ``stack`` in bytes."""
    limit = shared_limit(arch)
    if limit is not None and shared is not None and shared > limit:
        return "shared", f"{shared} bytes of shared memory, a block has {limit}"
    if threads is not None and threads > MOST_THREADS:
        return "launch", f"{threads} threads, a block has {MOST_THREADS}"
    if registers is not None and threads and blocks_per_sm(arch, registers, threads, 0) == 0:
        return "launch", f"{threads} threads of {registers} registers do not fit on a multiprocessor"
    if stack is not None and stack > MOST_STACK:
        return "spills", f"{stack} bytes of stack a thread, more than {MOST_STACK} cannot win"
    return None


@contextlib.contextmanager
def _before_nvcc(arch: str) -> Iterator[list[tuple[int, int | None]]]:
    """Within, a lowered program that cannot launch raises :class:`_WillNotRun` instead of going on to nvcc.

    Gives a list that gets (dynamic shared bytes, threads) of what was lowered; it stays empty on a cache hit. TileLang has no hook there
    that sees the module, so the function after it is wrapped: internal to the release that pyproject.toml pins, as is tl_kernels/cpu.py.
    """
    lower: Any = importlib.import_module("tilelang.engine.lower")  # `from tilelang.engine import lower` is the function
    original, lowered = lower.device_codegen, []

    def checked(device_mod: Any, context: Any) -> Any:
        shared, threads = _device_shared(device_mod), _device_threads(device_mod)
        refused = refuse(arch, shared, threads, None, None)
        if refused is not None:
            raise _WillNotRun(*refused, shared, threads)
        lowered.append((shared, threads))
        return original(device_mod, context)

    lower.device_codegen = checked
    try:
        yield lowered
    finally:
        lower.device_codegen = original


def worst_kernel(folder: Path) -> Resources | None:
    """Of the program in a folder of TileLang's cache, the kernel with most registers, then most stack; None where it holds no image."""
    found = find_kernels((folder / "executable.so").read_bytes())
    return max(found, key=lambda r: (r.registers, r.stack)) if found else None


def cached_shared_bytes(folder: Path) -> int | None:
    """Dynamic shared memory in bytes of the program in a folder of TileLang's cache, from what its host code launches with; None where
    that is not to be found.
    """
    if "extern __shared__" not in (folder / "device_kernel.cu").read_text():
        return 0
    host = (folder / "host_kernel.cu").read_text()
    # before each launch its arguments: the program's own, the grid, the threads, and last the dynamic shared memory
    launches = re.findall(
        r"\.v_int64\) = \(\(int64_t\)(\d+)\);(?:(?!\(\(int64_t\)).)*?if \(\w+_kernel\w*_packed == NULL\)", host, re.DOTALL
    )
    return max(map(int, launches)) if launches else None


def lowered(kernel: Kernel, func: Any, cfg: Config, target: str) -> Any:
    """TileLang's artifact of a program, source and functions as they are compiled, without nvcc."""
    import tilelang
    from tilelang import tvm

    tl_target = tvm.target.Target({"kind": "cuda", "arch": target})
    with tvm.transform.PassContext(opt_level=3, config=dict(kernel.pass_configs(cfg))), tl_target:
        return tilelang.lower(func, target=tl_target)


def lowered_shared_bytes(kernel: Kernel, func: Any, cfg: Config, target: str) -> int:
    """Exact dynamic shared memory, from lowering without nvcc."""
    return _device_shared(lowered(kernel, func, cfg, target).device_mod)


def _device_shared(device_mod: Any) -> int:
    return max((int(fn.attrs.get("dyn_shared_memory_buf") or 0) for fn in device_mod.functions.values()), default=0)


def _device_threads(device_mod: Any) -> int | None:
    """Threads a block, of the function with most; None where an extent is no constant."""
    most: int | None = None
    for fn in device_mod.functions.values():
        threads = 1
        for tag, extent in (fn.attrs.get("thread_extent") or {}).items():
            if str(tag).startswith("threadIdx"):
                try:
                    threads *= int(extent)
                except TypeError:
                    return None
        most = max(threads, most or 0)
    return most
