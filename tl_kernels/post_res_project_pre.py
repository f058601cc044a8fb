"""A whole boundary but for the Sinkhorn: ``post_res``, the projection of y as it is stored, H_pre from it, and ``pre`` of the same y.

y stays on chip until its H_pre is known, so it is written once and never read: 10u at n = 4.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.coefficients import sigmoid
from tl_kernels.mma import ACC, can_stage, high, low, mma_dtype, padded, x_parts
from tl_kernels.spec import SHARED_LIMIT, Kernel, Tensor, ceildiv, vector_width

RING = 4
HELPERS = 128


def build(p, cfg):
    n, C, M, K, dtype, mma = p.n, p.C, p.M, p.K, p.dtype, mma_dtype(p)
    bt, bc, groups, threads, ahead = cfg["block_T"], cfg["block_C"], cfg["groups"], cfg["threads"], cfg["ahead"]
    BUFFERS, AHEAD = ahead + 3, ahead + 1
    vec = vector_width(p)
    part = min(bt, threads * vec // bc)
    G, N, rows, kb, Q = ceildiv(C, bc), half(p), padded(M, 8), n * bc, M + 1
    few = (n + 1) * bt
    share = ceildiv((M - n) * bt, G)
    sums = padded(few + share, HELPERS)
    norm_eps, pre_eps = p.option("norm_eps"), p.option("pre_eps")
    T_ = T.dynamic("T")

    def thread_of(t, c):
        return (t * bc + c) // vec % threads

    def index_of(t, c):
        return (t * bc + c) // vec // threads * vec + c % vec

    each = ceildiv(part * bc, threads)
    tile = T.Fragment((part, bc), forward_thread_fn=thread_of, forward_index_fn=index_of)
    tiles = T.Fragment(
        (n, part, bc), forward_thread_fn=lambda j, t, c: thread_of(t, c), forward_index_fn=lambda j, t, c: j * each + index_of(t, c)
    )

    def tag_of(use):
        return T.bitwise_xor(T.bitwise_and(use // RING, T.uint32(1)), T.uint32(1))

    def marked(value, use):
        return T.bitwise_or(T.bitwise_and(T.reinterpret(value, "uint32"), T.uint32(0xFFFFFFFE)), tag_of(use))

    def place(e, s):
        """Where block s finds the words it adds: H_pre's and the mean, which every block needs, then a share of the others."""
        return e + T.if_then_else(e < n * bt, 0, T.if_then_else(e < few, (M - n) * bt, s * share - bt))

    @T.macro
    def load(k, t1, c0, x, f, H_post, H_res, x_s, f_s, post_s, res_s):
        for j in T.unroll(n):
            T.async_copy(x[t1 : t1 + bt, j, c0 : c0 + bc], x_s[k % BUFFERS, :, j * bc : j * bc + bc])
        T.async_copy(f[t1 : t1 + bt, c0 : c0 + bc], f_s[k % AHEAD, :, :])
        T.async_copy(H_post[t1 : t1 + bt, :], post_s[k % AHEAD, :, :])
        T.async_copy(H_res[t1 : t1 + bt, :, :], res_s[k % AHEAD, :, :, :])

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
        words: T.Tensor((groups, RING, G, padded(Q * bt, 4) + share), "uint32"),
        ctl: T.Tensor((groups, 2), "uint32"),
    ):
        with T.Kernel(G, groups, threads=threads + 2 * HELPERS) as (s, g):
            tx = T.get_thread_binding()
            c0 = s * bc
            x_s = T.alloc_shared((BUFFERS, bt, kb), dtype)
            f_s = T.alloc_shared((AHEAD, bt, bc), dtype)
            post_s = T.alloc_shared((AHEAD, bt, n), ACC)
            res_s = T.alloc_shared((AHEAD, bt, n, n), ACC)
            phi_s = T.alloc_shared((2 * N, kb), mma)
            z_s = T.alloc_shared((2 * N, bt + 4), ACC)
            sum_s = T.alloc_shared((sums,), ACC)
            pre_s = T.alloc_shared((bt, n), ACC)
            mean_s = T.alloc_shared((2, bt), ACC)
            z_NT = T.alloc_fragment((2 * N, bt), ACC)
            w = T.alloc_fragment((G, sums), "uint32")
            late = T.alloc_fragment((sums,), "uint32")
            sum_f = T.alloc_fragment((sums,), ACC)
            x_f = T.alloc_fragment((n, part, bc), dtype)
            f_f = T.alloc_fragment((part, bc), dtype)
            y_f = T.alloc_fragment((part, bc), ACC)
            stored = T.alloc_fragment((part, bc), dtype)
            square = T.alloc_fragment((part, bc), ACC)
            mean = T.alloc_fragment((part,), ACC)
            u_f = T.alloc_fragment((part, bc), ACC)
            T.annotate_layout({x_f: tiles, f_f: tile, y_f: tile, stored: tile, square: tile, u_f: tile})
            epoch = T.alloc_var("uint32")
            epoch = ctl[g, 0]
            mine = T.max(T.ceildiv(T.ceildiv(T_, bt) - g, groups), 0)
            step = groups * bt

            if tx < threads:
                for q in T.unroll(ahead):
                    if q < mine:
                        load(q, (q * groups + g) * bt, c0, x, f, H_post, H_res, x_s, f_s, post_s, res_s)
            for j in T.unroll(n):
                for m, c in T.Parallel(rows, bc):
                    value = T.if_then_else(m < M and c0 + c < C, phi[T.min(m, M - 1), T.min(j * C + c0 + c, K - 1)], 0.0)
                    phi_s[m, j * bc + c] = high(value, mma)
                    phi_s[N + m, j * bc + c] = low(value, mma)
            for i in T.serial(mine + 2):
                if ahead > 1 and i + ahead <= mine:
                    T.ptx_wait_group((ahead - 1) * (n + 3))
                else:
                    T.ptx_wait_group(0)
                T.sync_threads()
                t0 = (i * groups + g) * bt
                if tx < threads:
                    if i + ahead < mine:
                        load(i + ahead, t0 + ahead * step, c0, x, f, H_post, H_res, x_s, f_s, post_s, res_s)
                    if i < mine:
                        for h in T.serial(bt // part):
                            h0 = h * part
                            for j in T.unroll(n):
                                for t, c in T.Parallel(part, bc):
                                    x_f[j, t, c] = x_s[i % BUFFERS, h0 + t, j * bc + c]
                            for t, c in T.Parallel(part, bc):
                                f_f[t, c] = f_s[i % AHEAD, h0 + t, c]
                            T.clear(square)
                            for q in T.unroll(n):
                                for t, c in T.Parallel(part, bc):
                                    y_f[t, c] = post_s[i % AHEAD, h0 + t, q] * f_f[t, c]
                                for j in T.unroll(n):
                                    for t, c in T.Parallel(part, bc):
                                        y_f[t, c] += res_s[i % AHEAD, h0 + t, q, j] * x_f[j, t, c]
                                # what the next sublayer reads is the rounded y: project that
                                for t, c in T.Parallel(part, bc):
                                    stored[t, c] = y_f[t, c]
                                for t, c in T.Parallel(part, bc):
                                    x_s[i % BUFFERS, h0 + t, q * bc + c] = stored[t, c]
                                for t, c in T.Parallel(part, bc):
                                    if t0 + h0 + t < T_ and c0 + c < C:
                                        y[t0 + h0 + t, q, c0 + c] = stored[t, c]
                                for t, c in T.Parallel(part, bc):
                                    square[t, c] += T.cast(stored[t, c], ACC) * T.cast(stored[t, c], ACC)
                            T.reduce_sum(square, mean, dim=1)
                            for t in T.Parallel(part):
                                mean_s[i % 2, h0 + t] = mean[t] / K
                        T.fence_proxy_async()
                    if i >= 2:
                        T.sync_threads(2, threads + HELPERS)
                        for h in T.serial(bt // part):
                            h0 = h * part
                            T.clear(u_f)
                            for q in T.unroll(n):
                                for t, c in T.Parallel(part, bc):
                                    stored[t, c] = x_s[(i - 2) % BUFFERS, h0 + t, q * bc + c]
                                for t, c in T.Parallel(part, bc):
                                    u_f[t, c] += pre_s[h0 + t, q] * stored[t, c]
                            for t, c in T.Parallel(part, bc):
                                if t0 - 2 * step + h0 + t < T_ and c0 + c < C:
                                    u[t0 - 2 * step + h0 + t, c0 + c] = u_f[t, c]
                elif tx < threads + HELPERS:
                    # z of the tile before, for the whole group
                    if i >= 1 and i < mine + 1:
                        use = epoch + T.cast(i + 2 * RING - 1, "uint32")
                        T.gemm(phi_s, x_s[(i - 1) % BUFFERS, :, :], z_NT, transpose_B=True, clear_accum=True)
                        T.copy(z_NT, z_s[:, 0:bt])
                        T.sync_threads(1, HELPERS)
                        for m, t in T.Parallel(padded(M, HELPERS // bt), bt):
                            if m < M:
                                T.atomic_store(words[g, use % RING, s, m * bt + t], marked(z_s[m, t] + z_s[N + m, t], use), memory_order="relaxed")
                        for t in T.Parallel(bt):
                            T.atomic_store(words[g, use % RING, s, M * bt + t], marked(mean_s[(i - 1) % 2, t], use), memory_order="relaxed")
                else:
                    # H_pre of the tile before that, and this block's share of the sums over the group
                    if i >= 2:
                        use = epoch + T.cast(i + 2 * RING - 2, "uint32")  # a whole period more, so that it stays positive
                        t2 = t0 - 2 * step
                        for r in T.unroll(G):
                            for e in T.Parallel(sums):
                                if e < few + share:
                                    w[r, e] = T.atomic_load(words[g, use % RING, r, place(e, s)], memory_order="relaxed")
                        T.clear(late)
                        for r in T.unroll(G):
                            for e in T.Parallel(sums):
                                if e < few + share:
                                    late[e] = T.bitwise_or(late[e], T.bitwise_xor(w[r, e], tag_of(use)))
                        for e in T.Parallel(sums):
                            while T.bitwise_and(late[e], T.uint32(1)) != 0:
                                late[e] = T.uint32(0)
                                for r in T.unroll(G):
                                    w[r, e] = T.atomic_load(words[g, use % RING, r, place(e, s)], memory_order="relaxed")
                                    late[e] = T.bitwise_or(late[e], T.bitwise_xor(w[r, e], tag_of(use)))
                        T.clear(sum_f)
                        for r in T.unroll(G):
                            for e in T.Parallel(sums):
                                sum_f[e] += T.reinterpret(T.bitwise_and(w[r, e], T.uint32(0xFFFFFFFE)), ACC)
                        for e in T.Parallel(sums):
                            sum_s[e] = sum_f[e]
                        T.sync_threads(3, HELPERS)
                        for t, q in T.Parallel(bt, n):
                            rinv = T.rsqrt(sum_s[n * bt + t] + norm_eps)
                            h = alpha[0] * T.if_then_else(rinv > 0, sum_s[q * bt + t] * rinv, 0.0) + b[q]
                            pre_s[t, q] = sigmoid(h) + pre_eps
                        T.named_barrier_arrive(2, threads + HELPERS)
                        for e in T.Parallel(sums):
                            at = place(e, s)
                            if (e >= few or s == 0) and e < few + share and at < Q * bt and t2 + at % bt < T_:
                                parts[0, at // bt, t2 + at % bt] = sum_f[e]
            T.sync_threads()
            if tx == 0:
                if T.atomic_add(ctl[g, 1], T.uint32(1), memory_order="acq_rel", return_prev=True) == T.uint32(G - 1):
                    ctl[g, 1] = T.uint32(0)
                    ctl[g, 0] = epoch + T.cast(mine, "uint32")

    return post_res_project_pre


def half(p):
    """Rows of each half of phi, high and low."""
    return padded(p.M, 32 if p.n <= 4 else 8)


PASS = {"tl.enable_fast_math": True, "tl.disable_warp_specialized": True, "tl.disable_thread_storage_sync": True, "tl.disable_safe_memory_legalize": True}
