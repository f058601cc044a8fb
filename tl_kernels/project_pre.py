"""Entering a sublayer but for the Sinkhorn: the projection of x, H_pre from it, and ``pre`` of the same x, read once: 5u at n = 4.

How, see tl_kernels/whole.py: the main role sums the squares of tile i and makes u of an earlier one.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.meeting import ROLE
from tl_kernels.mma import ACC, padded
from tl_kernels.spec import Kernel, Tensor
from tl_kernels.whole import (
    MAIN,
    PRE,
    SEEDS,
    buffers_of,
    default,
    group_of,
    invalid,
    lag_of,
    part_of,
    pass_configs,
    roles,
    row_layouts,
    scratch_of,
    space,
    unserved,
)


def build(p, cfg):
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, groups, threads, ahead = cfg["block_T"], cfg["block_C"], cfg["groups"], cfg["threads"], cfg["ahead"]
    levels = cfg["levels"]
    G, N, kb = group_of(p, cfg), padded(M, 32), n * bc
    lag = lag_of(cfg)
    buffers = buffers_of(cfg)
    part = part_of(p, cfg)
    tile, _ = row_layouts(p, cfg)
    count, counters, fill, product, sums, give_u, leave = roles(p, cfg)
    T_ = T.dynamic("T")

    @T.macro
    def load(i, t0, c0, x, x_s):
        for j in T.unroll(n):
            T.async_copy(x[t0 : t0 + bt, j, c0 : c0 + bc], x_s[i % buffers, :, j * bc : j * bc + bc])

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
        with T.Kernel(G, groups, threads=threads + 2 * ROLE) as (s, g):
            tx = T.get_thread_binding()
            c0, step = s * bc, groups * bt
            x_s = T.alloc_shared((buffers, bt, kb), dtype)
            phi_s = T.alloc_shared((2 * N, kb), dtype)
            z_s = T.alloc_shared((2 * N, bt + 4), ACC)
            mean_s = T.alloc_shared((2, bt), ACC)
            total_s = T.alloc_shared((count,), ACC)
            pre_s = T.alloc_shared((levels, bt, n), ACC)
            z_NT = T.alloc_fragment((2 * N, bt), ACC)
            if levels == 1:
                words = T.alloc_fragment((G, count), "uint32")
                old = T.alloc_fragment((count,), "uint32")
                total = T.alloc_fragment((count,), ACC)
            x_f = T.alloc_fragment((part, bc), dtype)
            u_f = T.alloc_fragment((part, bc), ACC)
            square = T.alloc_fragment((part, bc), ACC)
            mean = T.alloc_fragment((part,), ACC)
            T.annotate_layout({x_f: tile, u_f: tile, square: tile})
            epoch = T.alloc_var("uint32")
            epoch = scratch[counters + 2 * g]
            mine = T.max(T.ceildiv(T.ceildiv(T_, bt) - g, groups), 0)

            if tx < threads:
                for i in T.unroll(ahead):
                    if i < mine:
                        load(i, (i * groups + g) * bt, c0, x, x_s)
            fill(c0, phi, phi_s)
            for i in T.serial(mine + lag):
                t0 = (i * groups + g) * bt
                if ahead > 1 and i + ahead <= mine:
                    T.ptx_wait_group((ahead - 1) * n)
                else:
                    T.ptx_wait_group(0)
                T.fence_proxy_async()
                T.sync_threads()
                if tx < threads:
                    if levels == 2 and i >= lag:
                        give_u(i, (i - 1) % 2, t0 - lag * step, T_, c0, x_s, pre_s, x_f, u_f, u)
                    if i + ahead < mine:
                        if levels == 2:
                            T.sync_threads(MAIN, threads)
                        load(i + ahead, t0 + ahead * step, c0, x, x_s)
                    if i < mine:
                        for h in T.serial(bt // part):
                            T.clear(square)
                            for j in T.unroll(n):
                                for t, c in T.Parallel(part, bc):
                                    x_f[t, c] = x_s[i % buffers, h * part + t, j * bc + c]
                                for t, c in T.Parallel(part, bc):
                                    square[t, c] += T.cast(x_f[t, c], ACC) * T.cast(x_f[t, c], ACC)
                            T.reduce_sum(square, mean, dim=1)
                            for t in T.Parallel(part):
                                mean_s[i % 2, h * part + t] = mean[t] / K
                    if levels == 1 and i >= lag:
                        T.sync_threads(PRE, threads + ROLE)
                        give_u(i, 0, t0 - lag * step, T_, c0, x_s, pre_s, x_f, u_f, u)
                elif tx < threads + ROLE:
                    if i >= 1 and i < mine + 1:
                        product(i, s, g, epoch, scratch, phi_s, x_s, mean_s, z_NT, z_s)
                else:
                    if i >= 2:
                        if levels == 1:
                            sums(i, s, g, t0 - 2 * step, T_, epoch, scratch, words, old, total, total_s, pre_s, alpha, b, parts)
                        else:
                            sums(i, mine, s, g, t0 - 2 * step, T_, epoch, scratch, total_s, pre_s, alpha, b, parts)
            T.sync_threads()
            if tx == 0:
                leave(scratch, g, epoch, mine)

    return project_pre


project_pre = Kernel(
    name="project_pre",
    build=build,
    inputs=(Tensor("x", "T n C", "stream"), Tensor("phi", "M K"), Tensor("alpha", "3"), Tensor("b", "M")),
    outputs=(Tensor("u", "T C", "stream"), Tensor("parts", "1 Q T")),
    space=space,
    default=default,
    invalid=invalid,
    unserved=unserved,
    least_arch=90,
    scratch=scratch_of,
    seeds=SEEDS,
    reference=reference.project_pre,
    options={"norm_eps": 1e-6, "pre_eps": 1e-6},
    pass_configs=pass_configs,
    gpu_only=("threads", "ahead", "groups"),
)
