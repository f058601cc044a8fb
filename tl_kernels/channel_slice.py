"""A block's slice of the channels, in ``streams_grad`` and ``pre_streams_grad``: phi's part and dphi's stay on chip, dx leaves in rows."""

import tilelang.language as T

from tl_kernels.mma import high, low, mma_dtype, padded


def slice_macros(p, cfg):
    """``column`` and the macros ``stage_phi``, ``write_dx`` and ``write_dphi`` of slice ``block`` of the channels.

    They take its number, not its first channel: of that TileLang could not tell that it lies on 16 bytes where it comes from a variable.
    """
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, mma_dtype(p)
    bt, bc, N, kb, kp = cfg["block_T"], cfg["block_C"], padded(p.M, 16), p.n * cfg["block_C"], dphi_rows(p, cfg)
    width, wide = bc // slices(cfg), slice_columns(p, cfg)

    def column(j, c):
        """Where dz phi has a stream's channel: the warps of the product share the channels, so that each has all streams of its own."""
        return c // width * wide + j * width + c % width

    @T.macro
    def stage_phi(phi, block, phi_hi, phi_lo):
        c0 = block * bc
        for j in T.unroll(n):
            for m, c in T.Parallel(N, bc):
                value = T.if_then_else(m < M and c0 + c < C, phi[T.min(m, M - 1), T.min(j * C + c0 + c, K - 1)], 0.0)
                phi_hi[m, column(j, c)] = high(value, dtype)
                phi_lo[m, column(j, c)] = low(value, dtype)

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

    return column, stage_phi, write_dx, write_dphi


def dphi_rows(p, cfg):
    """Columns of x in a tile, n blocks of channels, padded so that every warp owns 16 rows of dphi; what is past them is never stored."""
    return padded(p.n * cfg["block_C"], cfg["threads"] // 2)


def slices(cfg):
    """Slices of a block's channels: the warps share the tokens, 16 each, those left over the channels."""
    return max(1, cfg["threads"] // 2 // cfg["block_T"])


def slice_columns(p, cfg):
    """Columns of dz phi in a slice, all streams, padded to what tensor cores multiply at a time."""
    return padded(p.n * cfg["block_C"] // slices(cfg), 16)
