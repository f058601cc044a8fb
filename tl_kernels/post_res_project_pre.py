"""A whole boundary but for the Sinkhorn: ``post_res``, the projection of y as it is stored, H_pre from it, and ``pre`` of the same y.

y stays on chip until its H_pre is known, so it is written once and never read: 10u at n = 4. A token's row is too long for one block with
its share of phi, so ``ceildiv(C, block_C)`` blocks, a group, own a slice of the channels each: phi's slice stays in shared memory, and the
group walks over tiles of tokens. The blocks of a group meet in global memory: each writes its part of z, counts up the tile's ``ready``,
and reads all parts of the tile before, whose y it still holds.

``ready`` counts modulo :data:`EPOCH` a launch and is never cleared: it must be zero once, when it is allocated. Blocks of a group are
neighbours in launch order and groups do not wait for each other, so the blocks of one group resident at a time are enough.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.coefficients import sigmoid
from tl_kernels.mma import ACC, can_stage, high, low, mma_dtype, padded, x_parts
from tl_kernels.spec import SHARED_LIMIT, Kernel, Tensor, ceildiv

#: What all blocks of a group together add to a tile's counter; a power of two, so that it may wrap.
EPOCH = 256
BUFFERS = 3  # of y: one on its way, one in work, one that waits for its H_pre


def build(p, cfg):
    n, C, M, K, dtype, mma = p.n, p.C, p.M, p.K, p.dtype, mma_dtype(p)
    bt, bc, groups, threads = cfg["block_T"], cfg["block_C"], cfg["groups"], cfg["threads"]
    G, N, rows, kb = ceildiv(C, bc), half(p), padded(M, 8), n * bc
    nx, direct = x_parts(p), dtype == mma
    few = padded(n + 1, max(1, threads // bt))
    norm_eps, pre_eps = p.option("norm_eps"), p.option("pre_eps")
    fetch = T.async_copy if can_stage(p) else T.copy
    T_, tiles_ = T.dynamic("T"), T.dynamic("tiles")

    @T.macro
    def load(k, t1, c0, x, f, H_post, H_res, x_s, f_s, post_s, res_s):
        for j in T.unroll(n):
            fetch(x[t1 : t1 + bt, j, c0 : c0 + bc], x_s[k % BUFFERS, :, j * bc : j * bc + bc])
        fetch(f[t1 : t1 + bt, c0 : c0 + bc], f_s[k % 2, :, :])
        fetch(H_post[t1 : t1 + bt, :], post_s[k % 2, :, :])
        fetch(H_res[t1 : t1 + bt, :, :], res_s[k % 2, :, :, :])

    @T.macro
    def finish(k, t1, c0, tile, value, ready, parts, alpha, b, u, x_s, few_f, few_s, pre_s, stored, u_f):
        """u of tile k, once every block of the group has written its part of z."""
        if T.get_thread_binding() == 0:
            while T.cast(T.atomic_load(ready[tile], memory_order="acquire") - value, "int32") < 0:
                T.evaluate(0)
        T.sync_threads()
        T.clear(few_f)
        for r in T.unroll(G):
            for q, t in T.Parallel(few, bt):
                few_f[q, t] += parts[r, T.if_then_else(q < n, q, M), T.min(t1 + t, T_ - 1)]
        T.copy(few_f, few_s)
        for t, i in T.Parallel(bt, n):
            rinv = T.rsqrt(few_s[n, t] + norm_eps)
            h = alpha[0] * T.if_then_else(rinv > 0, few_s[i, t] * rinv, 0.0) + b[i]
            pre_s[t, i] = sigmoid(h) + pre_eps
        T.clear(u_f)
        for i in T.unroll(n):
            for t, c in T.Parallel(bt, bc):
                stored[t, c] = x_s[k % BUFFERS, t, i * bc + c]
            for t, c in T.Parallel(bt, bc):
                u_f[t, c] += pre_s[t, i] * stored[t, c]
        for t, c in T.Parallel(bt, bc):
            if t1 + t < T_ and c0 + c < C:
                u[t1 + t, c0 + c] = u_f[t, c]

    @T.prim_func
    def post_res_project_pre(
        x: T.Tensor((T_, n, C), dtype),
        f: T.Tensor((T_, C), dtype),
        H_post: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        phi: T.Tensor((M, K), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        y: T.Tensor((T_, n, C), dtype),
        parts: T.Tensor((G, M + 1, T_), ACC),
        u: T.Tensor((T_, C), dtype),
        ready: T.Tensor((tiles_,), "uint32"),
    ):
        with T.Kernel(G, groups, threads=threads) as (s, g):
            T.annotate_min_blocks_per_sm(cfg["blocks"])
            c0 = s * bc
            x_s = T.alloc_shared((BUFFERS, bt, kb), dtype)
            f_s = T.alloc_shared((2, bt, bc), dtype)
            post_s = T.alloc_shared((2, bt, n), ACC)
            res_s = T.alloc_shared((2, bt, n, n), ACC)
            phi_s = T.alloc_shared((2 * N, kb), mma)
            z_s = T.alloc_shared((bt, 2 * N + 4), ACC)
            few_s = T.alloc_shared((few, bt), ACC)
            pre_s = T.alloc_shared((bt, n), ACC)
            z_TN = T.alloc_fragment((bt, 2 * N), ACC)
            few_f = T.alloc_fragment((few, bt), ACC)
            x_f = T.alloc_fragment((n, bt, bc), dtype)
            f_f = T.alloc_fragment((bt, bc), dtype)
            y_f = T.alloc_fragment((bt, bc), ACC)
            stored = T.alloc_fragment((bt, bc), dtype)
            square = T.alloc_fragment((bt, bc), ACC)
            mean = T.alloc_fragment((bt,), ACC)
            u_f = T.alloc_fragment((bt, bc), ACC)
            wanted = T.alloc_var("uint32")
            before = T.alloc_var("uint32")
            mine = T.ceildiv(T.ceildiv(T_, bt) - g, groups)

            if mine > 0:
                load(0, g * bt, c0, x, f, H_post, H_res, x_s, f_s, post_s, res_s)
            for j in T.unroll(n):
                for m, c in T.Parallel(rows, bc):
                    value = T.if_then_else(m < M and c0 + c < C, phi[T.min(m, M - 1), T.min(j * C + c0 + c, K - 1)], 0.0)
                    phi_s[m, j * bc + c] = high(value, mma)
                    phi_s[N + m, j * bc + c] = low(value, mma)
            for k in T.serial(mine):
                t0 = (k * groups + g) * bt
                T.ptx_wait_group(0)
                T.sync_threads()
                if k + 1 < mine:
                    load(k + 1, t0 + groups * bt, c0, x, f, H_post, H_res, x_s, f_s, post_s, res_s)
                for j in T.unroll(n):
                    for t, c in T.Parallel(bt, bc):
                        x_f[j, t, c] = x_s[k % BUFFERS, t, j * bc + c]
                for t, c in T.Parallel(bt, bc):
                    f_f[t, c] = f_s[k % 2, t, c]
                T.clear(square)
                for i in T.unroll(n):
                    for t, c in T.Parallel(bt, bc):
                        y_f[t, c] = post_s[k % 2, t, i] * f_f[t, c]
                    for j in T.unroll(n):
                        for t, c in T.Parallel(bt, bc):
                            y_f[t, c] += res_s[k % 2, t, i, j] * x_f[j, t, c]
                    # what the next sublayer reads is the rounded y: project that
                    for t, c in T.Parallel(bt, bc):
                        stored[t, c] = y_f[t, c]
                    for t, c in T.Parallel(bt, bc):
                        x_s[k % BUFFERS, t, i * bc + c] = stored[t, c]
                    for t, c in T.Parallel(bt, bc):
                        if t0 + t < T_ and c0 + c < C:
                            y[t0 + t, i, c0 + c] = stored[t, c]
                    for t, c in T.Parallel(bt, bc):
                        square[t, c] += T.cast(stored[t, c], ACC) * T.cast(stored[t, c], ACC)
                T.clear(z_TN)
                if direct:
                    T.gemm(x_s[k % BUFFERS, :, :], phi_s, z_TN, transpose_B=True)
                else:
                    y_s = T.alloc_shared((bt, kb), mma)
                    for t, c in T.Parallel(bt, kb):
                        y_s[t, c] = high(T.cast(x_s[k % BUFFERS, t, c], ACC), mma)
                    T.gemm(y_s, phi_s, z_TN, transpose_B=True)
                    if nx == 2:
                        for t, c in T.Parallel(bt, kb):
                            y_s[t, c] = low(T.cast(x_s[k % BUFFERS, t, c], ACC), mma)
                        T.gemm(y_s, phi_s, z_TN, transpose_B=True)
                T.copy(z_TN, z_s[:, 0 : 2 * N])
                for m, t in T.Parallel(rows, bt):
                    if t0 + t < T_ and m < M:
                        parts[s, m, t0 + t] = z_s[t, m] + z_s[t, N + m]
                T.reduce_sum(square, mean, dim=1)
                for t in T.Parallel(bt):
                    if t0 + t < T_:
                        parts[s, M, t0 + t] = mean[t] / K
                T.sync_threads()
                if T.get_thread_binding() == 0:
                    before = wanted
                    count = T.atomic_add(
                        ready[k * groups + g], T.if_then_else(s == 0, EPOCH - G + 1, 1), memory_order="release", return_prev=True
                    )
                    wanted = T.bitwise_and(count, T.uint32(2**32 - EPOCH)) + T.uint32(EPOCH)
                if k > 0:
                    finish(k - 1, t0 - groups * bt, c0, k * groups + g - groups, before, ready, parts, alpha, b, u, x_s, few_f, few_s, pre_s, stored, u_f)
            if mine > 0:
                finish(mine - 1, ((mine - 1) * groups + g) * bt, c0, (mine - 1) * groups + g, wanted, ready, parts, alpha, b, u, x_s, few_f, few_s, pre_s, stored, u_f)

    return post_res_project_pre


def half(p):
    """Rows of each half of phi, high and low."""
    return padded(p.M, 32 if p.n <= 4 else 8)
