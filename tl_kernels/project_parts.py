"""Projection and norm, Eq. 14-15, in sums over splits of K: rows 0..M-1 of ``parts`` add up to z^T, row M to mean(vec(x)^2).

``project`` without its last step, which ``coefficients`` does: splits let few tokens use the whole GPU. The next tile of x and phi is on
its way (cp.async) while the present one is multiplied; phi hi and lo are the two halves of one operand, so x is read once by the MMA.
bfloat16 streams have a choice of the parts: bf16, which take x as it is, or tf32, which are finer and need x widened.

``overlap`` squares x and splits the next tile of phi while the tensor cores work, with one barrier a tile. phi goes through registers and
both its parts add up in one accumulator: so 256 tokens fit a block at n = 8, which read phi from L2 once.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC, can_stage, high, low, padded, x_parts
from tl_kernels.pieces import pieces
from tl_kernels.sizes import ceildiv, vector_width
from tl_kernels.spec import Kernel, Tensor, too_much_shared

#: Dtype that operands of a kind of MMA are declared with.
OPERANDS = {"bf16": "bfloat16", "tf32": ACC}


def build(p, cfg):
    K, M, dtype, mma = p.K, p.M, p.dtype, OPERANDS[cfg["mma"]]
    bt, bk, splits, stages = cfg["block_T"], cfg["block_K"], cfg["splits"], cfg["stages"]
    per = ceildiv(ceildiv(K, bk), splits)
    direct, nx = dtype == mma, x_parts(p)
    fetch = T.copy if stages == 1 else T.async_copy
    overlap, vec = cfg["overlap"] == 1, vector_width(p)
    N = padded(M, 16 if overlap else 32)
    columns, summed = (N, bk // vec) if overlap else (2 * N, bk)
    rows, wide = pieces(p, bk, cfg["threads"]) if overlap else (M, 1)
    T_ = T.dynamic("T")

    @T.macro
    def load(phi, start, phi_f):
        for m, c, e in T.Parallel(rows, bk // wide, wide):
            inside = m < M and start + c * wide < K
            phi_f[m, c, e] = T.if_then_else(inside, phi[T.min(m, M - 1), start + c * wide + e], 0.0)

    @T.macro
    def split(phi_f, phi_NK, tile):
        for m, c, e in T.Parallel(rows, bk // wide, wide):
            phi_NK[2 * (tile % 2), m, c * wide + e] = high(phi_f[m, c, e], mma)
            phi_NK[2 * (tile % 2) + 1, m, c * wide + e] = low(phi_f[m, c, e], mma)

    # every warpgroup its own tokens, so that x is read once a part; and nobody waits
    product = {"transpose_B": True, "policy": T.GemmWarpPolicy.FullRow, "annotations": {"wg_wait": -1}}

    @T.prim_func
    def project_parts(x: T.Tensor((T_, K), dtype), phi: T.Tensor((M, K), ACC), parts: T.Tensor((splits, M + 1, T_), ACC)):
        with T.Kernel(T.ceildiv(T_, bt), splits, threads=cfg["threads"]) as (block, s):
            t0 = block * bt
            first = s * per * bk
            x_s = T.alloc_shared((stages, bt, bk), dtype)
            if overlap:
                # high and low parts of two tiles; what rows past M hold comes out in columns that nobody reads
                phi_NK = T.alloc_shared((4, N, bk), mma)
                phi_f = T.alloc_fragment((rows, bk // wide, wide), ACC)
                x_f = T.alloc_fragment((bt, bk // vec, vec), dtype)
            else:
                phi_s = T.alloc_shared((stages, M, bk), ACC)
                phi_NK = T.alloc_shared((2 * N, bk), mma)
                z_s = T.alloc_shared((bt, 2 * N), ACC)
            z_TN = T.alloc_fragment((bt, columns), ACC)
            block_TN = T.alloc_fragment((bt, columns), ACC)
            square = T.alloc_fragment((bt, summed), ACC)
            mean = T.alloc_fragment((bt,), ACC)
            T.clear(z_TN)
            T.clear(square)
            if not overlap:
                T.clear(phi_NK)
            for q in T.unroll(stages - 1):
                fetch(x[t0 : t0 + bt, first + q * bk : first + q * bk + bk], x_s[q, :, :])
                if not overlap:
                    fetch(phi[:, first + q * bk : first + q * bk + bk], phi_s[q, :, :])
            if overlap:
                load(phi, first, phi_f)
                split(phi_f, phi_NK, 0)
                load(phi, first + bk, phi_f)
            for k in T.serial(per):
                ahead = first + (k + stages - 1) * bk
                if stages == 1:
                    fetch(x[t0 : t0 + bt, ahead : ahead + bk], x_s[0, :, :])
                    fetch(phi[:, ahead : ahead + bk], phi_s[0, :, :])
                else:
                    if k + stages - 1 <= per:
                        T.ptx_wait_group((1 if overlap else 2) * (stages - 2))
                    else:
                        T.ptx_wait_group(0)
                    if overlap:
                        T.fence_proxy_async()
                    T.sync_threads()
                    if overlap:
                        # the small part first: the sum is truncated at its own size
                        T.gemm(x_s[k % stages, :, :], phi_NK[2 * (k % 2) + 1, :, :], block_TN, clear_accum=True, **product)
                        T.gemm(x_s[k % stages, :, :], phi_NK[2 * (k % 2), :, :], block_TN, **product)
                    if k + stages - 1 < per:
                        fetch(x[t0 : t0 + bt, ahead : ahead + bk], x_s[(k + stages - 1) % stages, :, :])
                        if not overlap:
                            fetch(phi[:, ahead : ahead + bk], phi_s[(k + stages - 1) % stages, :, :])
                if overlap:
                    split(phi_f, phi_NK, k + 1)
                    load(phi, first + (k + 2) * bk, phi_f)
                    for t, g, e in T.Parallel(bt, summed, vec):
                        x_f[t, g, e] = x_s[k % stages, t, g * vec + e]
                    for e in T.unroll(vec):
                        for t, g in T.Parallel(bt, summed):
                            square[t, g] += T.cast(x_f[t, g, e], ACC) * T.cast(x_f[t, g, e], ACC)
                    T.wait_wgmma(0)
                else:
                    for m, c in T.Parallel(M, bk):
                        phi_NK[m, c] = high(phi_s[k % stages, m, c], mma)
                        phi_NK[N + m, c] = low(phi_s[k % stages, m, c], mma)
                    for t, c in T.Parallel(bt, bk):
                        square[t, c] += T.cast(x_s[k % stages, t, c], ACC) * T.cast(x_s[k % stages, t, c], ACC)
                    # tensor cores truncate as they accumulate: only one block's sum may grow there
                    T.clear(block_TN)
                    if direct and nx == 1:
                        T.gemm(x_s[k % stages, :, :], phi_NK, block_TN, transpose_B=True)
                    else:
                        x_hi = T.alloc_shared((bt, bk), mma)
                        for t, c in T.Parallel(bt, bk):
                            x_hi[t, c] = high(T.cast(x_s[k % stages, t, c], ACC), mma)
                        T.gemm(x_hi, phi_NK, block_TN, transpose_B=True)
                        if nx == 2:
                            x_lo = T.alloc_shared((bt, bk), mma)
                            for t, c in T.Parallel(bt, bk):
                                x_lo[t, c] = low(T.cast(x_s[k % stages, t, c], ACC), mma)
                            T.gemm(x_lo, phi_NK, block_TN, transpose_B=True)
                for t, m in T.Parallel(bt, columns):
                    z_TN[t, m] += block_TN[t, m]
            T.reduce_sum(square, mean, dim=1)
            if overlap:
                for t, m in T.Parallel(bt, N):
                    if t0 + t < T_ and m < M:
                        parts[s, m, t0 + t] = z_TN[t, m]
            else:
                T.copy(z_TN, z_s)
                for m, t in T.Parallel(N, bt):
                    if t0 + t < T_ and m < M:
                        parts[s, m, t0 + t] = z_s[t, m] + z_s[t, N + m]
            for t in T.Parallel(bt):
                if t0 + t < T_:
                    parts[s, M, t0 + t] = mean[t] / K

    return project_parts


def shared_bytes(p, cfg):
    """Shared memory."""
    bt, bk, stages = cfg["block_T"], cfg["block_K"], cfg["stages"]
    if cfg["overlap"]:
        return stages * bt * bk * 2 + 4 * padded(p.M, 16) * bk * 2
    part, N = (2 if cfg["mma"] == "bf16" else 4), padded(p.M, 32)
    x_split = 0 if part == 2 else x_parts(p) * bt * bk * 4
    # z takes the room of what is dead by then
    return max(stages * bk * (bt * p.itemsize + p.M * 4) + x_split + 2 * N * bk * part, 2 * N * bt * 4)


def invalid(p, cfg):
    """Why a configuration cannot work, or None."""
    bt, bk, threads = cfg["block_T"], cfg["block_K"], cfg["threads"]
    if cfg["mma"] == "bf16" and p.dtype != "bfloat16":
        return f"mma={cfg['mma']}: wanted tf32 for streams in {p.dtype}"
    if bt % 16 or bk % 16:
        return f"block_T={bt}, block_K={bk}: wanted multiples of 16"
    if cfg["stages"] > 1 and not can_stage(p):
        return f"stages={cfg['stages']}: C={p.C} leaves rows off 16 bytes, wanted 1"
    if cfg["overlap"]:
        if cfg["mma"] != "bf16" or cfg["stages"] == 1:
            return f"overlap={cfg['overlap']}, mma={cfg['mma']}, stages={cfg['stages']}: wanted bf16 and at least 2 stages"
        if threads % 128 or bt % (threads // 2):
            return f"overlap={cfg['overlap']}, block_T={bt}, threads={threads}: wanted 64 tokens, or a multiple, for every 128 threads"
        live = padded(p.M, 16) * (bk + 2 * bt) // threads + 24  # a tile of phi, the two sums, and x a few vectors at a time
        if live > min(255, 65536 // threads):
            return f"overlap={cfg['overlap']}, block_T={bt}, block_K={bk}: {live} live registers a thread would spill"
    elif bt * bk // threads > 128:
        return f"block_T={bt}, block_K={bk}: {bt * bk // threads} squares a thread would spill"
    if cfg["splits"] > ceildiv(p.K, bk):
        return f"splits={cfg['splits']}: wanted at most K/block_K={ceildiv(p.K, bk)}"
    return too_much_shared(shared_bytes(p, cfg))


def default(p):
    """Fits the 99 KiB of shared memory of the smallest supported chips, at n = 8 too."""
    bk = 64 if p.itemsize == 2 and p.n <= 4 else 32
    return {"block_T": 64, "block_K": bk, "splits": min(2, ceildiv(p.K, bk)), "threads": 128, "stages": 1, "mma": kinds(p)[0], "overlap": 0}


def kinds(p):
    """The kinds of MMA that serve a problem, the default first (results/notes.md, third session: error and time of both)."""
    return ("bf16", "tf32") if p.dtype == "bfloat16" else ("tf32",)


project_parts = Kernel(
    name="project_parts",
    build=build,
    inputs=(Tensor("x", "T n C", "stream", flat=True), Tensor("phi", "M K")),
    outputs=(Tensor("parts", "S Q T", split=True),),
    space=lambda p: {
        "block_T": (32, 64, 128, 256),
        "block_K": (32, 64, 128),
        "splits": (1, 2, 4, 8, 16, 32),
        "threads": (128, 256, 512),
        "stages": (1, 2, 3, 4),
        "mma": kinds(p),
        "overlap": (0, 1),
    },
    default=default,
    invalid=invalid,
    seeds=(
        {"block_T": 64, "block_K": 128, "splits": 2, "threads": 128, "stages": 3, "mma": "bf16", "overlap": 1},
        {"block_T": 64, "block_K": 64, "splits": 32, "threads": 128, "stages": 3, "mma": "bf16", "overlap": 0},
        {"block_T": 128, "block_K": 128, "splits": 2, "threads": 256, "stages": 3, "mma": "bf16", "overlap": 1},
        {"block_T": 128, "block_K": 128, "splits": 4, "threads": 256, "stages": 3, "mma": "bf16", "overlap": 1},
        {"block_T": 256, "block_K": 128, "splits": 4, "threads": 256, "stages": 3, "mma": "bf16", "overlap": 1},
        {"block_T": 256, "block_K": 64, "splits": 4, "threads": 512, "stages": 4, "mma": "bf16", "overlap": 1},
    ),
    reference=lambda *inputs: (reference.project_parts(*inputs),),
    # every barrier that it needs is written out; those TileLang adds are two more a tile, because it cannot tell the two tiles of phi apart
    pass_configs=lambda config: {"tl.disable_thread_storage_sync": True} if config["overlap"] else {},
    gpu_only=("threads", "stages", "mma", "overlap"),
)
