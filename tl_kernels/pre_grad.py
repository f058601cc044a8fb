"""Gradient of the layer input but dx: dH_pre[j] = <x[j], du>. ``pre_bwd`` without its part of dx, which another pass adds up and writes."""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.lanes import lanes_default, lanes_invalid, lanes_of, lanes_space, min_blocks, own_layout, row_layout, rows_layout
from tl_kernels.mma import ACC
from tl_kernels.sizes import ceildiv
from tl_kernels.spec import Kernel, Tensor


def build(p, cfg):
    n, C, dtype = p.n, p.C, p.dtype
    bt, lanes, reps, width = lanes_of(p, cfg)
    bc, blocks = cfg["block_C"], ceildiv(p.C, cfg["block_C"])
    resident, reverse = min_blocks(cfg), cfg["reverse"]
    row = T.vectorized if n in (2, 4, 8) else T.unroll
    T_ = T.dynamic("T")

    @T.prim_func
    def pre_grad(du: T.Tensor((T_, C), dtype), x: T.Tensor((T_, n, C), dtype), dH_pre: T.Tensor((T_, n), ACC)):
        with T.Kernel(T.ceildiv(T_, bt), threads=cfg["threads"]) as block:
            if resident:
                T.annotate_min_blocks_per_sm(resident)
            t0 = (T.ceildiv(T_, bt) - 1 - block if reverse else block) * bt
            x_nC = T.alloc_fragment((n, bt, reps, lanes, width), dtype)
            du_C = T.alloc_fragment((bt, reps, lanes, width), dtype)
            part = T.alloc_fragment((bt, n, lanes), ACC)
            total = T.alloc_fragment((bt, n), ACC)
            T.annotate_layout(
                {x_nC: rows_layout(n, bt, lanes, reps, width), du_C: row_layout(bt, lanes, reps, width), part: own_layout(bt, n, lanes)}
            )
            T.clear(part)
            for b in T.serial(blocks):
                for j in T.unroll(n):
                    for t, r, lane, k in T.Parallel(bt, reps, lanes, width):
                        c = b * bc + (r * lanes + lane) * width + k
                        x_nC[j, t, r, lane, k] = T.if_then_else(t0 + t < T_ and c < C, x[t0 + t, j, c], T.cast(0, dtype))
                for t, r, lane, k in T.Parallel(bt, reps, lanes, width):
                    c = b * bc + (r * lanes + lane) * width + k
                    du_C[t, r, lane, k] = T.if_then_else(t0 + t < T_ and c < C, du[t0 + t, c], T.cast(0, dtype))
                # dH_pre[j] = <x[j], du>
                for r in T.unroll(reps):
                    for k in T.unroll(width):
                        for j in T.unroll(n):
                            for t, lane in T.Parallel(bt, lanes):
                                part[t, j, lane] += T.cast(x_nC[j, t, r, lane, k], ACC) * T.cast(du_C[t, r, lane, k], ACC)
            T.reduce_sum(part, total, dim=2, batch=n if lanes > 32 else 1)
            for t in T.Parallel(bt):
                for j in row(n):
                    if t0 + t < T_:
                        dH_pre[t0 + t, j] = total[t, j]

    return pre_grad


def _held(p):
    """Rows and sums a token: x and du; dH_pre."""
    return {"streams": p.n + 1, "sums": p.n}


pre_grad = Kernel(
    name="pre_grad",
    build=build,
    inputs=(Tensor("du", "T C", "stream"), Tensor("x", "T n C", "stream")),
    outputs=(Tensor("dH_pre", "T n"),),
    space=lanes_space,
    default=lambda p: lanes_default(p, warps=32, warps_a_token=2),
    invalid=lambda p, cfg: lanes_invalid(p, cfg, **_held(p)),
    reference=lambda du, x: (reference.pre_grad(du, x),),
    gpu_only=("threads", "block_T", "warps"),
)
