"""A block's slice of the channels, in ``streams_grad`` and ``pre_streams_grad``: phi's part and dphi's stay on chip, dx is summed in the
layout of the product dz phi and leaves in rows.
"""

import tilelang.language as T

from tl_kernels.mma import high, low, mma_dtype, padded


def slice_macros(p, cfg, kp=None):
    """Macros of slice ``block`` of the channels: ``stage_phi``, ``read_rows``, ``add_gradients``, ``add_x``, ``put_back``, ``write_dx`` and
    ``write_dphi``. ``kp``: columns of x in a tile, :func:`dphi_rows` by default.

    They take its number, not its first channel: of that TileLang could not tell that it lies on 16 bytes where it comes from a variable.
    """
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, mma_dtype(p)
    bt, bc, N, kb, kp = cfg["block_T"], cfg["block_C"], padded(p.M, 16), p.n * cfg["block_C"], kp or dphi_rows(p, cfg)
    column = column_of(p, cfg)
    streams = tuple(range(n))  # expanded when traced: layout inference wants the columns of a stream as numbers

    @T.macro
    def stage_phi(phi, block, phi_hi, phi_lo):
        c0 = block * bc
        for j in T.unroll(n):
            for m, c in T.Parallel(N, bc):
                value = T.if_then_else(m < M and c0 + c < C, phi[T.min(m, M - 1), T.min(j * C + c0 + c, K - 1)], 0.0)
                phi_hi[m, column(j, c)] = high(value, dtype)
                phi_lo[m, column(j, c)] = low(value, dtype)

    @T.macro
    def read_rows(st, dy_s, at, du_s, dy_f, du_f):
        for i in T.unroll(n):
            for t, c in T.Parallel(bt, bc):
                dy_f[i, t, c] = dy_s[st, t, i * bc + c]
        for t, c in T.Parallel(bt, bc):
            du_f[t, c] = du_s[at, t, c]

    @T.macro
    def add_gradients(g_TK, st, pre_s, du_f, res_of, dy_f):
        """H_pre du and H_res dy. ``res_of(st, t, i, j)`` is H_res."""
        for j in streams:
            for t, c in T.Parallel(bt, bc):
                g_TK[t, column(j, c)] += pre_s[st, t, j] * du_f[t, c]
        for i in T.unroll(n):
            for j in streams:
                for t, c in T.Parallel(bt, bc):
                    g_TK[t, column(j, c)] += res_of(st, t, i, j) * dy_f[i, t, c]

    @T.macro
    def add_x(g_TK, st, c_of, x_s, x_f):
        """c/K x. ``c_of(st, t)`` is c/K."""
        for j in streams:
            for t, c in T.Parallel(bt, bc):
                x_f[t, c] = x_s[st, t, j * bc + c]
            for t, c in T.Parallel(bt, bc):
                g_TK[t, column(j, c)] += c_of(st, t) * x_f[t, c]

    @T.macro
    def put_back(g_TK, st, dy_s):
        """dx in dy's place, where nobody reads that any more: a thread writes where it read."""
        for j in streams:
            for t, c in T.Parallel(bt, bc):
                dy_s[st, t, j * bc + c] = g_TK[t, column(j, c)]

    @T.macro
    def write_dx(dx, t0, block, tokens, dx_s, st):
        c0 = block * bc
        if C % bc == 0 and t0 + bt <= tokens:  # stores without tests, so that the loads before them go out at once
            for t, k in T.Parallel(bt, kb):
                dx[t0 + t, k // bc, c0 + k % bc] = dx_s[st, t, k]
        else:
            for t, k in T.Parallel(bt, kb):
                if t0 + t < tokens and c0 + k % bc < C:
                    dx[t0 + t, k // bc, c0 + k % bc] = dx_s[st, t, k]

    @T.macro
    def write_dphi(dphi, s, block, dphi_KN):
        c0 = block * bc
        for k, m in T.Parallel(kp, N):
            if m < M and k < kb and c0 + k % bc < C:
                dphi[s, m, k // bc * C + c0 + k % bc] = dphi_KN[k, m]

    return stage_phi, read_rows, add_gradients, add_x, put_back, write_dx, write_dphi


def column_of(p, cfg):
    """``column(j, c)``, where dz phi has a stream's channel: the warps of the product share the channels, so that each has all streams of
    its own.
    """
    width, wide = cfg["block_C"] // slices(cfg), slice_columns(p, cfg)
    return lambda j, c: c // width * wide + j * width + c % width


def dphi_rows(p, cfg):
    """Columns of x in a tile, n blocks of channels, padded so that every warp owns 16 rows of dphi; what is past them is never stored."""
    return padded(p.n * cfg["block_C"], cfg["threads"] // 2)


def slices(cfg):
    """Slices of a block's channels: the warps share the tokens, 16 each, those left over the channels."""
    return max(1, cfg["threads"] // 2 // cfg["block_T"])


def slice_columns(p, cfg):
    """Columns of dz phi in a slice, all streams, padded to what tensor cores multiply at a time."""
    return padded(p.n * cfg["block_C"] // slices(cfg), 16)
