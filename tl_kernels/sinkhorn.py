"""Manifold projection, Eq. 19 and 9: M0 = exp(h_res), then ``iters`` times M = T_r(T_c(M)). Forward and backward.

The first T_c is a softmax, so no logit overflows; ``order="rows_first"`` swaps the two by reading and writing the matrix transposed.
The backward recomputes the iterations on chip and keeps only their sums (2 n floats an iteration and token, not 2 n*n): walking back, the
matrix before a normalisation is the one after it times its sums.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.coefficients import token_matrix
from tl_kernels.mma import ACC
from tl_kernels.spec import Kernel, Tensor


def build_fwd(p, cfg):
    n, bt = p.n, cfg["threads"]
    iters, eps, rows_first = p.option("iters"), p.option("eps"), p.option("order") == "rows_first"
    T_ = T.dynamic("T")

    @T.prim_func
    def sinkhorn(h_res: T.Tensor((T_, n, n), ACC), H_res: T.Tensor((T_, n, n), ACC)):
        with T.Kernel(T.ceildiv(T_, bt), threads=bt) as block:
            t0 = block * bt
            m = T.alloc_fragment((bt, n, n), ACC)
            col = T.alloc_fragment((bt, n), ACC)
            row = T.alloc_fragment((bt, n), ACC)
            # sums over rows and columns never leave the thread
            T.annotate_layout({m: token_matrix(bt, n)})
            for t, i, j in T.Parallel(bt, n, n):
                m[t, i, j] = T.if_then_else(t0 + t < T_, h_res[t0 + t, j, i] if rows_first else h_res[t0 + t, i, j], 0.0)
            # softmax over i, the first T_c
            T.reduce_max(m, col, dim=1)
            for t, i, j in T.Parallel(bt, n, n):
                m[t, i, j] = T.exp(m[t, i, j] - col[t, j])
            T.reduce_sum(m, col, dim=1)
            for t, j in T.Parallel(bt, n):
                col[t, j] = 1.0 / col[t, j]
            for t, i, j in T.Parallel(bt, n, n):
                m[t, i, j] = m[t, i, j] * col[t, j] + eps
            for k in T.serial(iters):
                if k > 0:
                    # T_c
                    T.reduce_sum(m, col, dim=1)
                    for t, j in T.Parallel(bt, n):
                        col[t, j] = 1.0 / (col[t, j] + eps)
                    for t, i, j in T.Parallel(bt, n, n):
                        m[t, i, j] *= col[t, j]
                # T_r
                T.reduce_sum(m, row, dim=2)
                for t, i in T.Parallel(bt, n):
                    row[t, i] = 1.0 / (row[t, i] + eps)
                for t, i, j in T.Parallel(bt, n, n):
                    m[t, i, j] *= row[t, i]
            for t, i, j in T.Parallel(bt, n, n):
                if t0 + t < T_:
                    if rows_first:
                        H_res[t0 + t, j, i] = m[t, i, j]
                    else:
                        H_res[t0 + t, i, j] = m[t, i, j]

    return sinkhorn


def build_bwd(p, cfg):
    n, bt = p.n, cfg["threads"]
    iters, eps, rows_first = p.option("iters"), p.option("eps"), p.option("order") == "rows_first"
    T_ = T.dynamic("T")

    @T.prim_func
    def sinkhorn_bwd(dH_res: T.Tensor((T_, n, n), ACC), h_res: T.Tensor((T_, n, n), ACC), dh_res: T.Tensor((T_, n, n), ACC)):
        with T.Kernel(T.ceildiv(T_, bt), threads=bt) as block:
            t0 = block * bt
            softmax = T.alloc_fragment((bt, n, n), ACC)
            m = T.alloc_fragment((bt, n, n), ACC)
            d = T.alloc_fragment((bt, n, n), ACC)
            prod = T.alloc_fragment((bt, n, n), ACC)
            col = T.alloc_fragment((bt, n), ACC)
            row = T.alloc_fragment((bt, n), ACC)
            col_inv = T.alloc_fragment((bt, n), ACC)
            row_inv = T.alloc_fragment((bt, n), ACC)
            col_dot = T.alloc_fragment((bt, n), ACC)
            row_dot = T.alloc_fragment((bt, n), ACC)
            col_sums = T.alloc_shared((iters, bt, n), ACC)
            row_sums = T.alloc_shared((iters, bt, n), ACC)
            T.annotate_layout({m: token_matrix(bt, n)})
            for t, i, j in T.Parallel(bt, n, n):
                m[t, i, j] = T.if_then_else(t0 + t < T_, h_res[t0 + t, j, i] if rows_first else h_res[t0 + t, i, j], 0.0)
            for t, i, j in T.Parallel(bt, n, n):
                d[t, i, j] = T.if_then_else(t0 + t < T_, dH_res[t0 + t, j, i] if rows_first else dH_res[t0 + t, i, j], 0.0)
            T.reduce_max(m, col, dim=1)
            for t, i, j in T.Parallel(bt, n, n):
                softmax[t, i, j] = T.exp(m[t, i, j] - col[t, j])
            T.reduce_sum(softmax, col, dim=1)
            for t, j in T.Parallel(bt, n):
                col[t, j] = 1.0 / col[t, j]
            for t, i, j in T.Parallel(bt, n, n):
                softmax[t, i, j] *= col[t, j]
            for t, i, j in T.Parallel(bt, n, n):
                m[t, i, j] = softmax[t, i, j] + eps
            for k in T.serial(iters):
                if k > 0:
                    T.reduce_sum(m, col, dim=1)
                    for t, j in T.Parallel(bt, n):
                        col[t, j] += eps
                        col_sums[k, t, j] = col[t, j]
                    for t, j in T.Parallel(bt, n):
                        col[t, j] = 1.0 / col[t, j]
                    for t, i, j in T.Parallel(bt, n, n):
                        m[t, i, j] *= col[t, j]
                T.reduce_sum(m, row, dim=2)
                for t, i in T.Parallel(bt, n):
                    row[t, i] += eps
                    row_sums[k, t, i] = row[t, i]
                for t, i in T.Parallel(bt, n):
                    row[t, i] = 1.0 / row[t, i]
                for t, i, j in T.Parallel(bt, n, n):
                    m[t, i, j] *= row[t, i]
            # m' = m / s, s = sum m + eps: dm = (dm' - <dm', m'>) / s and m = m' s
            for back in T.serial(iters):
                k = iters - 1 - back
                for t, i, j in T.Parallel(bt, n, n):
                    prod[t, i, j] = d[t, i, j] * m[t, i, j]
                T.reduce_sum(prod, row_dot, dim=2)
                for t, i in T.Parallel(bt, n):
                    row[t, i] = row_sums[k, t, i]
                    row_inv[t, i] = 1.0 / row[t, i]
                for t, i, j in T.Parallel(bt, n, n):
                    d[t, i, j] = (d[t, i, j] - row_dot[t, i]) * row_inv[t, i]
                    m[t, i, j] *= row[t, i]
                if k > 0:
                    for t, i, j in T.Parallel(bt, n, n):
                        prod[t, i, j] = d[t, i, j] * m[t, i, j]
                    T.reduce_sum(prod, col_dot, dim=1)
                    for t, j in T.Parallel(bt, n):
                        col[t, j] = col_sums[k, t, j]
                        col_inv[t, j] = 1.0 / col[t, j]
                    for t, i, j in T.Parallel(bt, n, n):
                        d[t, i, j] = (d[t, i, j] - col_dot[t, j]) * col_inv[t, j]
                        m[t, i, j] *= col[t, j]
            # softmax: dh = softmax (d - <d, softmax>)
            for t, i, j in T.Parallel(bt, n, n):
                prod[t, i, j] = d[t, i, j] * softmax[t, i, j]
            T.reduce_sum(prod, col_dot, dim=1)
            for t, i, j in T.Parallel(bt, n, n):
                if t0 + t < T_:
                    if rows_first:
                        dh_res[t0 + t, j, i] = softmax[t, i, j] * (d[t, i, j] - col_dot[t, j])
                    else:
                        dh_res[t0 + t, i, j] = softmax[t, i, j] * (d[t, i, j] - col_dot[t, j])

    return sinkhorn_bwd


def _invalid(p, cfg):
    if p.option("iters") < 1:
        return f"iters={p.option('iters')}: wanted at least 1; no mixing is tl_kernels/coefficients.py's"
    return None if cfg["threads"] in SPACE["threads"] else f"threads={cfg['threads']}: wanted one of {SPACE['threads']}"


def _invalid_bwd(p, cfg):
    kib = 2 * p.option("iters") * cfg["threads"] * p.n * 4 / 1024
    if kib > 96:  # what every target from sm_80 on has
        return f"threads={cfg['threads']}: {kib:.0f} KiB of shared memory for the sums, wanted at most 96"
    return _invalid(p, cfg)


SPACE = {"threads": (32, 64, 96, 128, 256)}
OPTIONS = {"iters": 20, "eps": 1e-6, "order": "columns_first"}

sinkhorn = Kernel(
    name="sinkhorn",
    build=build_fwd,
    inputs=(Tensor("h_res", "T n n"),),
    outputs=(Tensor("H_res", "T n n"),),
    space=lambda p: SPACE,
    default=lambda p: {"threads": 32},
    invalid=_invalid,
    reference=lambda h_res, **options: (reference.sinkhorn(h_res, **options),),
    options=OPTIONS,
)

sinkhorn_bwd = Kernel(
    name="sinkhorn_bwd",
    build=build_bwd,
    inputs=(Tensor("dH_res", "T n n"), Tensor("h_res", "T n n")),
    outputs=(Tensor("dh_res", "T n n"),),
    space=lambda p: SPACE,
    default=lambda p: {"threads": 32},
    invalid=_invalid_bwd,
    reference=lambda dH_res, h_res, **options: reference.vjp(reference.sinkhorn, (h_res,), dH_res, **options),
    options=OPTIONS,
)
