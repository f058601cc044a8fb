"""A meeting in two steps (tl_kernels/meeting.py): each block adds up a share of the values of its whole group and publishes the totals, of
which the others read those they need. Many blocks to a group then read G + G words instead of G times G.

Partial sums stand where ``meeting`` has them, totals behind its counters. Both pass through ``ring`` places. Where totals are read e tiles
after the partial sums, and these d after the main role's work: a block that publishes the total of tile k has read those of tile k - e,
which its peers published when they had read those of k - 2e; and one that publishes a partial sum of tile k has read the totals of tile
k - d - e, for which its peers had read every partial sum of that tile.
"""

import tilelang.language as T

from tl_kernels.meeting import ROLE, place_of, publish_of, scratch_size, tag, tagged, untagged, value_of
from tl_kernels.mma import ACC
from tl_kernels.sizes import ceildiv


def relay_size(G, groups, bt, values, ring):
    """32-bit words of scratch: those of a meeting, then the totals."""
    return scratch_size(G, groups, bt, values, ring) + groups * ring * values * bt


def share_of(G, bt, values):
    """Values a block adds up, one to a thread at most."""
    return ceildiv(values * bt, G)


def relay(G, groups, bt, values, every, ring):
    """How many totals every block reads, the first ``every - 1`` values and the last, padded to whole roles; where the counters stand; the
    shape of the words that a block adds up; and macros: ``publish`` as ``meeting`` has it, ``ask`` for these words, ``add_share`` of them,
    asking again for those that were not there, ``ask_totals`` and ``read_totals``. Tiles are numbered as ``meeting`` does.
    """
    width, share = values * bt, share_of(G, bt, values)
    few = every * bt
    read = ceildiv(few, ROLE) * ROLE
    lanes = 1  # threads that share a value, each a run of blocks
    while 2 * lanes * share <= ROLE and lanes < G:
        lanes *= 2
    columns, run = ROLE // lanes, ceildiv(G, lanes)
    totals = scratch_size(G, groups, bt, values, ring)

    def partial(g, use, r, s, v):
        """Of the v-th value of block s as block r published it; any word where there is none, so that a load has no condition."""
        return (place_of(g, use, ring) * G + T.min(r, G - 1)) * width + T.min(s * share + v, width - 1)

    def total(g, use, e):
        at = T.min(e, few - 1)
        return totals + place_of(g, use, ring) * width + at + T.if_then_else(at < few - bt, 0, (values - every) * bt)

    def there(s, v):
        """Whether block s has a v-th value: the last shares may stick out."""
        return T.And(v < share, s * share + v < width)

    @T.macro
    def ask(scratch, g, s, use, words):
        for q in T.unroll(run):
            for lane, v in T.Parallel(lanes, columns):
                words[q, lane, v] = T.atomic_load(scratch[partial(g, use, lane * run + q, s, v)], memory_order="relaxed")

    @T.macro
    def add_share(scratch, g, s, use, t0, tokens, words, out):
        old = T.alloc_fragment((lanes, columns), "uint32")
        some = T.alloc_fragment((lanes, columns), ACC)
        some_s = T.alloc_shared((lanes, columns), ACC)
        T.clear(old)
        for q in T.unroll(run):
            for lane, v in T.Parallel(lanes, columns):
                old[lane, v] = T.bitwise_or(old[lane, v], T.bitwise_xor(words[q, lane, v], tag(use, ring)))
        for lane, v in T.Parallel(lanes, columns):
            while T.bitwise_and(old[lane, v], T.uint32(1)) != 0:
                old[lane, v] = T.uint32(0)
                for q in T.unroll(run):
                    words[q, lane, v] = T.atomic_load(scratch[partial(g, use, lane * run + q, s, v)], memory_order="relaxed")
                    old[lane, v] = T.bitwise_or(old[lane, v], T.bitwise_xor(words[q, lane, v], tag(use, ring)))
        T.clear(some)
        for q in T.unroll(run):
            for lane, v in T.Parallel(lanes, columns):
                if lane * run + q < G:
                    some[lane, v] += value_of(words[q, lane, v])
        for lane, v in T.Parallel(lanes, columns):
            some_s[lane, v] = some[lane, v]
        T.sync_threads(SHARE, ROLE)
        T.clear(some)
        for other in T.unroll(lanes):
            for lane, v in T.Parallel(lanes, columns):
                some[lane, v] += some_s[other, v]
        for lane, v in T.Parallel(lanes, columns):
            if T.And(there(s, v), lane == 0):
                word = tagged(some[lane, v], use, ring)
                T.atomic_store(scratch[totals + place_of(g, use, ring) * width + s * share + v], word, memory_order="relaxed")
        for lane, v in T.Parallel(lanes, columns):
            at = s * share + v
            if T.And(T.And(there(s, v), lane == 0), t0 + at % bt < tokens):
                whole = untagged(T.reinterpret(some[lane, v], "uint32"))  # what the others read
                out[0, at // bt, t0 + at % bt] = T.reinterpret(whole, ACC)

    @T.macro
    def ask_totals(scratch, g, use, word):
        for e in T.Parallel(read):
            word[e] = T.atomic_load(scratch[total(g, use, e)], memory_order="relaxed")

    @T.macro
    def read_totals(scratch, g, use, word, total_s, at):
        for e in T.Parallel(read):
            while T.bitwise_and(T.bitwise_xor(word[e], tag(use, ring)), T.uint32(1)) != 0:
                word[e] = T.atomic_load(scratch[total(g, use, e)], memory_order="relaxed")
        for e in T.Parallel(read):
            if e < few:
                total_s[at, e] = value_of(word[e])

    counters = groups * ring * G * width
    return read, counters, (run, lanes, columns), publish_of(G, width, ring), ask, add_share, ask_totals, read_totals


#: The named barrier of the role that adds up, see tl_kernels/whole.py.
SHARE = 4
