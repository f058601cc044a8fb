"""Second stage of the weight gradients: sums over splits, in the order of the splits, so that they are bitwise repeatable.

One launch: the first block of row 0 of the grid sums dab, each block of another row a stretch of one row of dphi.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC
from tl_kernels.sizes import ceildiv
from tl_kernels.spec import Kernel, Tensor

#: Splits of dab summed beside each other, then among themselves: there are more of them than of dphi.
LANES = 32


def build(p, cfg):
    K, M = p.K, p.M
    bk, threads = cfg["block_K"], cfg["threads"]
    L = M + 3
    width = ceildiv(L, max(1, threads // LANES)) * max(1, threads // LANES)
    padded = ceildiv(L, threads) * threads
    S_ = T.dynamic("S")
    S2_ = T.dynamic("S2")

    @T.prim_func
    def sum_parts(
        dphi_S: T.Tensor((S_, M, K), ACC),
        dab: T.Tensor((S2_, L), ACC),
        dphi: T.Tensor((M, K), ACC),
        dalpha: T.Tensor((3,), ACC),
        db: T.Tensor((M,), ACC),
    ):
        with T.Kernel(T.ceildiv(K, bk), M + 1, threads=threads) as (block, row):
            total = T.alloc_fragment((bk,), ACC)
            part = T.alloc_fragment((LANES, width), ACC)
            part_s = T.alloc_shared((LANES, width), ACC)
            value = T.alloc_fragment((padded,), ACC)
            if row > 0:
                T.clear(total)
                for s in T.serial(S_):
                    for k in T.Parallel(bk):
                        if block * bk + k < K:
                            total[k] += dphi_S[s, row - 1, block * bk + k]
                for k in T.Parallel(bk):
                    if block * bk + k < K:
                        dphi[row - 1, block * bk + k] = total[k]
            if row == 0 and block == 0:
                T.clear(part)
                for s in T.serial(T.ceildiv(S2_, LANES)):
                    for i, q in T.Parallel(LANES, width):
                        part[i, q] += T.if_then_else(q < L and s * LANES + i < S2_, dab[s * LANES + i, q], 0.0)
                for i, q in T.Parallel(LANES, width):
                    part_s[i, q] = part[i, q]
                T.clear(value)
                for i in T.serial(LANES):
                    for q in T.Parallel(padded):
                        value[q] += T.if_then_else(q < L, part_s[i, q], 0.0)
                for q in T.Parallel(padded):
                    if q < 3:
                        dalpha[q] = value[q]
                for q in T.Parallel(padded):
                    if q >= 3 and q < L:
                        db[q - 3] = value[q]

    return sum_parts


def _invalid(p, cfg):
    if cfg["threads"] % 32 or cfg["block_K"] % cfg["threads"]:
        return f"block_K={cfg['block_K']}, threads={cfg['threads']}: wanted whole warps, and channels for each thread"
    return None


sum_parts = Kernel(
    name="sum_parts",
    build=build,
    inputs=(Tensor("dphi", "S M K", split=True), Tensor("dab", "S2 M+3", split=True)),
    outputs=(Tensor("dphi", "M K"), Tensor("dalpha", "3"), Tensor("db", "M")),
    space=lambda p: {"block_K": (128, 256, 512, 1024, 2048), "threads": (32, 64, 128, 256)},
    default=lambda p: {"block_K": 512, "threads": 256},
    invalid=_invalid,
    reference=reference.sum_parts,
)
