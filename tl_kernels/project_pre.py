"""Entering a sublayer but for the Sinkhorn: the projection of x, H_pre from it, and ``pre`` of the same x, read once: 5u at n = 4.

How, see tl_kernels/whole.py: the main role sums the squares of tile i and makes u of an earlier one.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC
from tl_kernels.roles import roles
from tl_kernels.spec import Tensor
from tl_kernels.whole import buffers_of, group_of, part_of, row_layouts, scratch_of, threads_of, whole_pass
from tl_kernels.widen import widen


def build(p, cfg):
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, groups = cfg["block_T"], cfg["block_C"], cfg["groups"]
    buffers, part = buffers_of(p, cfg), part_of(p, cfg)
    row, parts_row = row_layouts(p, cfg, bt // part)
    T_ = T.dynamic("T")

    @T.macro
    def load(i, t0, c0, tensors, tiles):
        for j in T.unroll(n):
            T.async_copy(tensors[0][t0 : t0 + bt, j, c0 : c0 + bc], tiles[0][i % buffers, :, j * bc : j * bc + bc])

    @T.macro
    def work(i, t0, tokens, c0, tiles, held, put_mean, home, outs):
        (x_s,) = tiles
        x_f, square, mean = held
        T.clear(square)
        for h in T.unroll(bt // part):
            for j in T.unroll(n):
                for t, c in T.Parallel(part, bc):
                    x_f[t, c] = x_s[i % buffers, h * part + t, j * bc + c]
                for t, c in T.Parallel(part, bc):
                    square[h, t, c] += T.cast(x_f[t, c], ACC) * T.cast(x_f[t, c], ACC)
        T.reduce_sum(square, mean, dim=2)  # of all parts at once, so that their shuffles overlap
        for h, t in T.Parallel(bt // part, part):
            put_mean(home, i, h * part + t, mean[h, t] / K)

    run = roles(p, cfg, load, work, raw=True)

    @T.prim_func
    def project_pre(
        x: T.Tensor((T_, n, C), dtype),
        phi: T.Tensor((M, K), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        u: T.Tensor((T_, C), dtype),
        parts: T.Tensor((1, M + 1, T_), ACC),
        scratch: T.Tensor((scratch_of(p, cfg),), "uint32"),
    ):
        with T.Kernel(group_of(p, cfg), groups, threads=threads_of(cfg)) as (s, g):
            T.import_source(widen(cfg))
            tx = T.get_thread_binding()
            x_s = T.alloc_shared((buffers, bt, n * bc), dtype)
            x_f = T.alloc_fragment((part, bc), dtype)
            u_f = T.alloc_fragment((part, bc), ACC)
            square = T.alloc_fragment((bt // part, part, bc), ACC)
            mean = T.alloc_fragment((bt // part, part), ACC)
            T.annotate_layout({x_f: row, u_f: row, square: parts_row})
            run((tx, s, g, s * bc), T_, (x,), (phi, alpha, b), (u, parts), scratch, (x_s,), (x_f, square, mean), x_f, u_f)

    return project_pre


project_pre = whole_pass(
    mixes=False,
    name="project_pre",
    build=build,
    inputs=(Tensor("x", "T n C", "stream"), Tensor("phi", "M K"), Tensor("alpha", "3"), Tensor("b", "M")),
    outputs=(Tensor("u", "T C", "stream"), Tensor("parts", "1 Q T")),
    reference=reference.project_pre,
)
