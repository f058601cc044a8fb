"""Projection and norm, Eq. 14-15: z = vec(x) phi, 1/r = rsqrt(mean(vec(x)^2) + norm_eps). Forward and backward.

Both multiply on tensor cores without losing fp32 (tl_kernels/mma.py).
The backward makes dx and dphi in one pass over x; dphi is summed per token split, then over splits, so it is bitwise repeatable.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC, high, low, mma_dtype, padded, x_parts
from tl_kernels.sizes import vector_width
from tl_kernels.spec import Kernel, Tensor, too_much_shared


def build_fwd(p, cfg):
    K, M, dtype, mma = p.K, p.M, p.dtype, mma_dtype(p)
    bt, bk = cfg["block_T"], cfg["block_K"]
    N = padded(M, 8)
    direct = dtype == mma == "bfloat16"
    nx = x_parts(p)
    norm_eps = p.option("norm_eps")
    T_ = T.dynamic("T")

    @T.prim_func
    def project(
        x: T.Tensor((T_, K), dtype),
        phi: T.Tensor((M, K), ACC),
        z: T.Tensor((T_, M), ACC),
        rinv: T.Tensor((T_,), ACC),
    ):
        with T.Kernel(T.ceildiv(T_, bt), threads=cfg["threads"]) as block:
            t0 = block * bt
            x_s = T.alloc_shared((bt, bk), dtype)
            phi_s = T.alloc_shared((N, bk), ACC)
            phi_hi = T.alloc_shared((N, bk), mma)
            phi_lo = T.alloc_shared((N, bk), mma)
            z_TN = T.alloc_fragment((bt, N), ACC)
            part = T.alloc_fragment((bt, N), ACC)
            square = T.alloc_fragment((bt, bk), ACC)
            norm = T.alloc_fragment((bt,), ACC)
            T.clear(z_TN)
            T.clear(square)
            for k in T.Pipelined(T.ceildiv(K, bk), num_stages=cfg["stages"]):
                T.copy(x[t0, k * bk], x_s)
                T.copy(phi[0, k * bk], phi_s)
                for i, j in T.Parallel(N, bk):
                    phi_hi[i, j] = high(phi_s[i, j], mma)
                    phi_lo[i, j] = low(phi_s[i, j], mma)
                for i, j in T.Parallel(bt, bk):
                    square[i, j] += T.cast(x_s[i, j], ACC) * T.cast(x_s[i, j], ACC)
                # tensor cores truncate as they accumulate: only one block's sum may grow there
                T.clear(part)
                if direct:
                    T.gemm(x_s, phi_hi, part, transpose_B=True)
                    T.gemm(x_s, phi_lo, part, transpose_B=True)
                else:
                    x_hi = T.alloc_shared((bt, bk), mma)
                    for i, j in T.Parallel(bt, bk):
                        x_hi[i, j] = high(T.cast(x_s[i, j], ACC), mma)
                    T.gemm(x_hi, phi_hi, part, transpose_B=True)
                    T.gemm(x_hi, phi_lo, part, transpose_B=True)
                    if nx == 2:
                        x_lo = T.alloc_shared((bt, bk), mma)
                        for i, j in T.Parallel(bt, bk):
                            x_lo[i, j] = low(T.cast(x_s[i, j], ACC), mma)
                        T.gemm(x_lo, phi_hi, part, transpose_B=True)
                for i, j in T.Parallel(bt, N):
                    z_TN[i, j] += part[i, j]
            T.reduce_sum(square, norm, dim=1)
            for i, j in T.Parallel(bt, N):
                if t0 + i < T_ and j < M:
                    z[t0 + i, j] = z_TN[i, j]
            for i in T.Parallel(bt):
                if t0 + i < T_:
                    rinv[t0 + i] = T.rsqrt(norm[i] / K + norm_eps)

    return project


def build_bwd(p, cfg):
    K, M, dtype, mma = p.K, p.M, p.dtype, mma_dtype(p)
    bt, bk, splits = cfg["block_T"], cfg["block_K"], cfg["splits"]
    N = padded(M, 16)
    direct = dtype == mma == "bfloat16"
    nx = x_parts(p)
    T_ = T.dynamic("T")

    @T.prim_func
    def project_bwd(
        dz: T.Tensor((T_, M), ACC),
        drinv: T.Tensor((T_,), ACC),
        x: T.Tensor((T_, K), dtype),
        phi: T.Tensor((M, K), ACC),
        rinv: T.Tensor((T_,), ACC),
        dx: T.Tensor((T_, K), dtype),
        dphi: T.Tensor((splits, M, K), ACC),
    ):
        with T.Kernel(T.ceildiv(K, bk), splits, threads=cfg["threads"]) as (block, s):
            k0 = block * bk
            x_s = T.alloc_shared((bt, bk), dtype)
            dx_s = T.alloc_shared((bt, bk), dtype)
            dz_hi = T.alloc_shared((bt, N), mma)
            dz_lo = T.alloc_shared((bt, N), mma)
            phi_hi = T.alloc_shared((N, bk), mma)
            phi_lo = T.alloc_shared((N, bk), mma)
            dx_TK = T.alloc_fragment((bt, bk), ACC)
            dphi_KN = T.alloc_fragment((bk, N), ACC)
            for i, j in T.Parallel(N, bk):
                value = T.if_then_else(i < M and k0 + j < K, phi[i, k0 + j], 0.0)
                phi_hi[i, j] = high(value, mma)
                phi_lo[i, j] = low(value, mma)
            T.clear(dphi_KN)
            for tile in T.Pipelined(T.ceildiv(T.ceildiv(T_, bt), splits), num_stages=cfg["stages"]):
                t0 = (tile * splits + s) * bt
                T.copy(x[t0, k0], x_s)
                for i, j in T.Parallel(bt, N):
                    value = T.if_then_else(t0 + i < T_ and j < M, dz[t0 + i, j], 0.0)
                    dz_hi[i, j] = high(value, mma)
                    dz_lo[i, j] = low(value, mma)
                # dx = dz phi - d(1/r)/r^3 x/K
                T.clear(dx_TK)
                T.gemm(dz_hi, phi_hi, dx_TK)
                T.gemm(dz_hi, phi_lo, dx_TK)
                T.gemm(dz_lo, phi_hi, dx_TK)
                # dphi = x^T dz
                if direct:
                    T.gemm(x_s, dz_hi, dphi_KN, transpose_A=True)
                    T.gemm(x_s, dz_lo, dphi_KN, transpose_A=True)
                else:
                    x_hi = T.alloc_shared((bt, bk), mma)
                    for i, j in T.Parallel(bt, bk):
                        x_hi[i, j] = high(T.cast(x_s[i, j], ACC), mma)
                    T.gemm(x_hi, dz_hi, dphi_KN, transpose_A=True)
                    T.gemm(x_hi, dz_lo, dphi_KN, transpose_A=True)
                    if nx == 2:
                        x_lo = T.alloc_shared((bt, bk), mma)
                        for i, j in T.Parallel(bt, bk):
                            x_lo[i, j] = low(T.cast(x_s[i, j], ACC), mma)
                        T.gemm(x_lo, dz_hi, dphi_KN, transpose_A=True)
                for i, j in T.Parallel(bt, bk):
                    t = T.min(t0 + i, T_ - 1)
                    dx_TK[i, j] -= drinv[t] * rinv[t] * rinv[t] * rinv[t] / K * T.cast(x_s[i, j], ACC)
                T.copy(dx_TK, dx_s)
                T.copy(dx_s, dx[t0, k0])
            for j, i in T.Parallel(bk, N):
                if i < M and k0 + j < K:
                    dphi[s, i, k0 + j] = dphi_KN[j, i]

    return project_bwd


def shared_bytes(p, cfg, backward):
    """Shared memory; x and the parts of dz are there once a stage."""
    bt, bk, stages = cfg["block_T"], cfg["block_K"], max(1, cfg["stages"])
    part = 2 if mma_dtype(p) == "bfloat16" else 4
    x_tile = bt * bk * p.itemsize
    x_split = 0 if part == 2 else x_parts(p) * bt * bk * 4
    if backward:
        N = padded(p.M, 16)
        return stages * x_tile + x_tile + x_split + 2 * part * N * (stages * bt + bk)
    N = padded(p.M, 8)
    return stages * (x_tile + N * bk * 4) + x_split + 2 * part * N * bk


def _shared_out(warps, rows, columns):
    """Whether warps can share out a product: each has a multiple of 16 rows and of 8 columns."""
    return any(warps % m == 0 and rows % (16 * m) == 0 and columns % (8 * (warps // m)) == 0 for m in range(1, warps + 1))


def _invalid(p, cfg, backward=False):
    """Why a configuration cannot work, or None. What depends on the architecture is left to the compiler: before Hopper the backward has no
    stages, and on Hopper 256 threads take bf16 parts of dz with a multiple of 32 columns only.
    """
    bt, bk, threads = cfg["block_T"], cfg["block_K"], cfg["threads"]
    if bt % 16 or bk % 16:
        return f"block_T={bt}, block_K={bk}: wanted multiples of 16"
    if not backward and bt // 16 < threads // 32:
        return f"block_T={bt}: {threads // 32} warps need at least 16 tokens each"
    if backward and cfg["stages"] > 1 and p.K % vector_width(p):
        return f"stages={cfg['stages']}: K={p.K} leaves rows off 16 bytes, wanted 0"
    if backward and not _shared_out(threads // 32, bk, padded(p.M, 16)):
        return f"block_K={bk}, threads={threads}: {threads // 32} warps cannot share {bk} x {padded(p.M, 16)} of dphi, 16 x 8 at a time"
    return too_much_shared(shared_bytes(p, cfg, backward))


def _default_block(p):
    """Fits the 99 KiB of shared memory of the smallest supported chips, at n = 8 too."""
    return 64 if p.dtype == "bfloat16" else 32


X = Tensor("x", "T n C", "stream", flat=True)
PHI = Tensor("phi", "M K")

project = Kernel(
    name="project",
    build=build_fwd,
    inputs=(X, PHI),
    outputs=(Tensor("z", "T M"), Tensor("rinv", "T")),
    space=lambda p: {"block_T": (32, 64, 128), "block_K": (32, 64, 128, 256), "threads": (64, 128, 256), "stages": (0, 2, 3, 4)},
    default=lambda p: {"block_T": 64, "block_K": _default_block(p), "threads": 128, "stages": 0},
    invalid=_invalid,
    reference=reference.project,
    options={"norm_eps": 1e-6},
    gpu_only=("threads", "stages"),
)

project_bwd = Kernel(
    name="project_bwd",
    build=build_bwd,
    inputs=(Tensor("dz", "T M"), Tensor("drinv", "T"), X, PHI, Tensor("rinv", "T")),
    outputs=(Tensor("dx", "T n C", "stream", flat=True), Tensor("dphi", "M K", partial=True)),
    space=lambda p: {
        "block_T": (32, 64, 128),
        "block_K": (32, 64, 128),
        "threads": (128, 256),
        "stages": (0, 2),
        "splits": (4, 8, 16),
    },
    default=lambda p: {"block_T": 64, "block_K": _default_block(p), "threads": 128, "stages": 0, "splits": 8},
    invalid=lambda p, cfg: _invalid(p, cfg, backward=True),
    reference=reference.project_bwd,
    gpu_only=("threads", "stages"),
)
