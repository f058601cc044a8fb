"""Where the blocks of a group meet: each publishes float32 sums of a tile in global memory and adds up what all have published.

A group is the ``G`` blocks that share tiles of tokens, each with a slice of the channels. A word is a float32 whose lowest mantissa bit
says when it was written (2^-23 of a partial sum, as much as rounding it): it flips each time a place is written anew. A reader loads the
words of all blocks at once and reads again only where a bit is old: publishing needs no fence, waiting no flag, a word is one access.

``scratch`` is zero before the first launch; every launch leaves it so that the next one can go on: a group counts the tiles it ever had in
its first counter, modulo two rounds through the places, and the last block to leave moves it. Two launches with one scratch must not
overlap. Tiles pass through ``ring`` places: where a tile is added up d tiles after the main role worked on it, a block that publishes tile
k + 2d has added up tile k + d, which its peers published after they had added up tile k.

Blocks of a group are neighbours in launch order and groups do not wait for each other, so a launch goes on wherever one group is resident.
"""

import tilelang.language as T

from tl_kernels.mma import ACC
from tl_kernels.sizes import ceildiv, vector_width

#: Threads of each of the two roles beside the main one: a warpgroup.
ROLE = 128
#: How a program whose warps have roles is compiled: without barriers but those written, for TileLang's own know nothing of roles.
PASS_CONFIGS = {"tl.enable_fast_math": True, "tl.disable_warp_specialized": True, "tl.disable_thread_storage_sync": True}


def unserved_by(invalid, default):
    """Of a program whose blocks meet: ``unserved(p)``, why no configuration serves a problem, or None."""

    def unserved(p):
        if p.dtype != "bfloat16" or p.n > 4 or p.C % vector_width(p):
            return f"n={p.n}, C={p.C}, {p.dtype}: wanted at most 4 bfloat16 streams whose rows start on 16 bytes"
        return invalid(p, default(p))

    return unserved


def scratch_size(G, groups, bt, values, ring):
    """32-bit words of scratch: the places, then two counters a group."""
    return groups * ring * G * values * bt + 2 * groups


def tag(use, ring):
    """The lowest bit of a word written at a place's present use."""
    return T.bitwise_xor(T.bitwise_and(use // ring, T.uint32(1)), T.uint32(1))


def tagged(value, use, ring):
    """The word of a float32."""
    return T.bitwise_or(untagged(T.reinterpret(value, "uint32")), tag(use, ring))


def untagged(word):
    return T.bitwise_and(word, T.uint32(0xFFFFFFFE))


def value_of(word):
    """The float32 of a word."""
    return T.reinterpret(untagged(word), ACC)


def place_of(g, use, ring):
    """Which of all places group g's present use of the ring is at."""
    return g * ring + T.cast(use % ring, "int32")


def number_of(ring):
    """``number(epoch, tile)``, of all tiles that a group ever had. One period of tags is added so that it stays positive."""
    return lambda epoch, tile: epoch + T.cast(tile + 2 * ring, "uint32")


def leave_of(G, counters, ring):
    """Macro ``leave``."""

    @T.macro
    def leave(scratch, g, epoch, tiles):
        """By one thread, when the block is done."""
        if T.atomic_add(scratch[counters + 2 * g + 1], T.uint32(1), memory_order="acq_rel", return_prev=True) == T.uint32(G - 1):
            scratch[counters + 2 * g + 1] = T.uint32(0)
            scratch[counters + 2 * g] = (epoch + T.cast(tiles, "uint32")) % T.uint32(2 * ring)

    return leave


def row_of(G, width, ring):
    """``row(g, use, r)``, where the ``width`` words of block r stand."""
    return lambda g, use, r: (place_of(g, use, ring) * G + r) * width


def publish_of(G, width, ring):
    """Macro ``publish``."""
    row = row_of(G, width, ring)

    @T.macro
    def publish(scratch, g, s, use, at, value):
        T.atomic_store(scratch[row(g, use, s) + at], tagged(value, use, ring), memory_order="relaxed")

    return publish


def meeting(G, groups, bt, values, every, ring):
    """How many words a block adds up, padded to whole roles; where the counters stand; and macros ``publish``, ``begin``, ``ask``,
    ``add_up`` and ``write_out`` for tiles of ``bt`` tokens with ``values`` sums each.

    Every block needs the first ``every - 1`` values and the last; of the others each adds up a share and writes it out. ``use`` is the
    tile's number (:func:`number_of`).
    """
    few = every * bt
    share = ceildiv((values - every) * bt, G)
    sums = ceildiv(few + share, ROLE) * ROLE
    width = values * bt
    row = row_of(G, width, ring)

    def place(e, s):
        """Of the e-th word that block s adds up: what every block needs, then its share, then any word, so that a load has no condition.

        With one, nvcc makes each address anew and waits for it: 40 words took 4000 cycles.
        """
        at = e + T.if_then_else(e < few - bt, 0, T.if_then_else(e < few, (values - every) * bt, s * share - bt))
        return T.min(at, width - 1)

    @T.macro
    def begin(s, tokens, at, until):
        """Before the first tile: where the words stand in a row, and up to which token the sums are this block's to write: block 0 writes
        those that every block has, each block its share; the last shares may stick out.
        """
        for e in T.Parallel(sums):
            at[e] = place(e, s)
        for e in T.Parallel(sums):
            its = T.if_then_else(e < few, s == 0, T.And(e < few + share, at[e] < (values - 1) * bt))
            until[e] = T.if_then_else(its, tokens, 0)

    @T.macro
    def ask(scratch, g, use, at, words):
        first = row(g, use, 0)
        for r in T.unroll(G):
            for e in T.Parallel(sums):
                words[r, e] = T.atomic_load(scratch[first + at[e] + r * width], memory_order="relaxed")

    @T.macro
    def add_up(scratch, g, use, at, words, total):
        """``total`` [sums]: the words of all blocks, in the order of the blocks; those that were not there are asked for again."""
        first = row(g, use, 0)
        old = T.alloc_fragment((sums,), "uint32")
        T.clear(old)
        for r in T.unroll(G):
            for e in T.Parallel(sums):
                old[e] = T.bitwise_or(old[e], T.bitwise_xor(words[r, e], tag(use, ring)))
        for e in T.Parallel(sums):
            while T.bitwise_and(old[e], T.uint32(1)) != 0:
                old[e] = T.uint32(0)
                for r in T.unroll(G):
                    words[r, e] = T.atomic_load(scratch[first + at[e] + r * width], memory_order="relaxed")
                    old[e] = T.bitwise_or(old[e], T.bitwise_xor(words[r, e], tag(use, ring)))
        T.clear(total)
        for r in T.unroll(G):
            for e in T.Parallel(sums):
                total[e] += value_of(words[r, e])

    @T.macro
    def write_out(t0, at, until, total, out):
        """``out`` [1, values, T] of the tile that begins at t0."""
        for e in T.Parallel(sums):
            if t0 + at[e] % bt < until[e]:
                out[0, at[e] // bt, t0 + at[e] % bt] = total[e]

    return sums, groups * ring * G * width, publish_of(G, width, ring), begin, ask, add_up, write_out
