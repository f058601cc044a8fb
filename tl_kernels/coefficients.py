"""All coefficients of a boundary from its projections, Eq. 15-19, in one launch; their backward in one more.

h = alpha z/r + b; H_pre = sigmoid(h) + pre_eps, H_post = post_mult sigmoid(h), H_res = Sinkhorn of the rest; columns of z, rows of phi and
b: H_pre n, H_post n, then comb [source j, target i]. The launch is latency-bound: all threads load and sum the projections, then
the first ``block_T`` threads hold one token each, and nothing of the iterations leaves them.

Sinkhorn here scales rows and columns instead of rewriting the matrix: with m the first softmax + eps, every iterate is
r[i] m[i,j] c[j], and dividing its columns by (their sums + eps) is 1/c[j] <- sum_i m[i,j] r[i] + eps (1/c[j]), rows alike: the same
numbers as tl_kernels/sinkhorn.py from n*n multiply-adds and n reciprocals a half step, and the shortest chain between them.
The backward walks the scalings back: it keeps r and c of each iteration in shared memory and needs no division.
``order="rows_first"`` works on the transposed matrix. ``iters=0`` is no mixing: H_res = identity.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC
from tl_kernels.sizes import ceildiv
from tl_kernels.spec import Kernel, Tensor


def sigmoid(h):
    """Also where exp(-h) overflows."""
    return T.fast_rcp(1.0 + T.exp(-h))


def rows_of(size, cfg):
    """``size`` rows of ``block_T`` tokens, padded so that the threads share them evenly."""
    step = max(1, cfg["threads"] // cfg["block_T"])
    return ceildiv(size, step) * step


def token_scalar(bt):
    """Each of the first ``bt`` threads holds one token's number; the others stay out of it."""
    return T.Fragment((bt,), forward_thread_fn=lambda t: t, forward_index_fn=lambda t: 0)


def token_vector(bt, n):
    """Each of the first ``bt`` threads holds one token's vector."""
    return T.Fragment((bt, n), forward_thread_fn=lambda t, i: t, forward_index_fn=lambda t, i: i)


def token_matrix(bt, n):
    """Each of the first ``bt`` threads holds one token's matrix."""
    return T.Fragment((bt, n, n), forward_thread_fn=lambda t, i, j: t, forward_index_fn=lambda t, i, j: i * n + j)


@T.macro
def softmax_columns(m, c, bt, n, eps):
    """m [bt,n,n] from logits to the first T_c: their softmax over dimension 1, + eps. c [bt,n] is scratch."""
    T.reduce_max(m, c, dim=1)
    for t, i, j in T.Parallel(bt, n, n):
        m[t, i, j] = T.exp(m[t, i, j] - c[t, j])
    T.reduce_sum(m, c, dim=1)
    for t, j in T.Parallel(bt, n):
        c[t, j] = T.fast_rcp(c[t, j])
    for t, i, j in T.Parallel(bt, n, n):
        m[t, i, j] = m[t, i, j] * c[t, j] + eps


@T.macro
def scale_rows(m, c, r, r_inv, bt, n, eps):
    """T_r: r and 1/r [bt,n] from m [bt,n,n] and c [bt,n]."""
    for t, i in T.Parallel(bt, n):
        r_inv[t, i] *= eps
    for j in T.unroll(n):
        for t, i in T.Parallel(bt, n):
            r_inv[t, i] += m[t, i, j] * c[t, j]
    for t, i in T.Parallel(bt, n):
        r[t, i] = T.fast_rcp(r_inv[t, i])


@T.macro
def scale_columns(m, r, c, c_inv, bt, n, eps):
    """T_c: c and 1/c [bt,n] from m [bt,n,n] and r [bt,n]."""
    for t, j in T.Parallel(bt, n):
        c_inv[t, j] *= eps
    for i in T.unroll(n):
        for t, j in T.Parallel(bt, n):
            c_inv[t, j] += m[t, i, j] * r[t, i]
    for t, j in T.Parallel(bt, n):
        c[t, j] = T.fast_rcp(c_inv[t, j])


