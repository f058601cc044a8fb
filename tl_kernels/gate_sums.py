"""The end of the role ``gates`` of ``pre_streams_grad``: the gradients of alpha and b. Those of the other coefficients come as ``dab`` of
``post_res_coefficients_bwd``, a row for each of its splits; the role itself has added up H_pre's.
"""

import tilelang.language as T

from tl_kernels.meeting import ROLE
from tl_kernels.mma import ACC, padded

#: Rows of dab added up at a time.
LANES = 16


def across(p):
    """Columns of dab, so many that each of the role's threads has as many of ``LANES`` rows."""
    return padded(p.M + 3, ROLE // LANES)


def dab_macros(p, cfg, barrier):
    """Macros ``add_rows(s, S2, dab_S, part, parts, dab_f, dab_s)``, of the ``part``-th of ``parts`` of this split's share of dab_S
    [S2, M + 3], to be called for each in turn, and ``write(s, dalpha, db, dab_s, sum_s, dab)``: with dalpha [block_T] and db [n, block_T]
    as the role's threads hold them into dab [splits, M + 3]. ``dab_f`` is a fragment and ``dab_s`` shared memory of [LANES, across],
    ``sum_s`` of [1 or more, n + 1, block_T], ``barrier`` the role's.
    """
    n, L, width, bt, splits = p.n, p.M + 3, across(p), cfg["block_T"], cfg["splits"]

    @T.macro
    def add_rows(s, S2, dab_S, part, parts, dab_f, dab_s):
        if part == 0:
            T.clear(dab_f)
        for k in T.serial(T.ceildiv(T.ceildiv(S2 - s, splits), LANES * parts)):
            for lane, q in T.Parallel(LANES, width):
                at = ((k * parts + part) * LANES + lane) * splits + s
                dab_f[lane, q] += T.if_then_else(at < S2 and q < L, dab_S[T.min(at, S2 - 1), T.min(q, L - 1)], 0.0)
        if part == parts - 1:
            for lane, q in T.Parallel(LANES, width):
                dab_s[lane, q] = dab_f[lane, q]

    @T.macro
    def write(s, dalpha, db, dab_s, sum_s, dab):
        sum_f = T.alloc_fragment((ROLE,), ACC)
        for t in T.Parallel(bt):
            sum_s[0, 0, t] = dalpha[t]
        for j, t in T.Parallel(n, bt):
            sum_s[0, 1 + j, t] = db[j, t]
        T.sync_threads(barrier, ROLE)
        T.clear(sum_f)
        for lane in T.serial(LANES):
            for q in T.Parallel(ROLE):
                sum_f[q] += dab_s[lane, T.min(q, width - 1)]
        for t in T.serial(bt):
            for q in T.Parallel(ROLE):
                its = T.if_then_else(q == 0, 0, T.if_then_else(q >= 3 and q < 3 + n, q - 2, -1))
                sum_f[q] += T.if_then_else(its >= 0, sum_s[0, T.max(its, 0), t], 0.0)
        for q in T.Parallel(ROLE):
            if q < L:
                dab[s, q] = sum_f[q]

    return add_rows, write
