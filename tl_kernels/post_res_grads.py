"""Gradients of the layer output but dx: df = sum_i H_post[i] dy[i], dH_post[i] = <f, dy[i]>, dH_res[i,j] = <x[j], dy[i]>.

``post_res_bwd`` without dx, which another pass adds up with its other parts and writes once.
"""

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
    def post_res_grads(
        dy: T.Tensor((T_, n, C), dtype),
        x: T.Tensor((T_, n, C), dtype),
        f: T.Tensor((T_, C), dtype),
        H_post: T.Tensor((T_, n), ACC),
        df: T.Tensor((T_, C), dtype),
        dH_post: T.Tensor((T_, n), ACC),
        dH_res: T.Tensor((T_, n, n), ACC),
    ):
        with T.Kernel(T.ceildiv(T_, bt), threads=cfg["threads"]) as block:
            if resident:
                T.annotate_min_blocks_per_sm(resident)
            t0 = (T.ceildiv(T_, bt) - 1 - block if reverse else block) * bt
            dy_nC = T.alloc_fragment((n, bt, reps, lanes, width), dtype)
            x_nC = T.alloc_fragment((n, bt, reps, lanes, width), dtype)
            f_C = T.alloc_fragment((bt, reps, lanes, width), dtype)
            df_C = T.alloc_fragment((bt, reps, lanes, width), ACC)
            H_n = T.alloc_fragment((bt, n, lanes), ACC)
            part_post = T.alloc_fragment((bt, n, lanes), ACC)
            part_res = T.alloc_fragment((bt, n * n, lanes), ACC)
            sum_post = T.alloc_fragment((bt, n), ACC)
            sum_res = T.alloc_fragment((bt, n * n), ACC)
            T.annotate_layout(
                {
                    dy_nC: rows_layout(n, bt, lanes, reps, width),
                    x_nC: rows_layout(n, bt, lanes, reps, width),
                    f_C: row_layout(bt, lanes, reps, width),
                    df_C: row_layout(bt, lanes, reps, width),
                    H_n: own_layout(bt, n, lanes),
                    part_post: own_layout(bt, n, lanes),
                    part_res: own_layout(bt, n * n, lanes),
                }
            )
            T.clear(part_post)
            T.clear(part_res)
            for i in T.unroll(n):
                for t, lane in T.Parallel(bt, lanes):
                    H_n[t, i, lane] = T.if_then_else(t0 + t < T_, H_post[t0 + t, i], 0.0)
            for b in T.serial(blocks):
                for i in T.unroll(n):
                    for t, r, lane, k in T.Parallel(bt, reps, lanes, width):
                        c = b * bc + (r * lanes + lane) * width + k
                        dy_nC[i, t, r, lane, k] = T.if_then_else(t0 + t < T_ and c < C, dy[t0 + t, i, c], T.cast(0, dtype))
                for j in T.unroll(n):
                    for t, r, lane, k in T.Parallel(bt, reps, lanes, width):
                        c = b * bc + (r * lanes + lane) * width + k
                        x_nC[j, t, r, lane, k] = T.if_then_else(t0 + t < T_ and c < C, x[t0 + t, j, c], T.cast(0, dtype))
                for t, r, lane, k in T.Parallel(bt, reps, lanes, width):
                    c = b * bc + (r * lanes + lane) * width + k
                    f_C[t, r, lane, k] = T.if_then_else(t0 + t < T_ and c < C, f[t0 + t, c], T.cast(0, dtype))
                # a channel at a time: all that is float32 of it dies with it, and the registers are free for loads
                for r in T.unroll(reps):
                    for k in T.unroll(width):
                        for t, lane in T.Parallel(bt, lanes):
                            df_C[t, r, lane, k] = 0.0
                        for i in T.unroll(n):
                            # df = sum_i H_post[i] dy[i]
                            for t, lane in T.Parallel(bt, lanes):
                                df_C[t, r, lane, k] += H_n[t, i, lane] * T.cast(dy_nC[i, t, r, lane, k], ACC)
                            # dH_post[i] = <f, dy[i]>, dH_res[i,j] = <x[j], dy[i]>
                            for t, lane in T.Parallel(bt, lanes):
                                part_post[t, i, lane] += T.cast(f_C[t, r, lane, k], ACC) * T.cast(dy_nC[i, t, r, lane, k], ACC)
                            for j in T.unroll(n):
                                for t, lane in T.Parallel(bt, lanes):
                                    part_res[t, i * n + j, lane] += T.cast(dy_nC[i, t, r, lane, k], ACC) * T.cast(
                                        x_nC[j, t, r, lane, k], ACC
                                    )
                for t, r, lane, k in T.Parallel(bt, reps, lanes, width):
                    c = b * bc + (r * lanes + lane) * width + k
                    if t0 + t < T_ and c < C:
                        df[t0 + t, c] = df_C[t, r, lane, k]
            # a batch shares its barriers, where a token has more than one warp
            T.reduce_sum(part_post, sum_post, dim=2, batch=n if lanes > 32 else 1)
            T.reduce_sum(part_res, sum_res, dim=2, batch=n * n if lanes > 32 else 1)
            for t in T.Parallel(bt):
                for i in row(n):
                    if t0 + t < T_:
                        dH_post[t0 + t, i] = sum_post[t, i]
            for i in T.unroll(n):
                for t in T.Parallel(bt):
                    for j in row(n):
                        if t0 + t < T_:
                            dH_res[t0 + t, i, j] = sum_res[t, i * n + j]

    return post_res_grads


#: By n, the most warps an SM can hold without spills (bfloat16, sm_90a): 80 registers at n = 4, 205 at n = 8.
WARPS = (32, 32, 32, 24, 16, 12, 12, 8)


def _held(p):
    """Rows and sums a token: dy, x and f; dH_post, dH_res and H_post."""
    return {"streams": 2 * p.n + 1, "sums": p.n * p.n + 2 * p.n}


post_res_grads = Kernel(
    name="post_res_grads",
    build=build,
    inputs=(Tensor("dy", "T n C", "stream"), Tensor("x", "T n C", "stream"), Tensor("f", "T C", "stream"), Tensor("H_post", "T n")),
    outputs=(Tensor("df", "T C", "stream"), Tensor("dH_post", "T n"), Tensor("dH_res", "T n n")),
    space=lanes_space,
    default=lambda p: lanes_default(p, WARPS[p.n - 1]),
    invalid=lambda p, cfg: lanes_invalid(p, cfg, **_held(p)),
    reference=reference.post_res_grads,
    gpu_only=("threads", "block_T", "warps"),
)
