"""Tilings that several programs share: one token's row cut into channel blocks."""

import tilelang.language as T

from tl_kernels.sizes import ceildiv, vector_width

THREADS = (32, 64, 80, 96, 128, 160, 192, 256, 320, 512)


def channel_blocks(p, cfg):
    """Channels in a block, and how many blocks make a row."""
    return cfg["block_C"], ceildiv(p.C, cfg["block_C"])


def row_space(p, reduces=False, largest=4096):
    """Channel block and threads: blocks that divide C, and powers of two, however few channels there are."""
    vec = vector_width(p)
    blocks = {b for b in range(32 * vec, largest + 1, 8 * vec) if p.C % b == 0}
    blocks |= {1 << k for k in range(5, 13) if vec <= 1 << k <= largest and (1 << k) < max(2 * p.C, row_min(p) + 1)}
    return {"block_C": tuple(sorted(blocks)), "threads": tuple(t for t in THREADS if not reduces or t & (t - 1) == 0)}


def row_default(p, block_C, reduces=False):
    """The largest block of at most ``block_C`` that wastes little of its last copy, with one 16-byte vector a thread."""
    vec = vector_width(p)
    low = min(block_C, row_min(p))
    blocks = [b for b in row_space(p)["block_C"] if low <= b <= block_C]
    if reduces:  # a power of two of threads
        blocks = [b for b in blocks if b & (b - 1) == 0]
    frugal = [b for b in blocks if ceildiv(p.C, b) * b <= 1.07 * p.C]
    block = (frugal or [low])[-1]
    return {"block_C": block, "threads": max(32, block // vec)}


def row_invalid(p, cfg, reduces=False, live=0):
    """Why a row tiling cannot work. ``live`` is how many fp32 rows of the block the program keeps in registers."""
    vec, bc, threads = vector_width(p), cfg["block_C"], cfg["threads"]
    if threads % 16 or not 32 <= threads <= 1024:
        return f"threads={threads}: wanted a multiple of 16 in 32..1024"
    if reduces and threads & (threads - 1):
        return f"threads={threads}: a reduction over threads needs a power of two"
    if bc % threads and threads % bc:
        return f"block_C={bc} and threads={threads}: neither divides the other"
    if bc < threads * vec // 2:
        return f"block_C={bc}: less than half a 16-byte access for each of {threads} threads"
    if bc // threads * live > 512:
        return f"block_C={bc}, threads={threads}: {bc // threads * live} live registers a thread would spill"
    if bc >= 2 * p.C and bc > row_min(p):
        return f"block_C={bc}: C={p.C} would leave more than half of it empty"
    return None


def row_min(p):
    """One 16-byte access for each lane of a warp."""
    return 32 * vector_width(p)


def everywhere(size, threads):
    """Layout of a small vector that every thread holds whole, as a reduction over threads leaves it."""
    return T.Fragment((size,), forward_fn=lambda i, rep: (rep, i), replicate=threads)
