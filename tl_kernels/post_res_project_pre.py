"""A whole boundary but for the Sinkhorn: ``post_res``, the projection of y as it is stored, H_pre from it, and ``pre`` of the same y.

y stays on chip until its H_pre is known, so it is written once and never read: 10u at n = 4.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.coefficients import sigmoid
from tl_kernels.mma import ACC, can_stage, high, low, mma_dtype, padded, x_parts
from tl_kernels.spec import SHARED_LIMIT, Kernel, Tensor, ceildiv

RING = 2


def build(p, cfg):
    n, C, M, K, dtype, mma = p.n, p.C, p.M, p.K, p.dtype, mma_dtype(p)
    bt, bc, groups, threads, buffers, delay = cfg["block_T"], cfg["block_C"], cfg["groups"], cfg["threads"], cfg["buffers"], cfg["delay"]
    G, N, rows, kb, Q = ceildiv(C, bc), half(p), padded(M, 8), n * bc, M + 1
    few = (n + 1) * bt
    share = ceildiv((M - n) * bt, G)
    sums = padded(few + share, threads)
    nx, direct = x_parts(p), dtype == mma
    overlap = cfg["overlap"]
    norm_eps, pre_eps = p.option("norm_eps"), p.option("pre_eps")
    fetch = T.async_copy if can_stage(p) else T.copy
    ring = 2 * delay
    T_ = T.dynamic("T")

    def tag_of(use):
        return T.bitwise_xor(T.bitwise_and(use // ring, T.uint32(1)), T.uint32(1))

    @T.macro
    def load(k, t1, c0, x, f, H_post, H_res, x_s, f_s, post_s, res_s):
        for j in T.unroll(n):
            fetch(x[t1 : t1 + bt, j, c0 : c0 + bc], x_s[k % buffers, :, j * bc : j * bc + bc])
        fetch(f[t1 : t1 + bt, c0 : c0 + bc], f_s[k % 2, :, :])
        fetch(H_post[t1 : t1 + bt, :], post_s[k % 2, :, :])
        fetch(H_res[t1 : t1 + bt, :, :], res_s[k % 2, :, :, :])

    @T.macro
    def ask(use, g, s, words, w):
        """Words of a tile, whether or not they have been written yet."""
        for r in T.unroll(G):
            for e in T.Parallel(sums):
                if e < few + share:
                    at = e + T.if_then_else(e < few, 0, s * share)
                    w[r, e] = T.atomic_load(words[g, use % ring, r, at], memory_order="relaxed")

    @T.macro
    def finish(k, t1, c0, use, g, s, words, w, late, sum_f, sum_s, alpha, b, parts, u, x_s, pre_s, stored, u_f):
        """u of tile k, and this block's share of the sums over the group."""
        T.clear(late)
        for r in T.unroll(G):
            for e in T.Parallel(sums):
                if e < few + share:
                    late[e] = T.bitwise_or(late[e], T.bitwise_xor(w[r, e], tag_of(use)))
        for e in T.Parallel(sums):
            while T.bitwise_and(late[e], T.uint32(1)) != 0:
                late[e] = T.uint32(0)
                for r in T.unroll(G):
                    w[r, e] = T.atomic_load(words[g, use % ring, r, e + T.if_then_else(e < few, 0, s * share)], memory_order="relaxed")
                    late[e] = T.bitwise_or(late[e], T.bitwise_xor(w[r, e], tag_of(use)))
        T.clear(sum_f)
        for r in T.unroll(G):
            for e in T.Parallel(sums):
                sum_f[e] += T.reinterpret(T.bitwise_and(w[r, e], T.uint32(0xFFFFFFFE)), ACC)
        T.copy(sum_f, sum_s)
        for e in T.Parallel(sums):
            if e < few:
                if s == 0 and t1 + e % bt < T_:
                    parts[0, T.if_then_else(e // bt < n, e // bt, M), t1 + e % bt] = sum_f[e]
            elif e < few + share:
                i = e - few + s * share
                if i < (M - n) * bt and t1 + i % bt < T_:
                    parts[0, n + i // bt, t1 + i % bt] = sum_f[e]
        for t, i in T.Parallel(bt, n):
            rinv = T.rsqrt(sum_s[n * bt + t] + norm_eps)
            h = alpha[0] * T.if_then_else(rinv > 0, sum_s[i * bt + t] * rinv, 0.0) + b[i]
            pre_s[t, i] = sigmoid(h) + pre_eps
        T.clear(u_f)
        for i in T.unroll(n):
            for t, c in T.Parallel(bt, bc):
                stored[t, c] = x_s[k % buffers, t, i * bc + c]
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
        parts: T.Tensor((1, Q, T_), ACC),
        u: T.Tensor((T_, C), dtype),
        words: T.Tensor((groups, ring, G, few + G * share), "uint32"),
        ctl: T.Tensor((groups, 2), "uint32"),
    ):
        with T.Kernel(G, groups, threads=threads) as (s, g):
            T.annotate_min_blocks_per_sm(cfg["blocks"])
            c0 = s * bc
            x_s = T.alloc_shared((buffers, bt, kb), dtype)
            f_s = T.alloc_shared((2, bt, bc), dtype)
            post_s = T.alloc_shared((2, bt, n), ACC)
            res_s = T.alloc_shared((2, bt, n, n), ACC)
            phi_s = T.alloc_shared((2 * N, kb), mma)
            z_s = T.alloc_shared((2 * N, bt + 4), ACC)
            sum_s = T.alloc_shared((sums,), ACC)
            pre_s = T.alloc_shared((bt, n), ACC)
            mean_s = T.alloc_shared((bt,), ACC)
            z_NT = T.alloc_fragment((2 * N, bt), ACC)
            w = T.alloc_fragment((G, sums), "uint32")
            late = T.alloc_fragment((sums,), "uint32")
            sum_f = T.alloc_fragment((sums,), ACC)
            x_f = T.alloc_fragment((n, bt, bc), dtype)
            f_f = T.alloc_fragment((bt, bc), dtype)
            y_f = T.alloc_fragment((bt, bc), ACC)
            stored = T.alloc_fragment((bt, bc), dtype)
            square = T.alloc_fragment((bt, bc), ACC)
            mean = T.alloc_fragment((bt,), ACC)
            u_f = T.alloc_fragment((bt, bc), ACC)
            epoch = T.alloc_var("uint32")
            epoch = ctl[g, 0]
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
                if cfg["early"] and k >= delay:
                    ask(epoch + T.cast(k - delay, "uint32"), g, s, words, w)
                for j in T.unroll(n):
                    for t, c in T.Parallel(bt, bc):
                        x_f[j, t, c] = x_s[k % buffers, t, j * bc + c]
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
                        x_s[k % buffers, t, i * bc + c] = stored[t, c]
                    for t, c in T.Parallel(bt, bc):
                        if t0 + t < T_ and c0 + c < C:
                            y[t0 + t, i, c0 + c] = stored[t, c]
                    for t, c in T.Parallel(bt, bc):
                        square[t, c] += T.cast(stored[t, c], ACC) * T.cast(stored[t, c], ACC)
                if overlap:
                    T.wgmma_gemm(phi_s, x_s[k % buffers, :, :], z_NT, transpose_B=True, clear_accum=True)
                else:
                    T.clear(z_NT)
                    T.gemm(phi_s, x_s[k % buffers, :, :], z_NT, transpose_B=True)
                if cfg["early"] == 0 and k >= delay:
                    ask(epoch + T.cast(k - delay, "uint32"), g, s, words, w)
                T.reduce_sum(square, mean, dim=1)
                for t in T.Parallel(bt):
                    mean_s[t] = mean[t] / K
                if k >= delay:
                    finish(
                        k - delay, t0 - delay * groups * bt, c0, epoch + T.cast(k - delay, "uint32"),
                        g, s, words, w, late, sum_f, sum_s, alpha, b, parts, u, x_s, pre_s, stored, u_f,
                    )
                if overlap:
                    T.wait_wgmma(0)
                T.copy(z_NT, z_s[:, 0:bt])
                for m, t in T.Parallel(padded(Q, 8), bt):
                    if m < Q:
                        v = T.if_then_else(m < M, z_s[T.min(m, M - 1), t] + z_s[N + T.min(m, M - 1), t], mean_s[t])
                        at = T.if_then_else(m < n, m, T.if_then_else(m < M, m + 1, n)) * bt + t
                        use = epoch + T.cast(k, "uint32")
                        word = T.bitwise_or(T.bitwise_and(T.reinterpret(v, "uint32"), T.uint32(0xFFFFFFFE)), tag_of(use))
                        T.atomic_store(words[g, use % ring, s, at], word, memory_order="relaxed")
            for d in T.unroll(delay):
                if mine > delay - 1 - d:
                    k = mine - delay + d
                    ask(epoch + T.cast(k, "uint32"), g, s, words, w)
                    finish(
                        k, (k * groups + g) * bt, c0, epoch + T.cast(k, "uint32"),
                        g, s, words, w, late, sum_f, sum_s, alpha, b, parts, u, x_s, pre_s, stored, u_f,
                    )
            T.sync_threads()
            if T.get_thread_binding() == 0:
                if T.atomic_add(ctl[g, 1], T.uint32(1), memory_order="acq_rel", return_prev=True) == T.uint32(G - 1):
                    ctl[g, 1] = T.uint32(0)
                    ctl[g, 0] = epoch + T.cast(T.max(mine, 0), "uint32")

    return post_res_project_pre


def half(p):
    """Rows of each half of phi, high and low."""
    return padded(p.M, 32 if p.n <= 4 else 8)
