"""The last rung before the device: a configuration whose bytes alone take longer than the best one already does."""

from __future__ import annotations

from tl_kernels.spec import Config, Kernel, Problem

#: Bytes of a call that may still be in L2, not in memory, when its clock stops. What was written last stays there, so calls reach 101 to
#: 107% of copy bandwidth. Of 915 configurations timed on an H100 (results/h100/tune*.json, 50 MB of L2) none saved more than 8.9 MB
#: against the copy bandwidth of its run; this is about twice that.
KEPT_BYTES = 16 << 20
#: Share by which a call may be faster than copy bandwidth beyond that, for the noise of both measurements; the fastest of the 915, less
#: KEPT_BYTES, reached 98% of it.
MARGIN = 0.02


def bytes_of(kernel: Kernel, p: Problem, T: int, cfg: Config) -> int:
    """Bytes this configuration must move: the kernel's floor, and results in splits once per split instead of once.

    That a second stage reads the splits again is not counted: they may come from L2.
    """
    splits = cfg.get("splits", 1)
    return kernel.bytes_moved(p, T) + sum((splits - 1) * t.nbytes(p, T) for t in kernel.outputs if t.partial or t.split)


def least_us(kernel: Kernel, p: Problem, T: int, cfg: Config, copy_gbps: float, kept_bytes: int = KEPT_BYTES) -> float:
    """A lower bound of the time in microseconds on a GPU that copies at ``copy_gbps``; 0 for what fits in ``kept_bytes``."""
    return max(0, bytes_of(kernel, p, T, cfg) - kept_bytes) / (copy_gbps * (1 + MARGIN)) / 1e3


def hopeless(
    kernel: Kernel, p: Problem, T: int, cfg: Config, copy_gbps: float, best_us: float | None, kept_bytes: int = KEPT_BYTES
) -> str | None:
    """Why this configuration cannot beat ``best_us`` (the best measured so far), or None where it may; never for the default.

    For GPUs: on a CPU the caches may hold everything. The bound is :func:`least_us`, which errs on the side of measuring: every
    configuration measured so far took at least 3% longer.
    """
    if best_us is None or copy_gbps <= 0 or dict(cfg) == kernel.default(p):
        return None
    least = least_us(kernel, p, T, cfg, copy_gbps, kept_bytes)
    if least <= best_us:
        return None
    moved = bytes_of(kernel, p, T, cfg) / 1e6
    return f"{moved:.1f} MB to move take at least {least:.1f} us at {copy_gbps:.0f} GB/s, the best so far takes {best_us:.1f} us"
