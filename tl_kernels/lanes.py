"""Tilings of the programs whose results are sums over a token's channels: a token belongs to the lanes of one warp, or of a few.

Every thread keeps one partial sum a result over all the channels it meets, so a sum costs one register, and one reduction a token.
"""

from math import gcd

import tilelang.language as T

from tl_kernels.sizes import vector_width

#: 32-bit registers of a streaming multiprocessor, the same from sm_80 to sm_120.
REGISTERS = 65536


def lanes_of(p, cfg):
    """Tokens in a block, threads of a token, vectors a thread takes of a stream in one step, channels in a vector.

    A vector is 16 bytes, or less where the rows of C channels are not aligned to that.
    """
    lanes = cfg["threads"] // cfg["block_T"]
    held = cfg["block_C"] // lanes
    width = gcd(p.C, vector_width(p), held)
    return cfg["block_T"], lanes, held // width, width


def min_blocks(cfg):
    """Blocks an SM must have registers for, so that ``warps`` of them are resident; 0 asks for nothing."""
    return cfg["warps"] * 32 // cfg["threads"]


def row_layout(bt, lanes, reps, width):
    """[bt, reps, lanes, width]: neighbouring lanes hold neighbouring vectors, so that a warp reads contiguous bytes."""
    return T.Fragment(
        (bt, reps, lanes, width),
        forward_thread_fn=lambda t, r, lane, k: t * lanes + lane,
        forward_index_fn=lambda t, r, lane, k: r * width + k,
    )


def rows_layout(n, bt, lanes, reps, width):
    """[n, bt, reps, lanes, width]: :func:`row_layout` for each of n streams."""
    return T.Fragment(
        (n, bt, reps, lanes, width),
        forward_thread_fn=lambda i, t, r, lane, k: t * lanes + lane,
        forward_index_fn=lambda i, t, r, lane, k: (i * reps + r) * width + k,
    )


def own_layout(bt, count, lanes):
    """[bt, count, lanes]: ``count`` values that every thread has for itself."""
    return T.Fragment((bt, count, lanes), forward_thread_fn=lambda t, i, lane: t * lanes + lane, forward_index_fn=lambda t, i, lane: i)


def lanes_space(p):
    """Channels a step, threads and tokens a block, warps an SM must have room for (0: as many as the compiler leaves).

    ``reverse`` walks the tokens from the last to the first, because the tail of what the kernel before wrote is still in L2. A kernel timed
    alone, after a flush of L2, cannot tell the two apart, so it is no choice of the search.
    """
    vec = vector_width(p)
    return {
        "block_C": tuple(vec * lanes for lanes in (16, 32, 64, 128, 256)),
        "threads": (32, 64, 128, 256),
        "block_T": (1, 2, 4, 8),
        "warps": (0, 8, 12, 16, 24, 32),
        "reverse": (True,),
    }


def registers(p, cfg, streams, sums):
    """Registers a thread cannot do without: packed vectors of ``streams`` rows, the sums, one float32 row."""
    held = cfg["block_C"] * cfg["block_T"] // cfg["threads"]
    return streams * held * p.itemsize // 4 + sums + held


def room_for(warps):
    """Registers a thread may have with that many warps on an SM; handed out in eights."""
    return min(255, REGISTERS // (32 * max(1, warps)) // 8 * 8)


def lanes_default(p, warps, warps_a_token=1):
    """One vector of each row a thread, one token a block; fewer warps a token where C is too short for them."""
    vec = vector_width(p)
    while warps_a_token > 1 and 64 * vec * warps_a_token > p.C:
        warps_a_token //= 2
    return {"block_C": 32 * vec * warps_a_token, "threads": 32 * warps_a_token, "block_T": 1, "warps": warps, "reverse": True}


def lanes_invalid(p, cfg, streams, sums):
    """Why a tiling cannot work, for a program that holds ``streams`` rows and ``sums`` sums a token."""
    bt, threads, warps, vec = cfg["block_T"], cfg["threads"], cfg["warps"], vector_width(p)
    lanes = threads // max(1, bt)
    if bt < 1 or threads % bt or lanes not in (32, 64, 128, 256, 512) or threads > 512:
        return f"threads={threads}, block_T={bt}: wanted at most 512 threads, a power of two of at least 32 for each token"
    held, rest = divmod(cfg["block_C"], lanes)
    if rest or held not in (vec // 2, vec, 2 * vec, 4 * vec):
        return f"block_C={cfg['block_C']}: wanted 1/2, 1, 2 or 4 vectors of {vec} channels for each of {lanes} threads"
    if cfg["block_C"] >= 2 * p.C and cfg["block_C"] > 32 * vec:
        return f"block_C={cfg['block_C']}: C={p.C} would leave more than half of it empty"
    need, room = registers(p, cfg, streams, sums), room_for(warps)
    if need > room:
        return f"block_C={cfg['block_C']}, threads={threads}, warps={warps}: about {need} registers, and {room} to put them in"
    if warps * 32 % threads:
        return f"warps={warps}: wanted a multiple of the block's {threads // 32}"
    if lanes > 32 and sums * threads * 4 > 48 * 1024:
        return f"threads={threads}: {sums * threads * 4} bytes to add {sums} sums over the warps of a token, wanted at most 48 KiB"
    return None