def build_fwd(p, cfg):
    n, M = p.n, p.M
    Q = M + 1
    bt = cfg["block_T"]
    rows, weights = rows_of(Q, cfg), ceildiv(M + 3, cfg["threads"]) * cfg["threads"]
    norm_eps, pre_eps, post_mult = p.option("norm_eps"), p.option("pre_eps"), p.option("post_mult")
    iters, eps, rows_first = p.option("iters"), p.option("eps"), p.option("order") == "rows_first"
    S_ = T.dynamic("S")
    T_ = T.dynamic("T")

    @T.prim_func
    def coefficients(
        parts: T.Tensor((S_, Q, T_), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        H_pre: T.Tensor((T_, n), ACC),
        H_post: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        zs: T.Tensor((Q, T_), ACC),
    ):
        with T.Kernel(T.ceildiv(T_, bt), threads=cfg["threads"]) as block:
            t0 = block * bt
            alpha_Q = T.alloc_fragment((weights,), ACC)
            b_Q = T.alloc_fragment((weights,), ACC)
            alpha_s = T.alloc_shared((weights,), ACC)
            b_s = T.alloc_shared((weights,), ACC)
            z_s = T.alloc_shared((rows, bt), ACC)
            r_s = T.alloc_shared((bt,), ACC)
            z = T.alloc_fragment((rows, bt), ACC)
            for q in T.Parallel(weights):
                alpha_Q[q] = alpha[T.min(q, 2)]
            for q in T.Parallel(weights):
                b_Q[q] = b[T.min(q, M - 1)]
            T.clear(z)
            for s in T.serial(S_):
                for q, t in T.Parallel(rows, bt):
                    z[q, t] += parts[s, T.min(q, M), T.min(t0 + t, T_ - 1)]
            for q in T.Parallel(weights):
                alpha_s[q] = alpha_Q[q]
                b_s[q] = b_Q[q]
            for q, t in T.Parallel(rows, bt):
                z_s[q, t] = z[q, t]
                if q < M and t0 + t < T_:
                    zs[q, t0 + t] = z[q, t]
            for t in T.Parallel(bt):
                r_s[t] = T.rsqrt(z_s[M, t] + norm_eps)
                if t0 + t < T_:
                    zs[M, t0 + t] = r_s[t]
            # a row whose norm overflowed has 1/r = 0 and counts as zero, also where z overflowed with it
            for t, i in T.Parallel(bt, n):
                if t0 + t < T_:
                    h = alpha_s[0] * T.if_then_else(r_s[t] > 0, z_s[i, t] * r_s[t], 0.0) + b_s[i]
                    H_pre[t0 + t, i] = sigmoid(h) + pre_eps
            for t, i in T.Parallel(bt, n):
                if t0 + t < T_:
                    h = alpha_s[1] * T.if_then_else(r_s[t] > 0, z_s[n + i, t] * r_s[t], 0.0) + b_s[n + i]
                    H_post[t0 + t, i] = post_mult * sigmoid(h)
            if iters == 0:
                for t, i, j in T.Parallel(bt, n, n):
                    if t0 + t < T_:
                        H_res[t0 + t, i, j] = T.if_then_else(i == j, 1.0, 0.0)
            else:
                m = T.alloc_fragment((bt, n, n), ACC)
                r = T.alloc_fragment((bt, n), ACC)
                c = T.alloc_fragment((bt, n), ACC)
                r_inv = T.alloc_fragment((bt, n), ACC)
                c_inv = T.alloc_fragment((bt, n), ACC)
                T.annotate_layout({m: token_matrix(bt, n), **{v: token_vector(bt, n) for v in (r, c, r_inv, c_inv)}})
                for t, i, j in T.Parallel(bt, n, n):
                    q = 2 * n + (i * n + j if rows_first else j * n + i)
                    m[t, i, j] = alpha_s[2] * T.if_then_else(r_s[t] > 0, z_s[q, t] * r_s[t], 0.0) + b_s[q]
                softmax_columns(m, c, bt, n, eps)
                T.fill(c, 1.0)
                T.fill(c_inv, 1.0)
                T.fill(r_inv, 1.0)
                scale_rows(m, c, r, r_inv, bt, n, eps)
                for _ in T.serial(iters - 1):
                    scale_columns(m, r, c, c_inv, bt, n, eps)
                    scale_rows(m, c, r, r_inv, bt, n, eps)
                for t, i, j in T.Parallel(bt, n, n):
                    if t0 + t < T_:
                        if rows_first:
                            H_res[t0 + t, j, i] = m[t, i, j] * r[t, i] * c[t, j]
                        else:
                            H_res[t0 + t, i, j] = m[t, i, j] * r[t, i] * c[t, j]

    return coefficients


def build_bwd(p, cfg, pre=True):
    """``pre``: with H_pre; without, its rows of dz and its sums are zero (tl_kernels/post_res_coefficients.py)."""
    n, M = p.n, p.M
    Q = M + 1
    bt, splits, threads = cfg["block_T"], cfg["splits"], cfg["threads"]
    rows, gates, weights = rows_of(Q, cfg), rows_of(n, cfg), ceildiv(M + 3, threads) * threads
    post_mult = p.option("post_mult")
    iters, eps, rows_first = p.option("iters"), p.option("eps"), p.option("order") == "rows_first"
    T_ = T.dynamic("T")

    @T.macro
    def backward(s, dH_pre, dH_post, dH_res, zs, alpha, b, dzs, dab):
        alpha_Q = T.alloc_fragment((weights,), ACC)
        b_Q = T.alloc_fragment((weights,), ACC)
        alpha_s = T.alloc_shared((weights,), ACC)
        b_s = T.alloc_shared((weights,), ACC)
        z = T.alloc_fragment((rows, bt), ACC)
        z_s = T.alloc_shared((rows, bt), ACC)
        dpre = T.alloc_fragment((gates, bt), ACC)
        dpost = T.alloc_fragment((gates, bt), ACC)
        # rows as in dab: dalpha 3, then dh; a padded row, because the last sums read it down
        d_s = T.alloc_shared((3 + rows, bt + 1), ACC)
        dab_Q = T.alloc_fragment((weights,), ACC)
        dots = T.alloc_fragment((bt, 3), ACC)
        drinv = T.alloc_fragment((bt,), ACC)
        T.annotate_layout({dots: token_vector(bt, 3), drinv: token_scalar(bt)})
        for q in T.Parallel(weights):
            alpha_Q[q] = alpha[T.min(q, 2)]
        for q in T.Parallel(weights):
            b_Q[q] = b[T.min(q, M - 1)]
        T.clear(dab_Q)
        for k in T.serial(T.ceildiv(T.ceildiv(T_, bt), splits)):
            t0 = (k * splits + s) * bt
            for q, t in T.Parallel(rows, bt):
                z[q, t] = zs[T.min(q, M), T.min(t0 + t, T_ - 1)]
            if pre:
                for i, t in T.Parallel(gates, bt):
                    dpre[i, t] = dH_pre[T.min(t0 + t, T_ - 1), T.min(i, n - 1)]
            for i, t in T.Parallel(gates, bt):
                dpost[i, t] = dH_post[T.min(t0 + t, T_ - 1), T.min(i, n - 1)]
            if iters > 0:
                dm = T.alloc_fragment((bt, n, n), ACC)
                for t, i, j in T.Parallel(bt, n, n):
                    dm[t, i, j] = T.if_then_else(t0 + t < T_, dH_res[t0 + t, j, i] if rows_first else dH_res[t0 + t, i, j], 0.0)
            for q in T.Parallel(weights):
                alpha_s[q] = alpha_Q[q]
                b_s[q] = b_Q[q]
            for q, t in T.Parallel(rows, bt):
                z_s[q, t] = z[q, t]
            # sigmoid' = sigmoid (1 - sigmoid)
            if pre:
                for i, t in T.Parallel(gates, bt):
                    if i < n:
                        h = alpha_s[0] * T.if_then_else(z_s[M, t] > 0, z_s[i, t] * z_s[M, t], 0.0) + b_s[i]
                        d_s[3 + i, t] = T.if_then_else(t0 + t < T_, dpre[i, t], 0.0) * sigmoid(h) * (1.0 - sigmoid(h))
            else:
                for i, t in T.Parallel(gates, bt):
                    if i < n:
                        d_s[3 + i, t] = 0.0
            for i, t in T.Parallel(gates, bt):
                if i < n:
                    h = alpha_s[1] * T.if_then_else(z_s[M, t] > 0, z_s[n + i, t] * z_s[M, t], 0.0) + b_s[n + i]
                    dh = T.if_then_else(t0 + t < T_, post_mult * dpost[i, t], 0.0) * sigmoid(h) * (1.0 - sigmoid(h))
                    d_s[3 + n + i, t] = dh
            if iters == 0:
                for q, t in T.Parallel(n * n, bt):
                    d_s[3 + 2 * n + q, t] = 0.0
            else:
                m = T.alloc_fragment((bt, n, n), ACC)
                prod = T.alloc_fragment((bt, n, n), ACC)
                r = T.alloc_fragment((bt, n), ACC)
                c = T.alloc_fragment((bt, n), ACC)
                r_inv = T.alloc_fragment((bt, n), ACC)
                c_inv = T.alloc_fragment((bt, n), ACC)
                dr = T.alloc_fragment((bt, n), ACC)
                dc = T.alloc_fragment((bt, n), ACC)
                dr_inv = T.alloc_fragment((bt, n), ACC)
                dc_inv = T.alloc_fragment((bt, n), ACC)
                r_s = T.alloc_shared((max(iters - 1, 1), bt, n), ACC)
                c_s = T.alloc_shared((max(iters - 1, 1), bt, n), ACC)
                vectors = (r, c, r_inv, c_inv, dr, dc, dr_inv, dc_inv)
                T.annotate_layout({**{v: token_matrix(bt, n) for v in (m, dm, prod)}, **{v: token_vector(bt, n) for v in vectors}})
                for t, i, j in T.Parallel(bt, n, n):
                    q = 2 * n + (i * n + j if rows_first else j * n + i)
                    m[t, i, j] = alpha_s[2] * T.if_then_else(z_s[M, t] > 0, z_s[q, t] * z_s[M, t], 0.0) + b_s[q]
                softmax_columns(m, c, bt, n, eps)
                for v in (r, c, r_inv, c_inv):
                    T.fill(v, 1.0)
                scale_rows(m, c, r, r_inv, bt, n, eps)
                for it in T.serial(iters - 1):
                    for t, i in T.Parallel(bt, n):
                        r_s[it, t, i] = r[t, i]
                    for t, j in T.Parallel(bt, n):
                        c_s[it, t, j] = c[t, j]
                    scale_columns(m, r, c, c_inv, bt, n, eps)
                    scale_rows(m, c, r, r_inv, bt, n, eps)
                # H = r m c
                for t, i, j in T.Parallel(bt, n, n):
                    prod[t, i, j] = dm[t, i, j] * m[t, i, j] * c[t, j]
                T.reduce_sum(prod, dr, dim=2)
                for t, i, j in T.Parallel(bt, n, n):
                    prod[t, i, j] = dm[t, i, j] * m[t, i, j] * r[t, i]
                T.reduce_sum(prod, dc, dim=1)
                for t, i, j in T.Parallel(bt, n, n):
                    dm[t, i, j] *= r[t, i] * c[t, j]
                T.clear(dr_inv)
                T.clear(dc_inv)
                for back in T.serial(iters):
                    # r = 1/r_inv, r_inv = m c + eps r_inv'
                    for t, i in T.Parallel(bt, n):
                        dr_inv[t, i] = dr_inv[t, i] * eps - dr[t, i] * r[t, i] * r[t, i]
                    for t, i, j in T.Parallel(bt, n, n):
                        dm[t, i, j] += dr_inv[t, i] * c[t, j]
                    if back < iters - 1:
                        for i in T.unroll(n):
                            for t, j in T.Parallel(bt, n):
                                dc[t, j] += m[t, i, j] * dr_inv[t, i]
                        for t, j in T.Parallel(bt, n):
                            dc_inv[t, j] = dc_inv[t, j] * eps - dc[t, j] * c[t, j] * c[t, j]
                        for t, i in T.Parallel(bt, n):
                            r[t, i] = r_s[iters - 2 - back, t, i]
                        for t, j in T.Parallel(bt, n):
                            c[t, j] = c_s[iters - 2 - back, t, j]
                        for t, i, j in T.Parallel(bt, n, n):
                            dm[t, i, j] += r[t, i] * dc_inv[t, j]
                        T.clear(dr)
                        T.clear(dc)
                        for j in T.unroll(n):
                            for t, i in T.Parallel(bt, n):
                                dr[t, i] += m[t, i, j] * dc_inv[t, j]
                # softmax = m - eps: dh = softmax (dm - <dm, softmax>)
                for t, i, j in T.Parallel(bt, n, n):
                    m[t, i, j] -= eps
                for t, i, j in T.Parallel(bt, n, n):
                    prod[t, i, j] = dm[t, i, j] * m[t, i, j]
                T.reduce_sum(prod, dc, dim=1)
                for t, i, j in T.Parallel(bt, n, n):
                    q = 2 * n + (i * n + j if rows_first else j * n + i)
                    d_s[3 + q, t] = m[t, i, j] * (dm[t, i, j] - dc[t, j])
            # dz = dh alpha/r
            for q, t in T.Parallel(rows, bt):
                if q < M and t0 + t < T_:
                    dzs[q, t0 + t] = d_s[3 + q, t] * alpha_s[T.min(q // n, 2)] * z_s[M, t]
            # dalpha = sum dh z/r, d(1/r) = sum alpha dh z; rows whose norm overflowed have no gradient through z
            T.clear(dots)
            for q in T.unroll(M):
                for t in T.Parallel(bt):
                    dots[t, T.min(q // n, 2)] += d_s[3 + q, t] * z_s[q, t]
            T.clear(drinv)
            for g in T.unroll(3):
                for t in T.Parallel(bt):
                    drinv[t] += T.if_then_else(z_s[M, t] > 0, alpha_s[g] * dots[t, g], 0.0)
                    d_s[g, t] = T.if_then_else(z_s[M, t] > 0, dots[t, g] * z_s[M, t], 0.0)
            for t in T.Parallel(bt):
                if t0 + t < T_:
                    dzs[M, t0 + t] = -drinv[t] * z_s[M, t] * z_s[M, t] * z_s[M, t]
            for t in T.unroll(bt):
                for q in T.Parallel(weights):
                    dab_Q[q] += T.if_then_else(q < M + 3, d_s[q, t], 0.0)
        for q in T.Parallel(weights):
            if q < M + 3:
                dab[s, q] = dab_Q[q]

    if not pre:

        @T.prim_func
        def post_res_coefficients_bwd(
            dH_post: T.Tensor((T_, n), ACC),
            dH_res: T.Tensor((T_, n, n), ACC),
            zs: T.Tensor((Q, T_), ACC),
            alpha: T.Tensor((3,), ACC),
            b: T.Tensor((M,), ACC),
            dzs: T.Tensor((Q, T_), ACC),
            dab: T.Tensor((splits, M + 3), ACC),
        ):
            with T.Kernel(splits, threads=threads) as s:
                backward(s, None, dH_post, dH_res, zs, alpha, b, dzs, dab)

        return post_res_coefficients_bwd

    @T.prim_func
    def coefficients_bwd(
        dH_pre: T.Tensor((T_, n), ACC),
        dH_post: T.Tensor((T_, n), ACC),
        dH_res: T.Tensor((T_, n, n), ACC),
        zs: T.Tensor((Q, T_), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        dzs: T.Tensor((Q, T_), ACC),
        dab: T.Tensor((splits, M + 3), ACC),
    ):
        with T.Kernel(splits, threads=threads) as s:
            backward(s, dH_pre, dH_post, dH_res, zs, alpha, b, dzs, dab)

    return coefficients_bwd


def _invalid(p, cfg):
    if cfg["block_T"] % 32 or cfg["threads"] % cfg["block_T"]:
        return f"block_T={cfg['block_T']}, threads={cfg['threads']}: wanted a multiple of 32 tokens, and a multiple of that in threads"
    return None


def _invalid_bwd(p, cfg):
    bt, rows = cfg["block_T"], rows_of(p.M + 1, cfg)
    scalings = 2 * max(p.option("iters") - 1, 1) * p.n
    weights = 2 * ceildiv(p.M + 3, cfg["threads"]) * cfg["threads"]
    kib = ((scalings + rows) * bt + (rows + 3) * (bt + 1) + weights) * 4 / 1024
    if kib > 96:  # what every target from sm_80 on has
        return f"block_T={bt}: {kib:.0f} KiB of shared memory, wanted at most 96"
    return _invalid(p, cfg)


OPTIONS = {"post_mult": 2.0, "iters": 20, "eps": 1e-6, "order": "columns_first"}

coefficients = Kernel(
    name="coefficients",
    build=build_fwd,
    inputs=(Tensor("parts", "S Q T", split=True), Tensor("alpha", "3"), Tensor("b", "M")),
    outputs=(Tensor("H_pre", "T n"), Tensor("H_post", "T n"), Tensor("H_res", "T n n"), Tensor("zs", "Q T")),
    space=lambda p: {"block_T": (32, 64), "threads": (32, 64, 128, 256)},
    default=lambda p: {"block_T": 32, "threads": 128},
    invalid=_invalid,
    reference=reference.coefficients,
    options={"norm_eps": 1e-6, "pre_eps": 1e-6, **OPTIONS},
    pass_configs=lambda cfg: {"tl.enable_fast_math": True},
)

coefficients_bwd = Kernel(
    name="coefficients_bwd",
    build=build_bwd,
    inputs=(
        Tensor("dH_pre", "T n"),
        Tensor("dH_post", "T n"),
        Tensor("dH_res", "T n n"),
        Tensor("zs", "Q T"),
        Tensor("alpha", "3"),
        Tensor("b", "M"),
    ),
    outputs=(Tensor("dzs", "Q T"), Tensor("dab", "S M+3", split=True)),
    space=lambda p: {"block_T": (32, 64), "threads": (32, 64, 128, 256), "splits": (64, 128, 256, 512, 1024)},
    default=lambda p: {"block_T": 32, "threads": 128, "splits": 256},
    invalid=_invalid_bwd,
    reference=reference.coefficients_bwd,
    options=OPTIONS,
    pass_configs=lambda cfg: {"tl.enable_fast_math": True},
)
