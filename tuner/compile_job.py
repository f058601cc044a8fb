"""One compile job: fills TileLang's disk cache, from which the measuring process loads the kernel in milliseconds."""

from __future__ import annotations

import re
import time
from typing import Any

from tl_kernels.spec import SHARED_LIMIT, Config, Kernel, Problem

#: Barriers and alignment that the merge of shared buffers may add to their plain sum.
SLACK_BYTES = 4096


def shared_limit(arch: str) -> int | None:
    """Bytes of dynamic shared memory one block may have, or None where unknown or meaningless (CPU)."""
    digits = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    kib = SHARED_LIMIT.get(int(digits[1])) if digits else None
    return None if kib is None else kib * 1024


def compile_job(name: str, p: Problem, cfg: Config, target: str) -> dict[str, Any]:
    """Compile one configuration. Returns ``{"seconds", "shared_bytes", "infeasible"}``; raises what TileLang and the compiler raise."""
    from tl_kernels import KERNELS
    from tl_kernels.launch import compile_kernel

    start = time.perf_counter()
    kernel, limit, shared = KERNELS[name], shared_limit(target), None
    if limit is not None:
        func = kernel.build(p, cfg)
        if _shared_bound(func, cfg) > limit:
            shared = lowered_shared_bytes(kernel, func, cfg, target)
            if shared > limit:
                return {"seconds": time.perf_counter() - start, "shared_bytes": shared, "infeasible": _too_much(shared, limit)}
    jit = compile_kernel(kernel, p, cfg, target)
    artifact = getattr(jit, "artifact", None)  # None on a cache hit
    if limit is not None and shared is None and artifact is not None:
        shared = _device_shared_bytes(artifact)
    reason: str | None = None
    if limit is not None and shared is not None and shared > limit:
        reason = _too_much(shared, limit)
    return {"seconds": time.perf_counter() - start, "shared_bytes": shared, "infeasible": reason}


def _too_much(shared: int, limit: int) -> str:
    return f"{shared} bytes of shared memory, a block has {limit}"


def _shared_bound(func: Any, cfg: Config) -> int:
    """An upper bound of the dynamic shared memory, in microseconds: allocated bytes times the deepest pipeline among the knobs."""
    from tvm import tirx

    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, tirx.SBlock):
            for buffer in node.alloc_buffers:
                if buffer.scope().startswith("shared"):
                    size = int(re.search(r"\d+", str(buffer.dtype))[0]) // 8  # type: ignore[index]
                    for extent in buffer.shape:
                        size *= int(extent)
                    total += size

    tirx.stmt_functor.post_order_visit(func.body, visit)
    stages = [v for k, v in cfg.items() if "stage" in k and isinstance(v, int)]
    return total * max([1, *stages]) + SLACK_BYTES if total else 0


def lowered_shared_bytes(kernel: Kernel, func: Any, cfg: Config, target: str) -> int:
    """Exact dynamic shared memory, from lowering without nvcc."""
    import tilelang
    from tilelang import tvm

    tl_target = tvm.target.Target({"kind": "cuda", "arch": target})
    with tvm.transform.PassContext(opt_level=3, config=dict(kernel.pass_configs(cfg))), tl_target:
        return _device_shared_bytes(tilelang.lower(func, target=tl_target))


def _device_shared_bytes(artifact: Any) -> int:
    total = 0
    for fn in artifact.device_mod.functions.values():
        total = max(total, int(fn.attrs.get("dyn_shared_memory_buf") or 0))
    return total
