"""The meeting in two steps (tl_kernels/relay.py) with words of 64 bits, two sums each: neighbouring tokens' of one value, as a thread has
them of wgmma. L2 works in sectors of 32 bytes, and beside a tile of the streams words of 32 bits are a sixth to a third of those.

A word's tag is the lowest bit of its first sum. What a block adds up is whole sectors (tl_kernels/shares.py). The mean squares, which the
main role has a token at a time, are words with one sum.
"""

import tilelang.language as T

from tl_kernels.meeting import ROLE, tag, tagged, value_of
from tl_kernels.mma import ACC
from tl_kernels.relay import SHARE
from tl_kernels.shares import shares, shares_size
from tl_kernels.sizes import ceildiv

#: Words in a sector of L2.
SECTOR = 4


def share_of(G, bt, M):
    """Words a block adds up, whole sectors; the last blocks may have none."""
    return ceildiv(ceildiv(M * bt // 2 + bt, G), SECTOR) * SECTOR


def lanes_of(G, bt, M):
    """Threads that share a word, each with some of the blocks. What they exchange fits beside seven tiles of 32 tokens."""
    share, room = share_of(G, bt, M), 2 * ROLE if bt <= 16 else ROLE + ROLE // 2
    return min(G, ROLE // share, 1 + room // (2 * share))


def exchanged(G, bt, M):
    """Floats in shared memory: what all lanes but the first give to that."""
    return 2 * max(1, lanes_of(G, bt, M) - 1) * share_of(G, bt, M)


def pairs_size(G, groups, bt, M, ring):
    """32-bit words of scratch: the sums of every block and the totals, then two counters a group."""
    return 2 * shares_size(G, groups, M * bt // 2 + bt, share_of(G, bt, M), ring) + 2 * groups


def pairs(G, groups, bt, M, n, ring):
    """How many words of totals every block reads, those of the first ``n`` values and the mean squares, padded to whole roles; where the
    counters stand; the shape of the words that a block adds up; and macros as those of ``relay``, with ``publish_sums`` of z's even and odd
    tokens and ``publish_mean`` of a token's mean square. ``words`` is the scratch as words of 64 bits.
    """
    half, share = bt // 2, share_of(G, bt, M)
    used = M * half + bt
    few = n * half + bt
    read = ceildiv(few, ROLE) * ROLE
    lanes = lanes_of(G, bt, M)
    run = ceildiv(G, lanes)
    counters = 2 * shares_size(G, groups, used, share, ring)
    partial, its, total = shares(G, groups, used, share, lanes, ring)

    def needed(e):
        at = T.min(e, few - 1)
        return at + T.if_then_else(at < n * half, 0, (M - n) * half)

    def first(word):
        return value_of(T.cast(word, "uint32"))

    def second(word):
        return T.reinterpret(T.cast(T.shift_right(word, T.uint64(32)), "uint32"), ACC)

    def alone(a, use):
        return T.cast(tagged(a, use, ring), "uint64")

    def both(a, b, use):
        return T.bitwise_or(T.shift_left(T.cast(T.reinterpret(b, "uint32"), "uint64"), T.uint64(32)), alone(a, use))

    def stale(word, use):
        return T.bitwise_and(T.bitwise_xor(T.cast(word, "uint32"), tag(use, ring)), T.uint32(1))

    @T.macro
    def publish_sums(words, g, s, use, even, odd):
        for m, t in T.Parallel(even.shape[0], half):
            if m < M:
                T.atomic_store(words[partial(g, use, s, m * half + t)], both(even[m, t], odd[m, t], use), memory_order="relaxed")

    @T.macro
    def publish_mean(words, g, s, use, t, value):
        T.atomic_store(words[partial(g, use, s, M * half + t)], alone(value, use), memory_order="relaxed")

    @T.macro
    def ask(words, g, s, use, mine):
        for q in T.unroll(run):
            for e in T.Parallel(ROLE):
                mine[q, e] = T.atomic_load(words[its(g, use, s, q, e)], memory_order="relaxed")

    @T.macro
    def add_share(words, g, s, use, t0, tokens, mine, out):
        old = T.alloc_fragment((ROLE,), "uint32")
        low = T.alloc_fragment((ROLE,), ACC)
        high = T.alloc_fragment((ROLE,), ACC)
        others_s = T.alloc_shared((2, max(1, lanes - 1), share), ACC)
        T.clear(old)
        for q in T.unroll(run):
            for e in T.Parallel(ROLE):
                old[e] = T.bitwise_or(old[e], stale(mine[q, e], use))
        for e in T.Parallel(ROLE):
            while old[e] != 0:
                old[e] = T.uint32(0)
                for q in T.unroll(run):
                    mine[q, e] = T.atomic_load(words[its(g, use, s, q, e)], memory_order="relaxed")
                    old[e] = T.bitwise_or(old[e], stale(mine[q, e], use))
        T.clear(low)
        T.clear(high)
        for q in T.unroll(run):
            for e in T.Parallel(ROLE):
                if e // share + q * lanes < G:
                    low[e] += first(mine[q, e])
                    high[e] += second(mine[q, e])
        for e in T.Parallel(ROLE):
            if T.And(e >= share, e < lanes * share):
                others_s[0, e // share - 1, e % share] = low[e]
        for e in T.Parallel(ROLE):
            if T.And(e >= share, e < lanes * share):
                others_s[1, e // share - 1, e % share] = high[e]
        T.sync_threads(SHARE, ROLE)
        for e in T.Parallel(ROLE):
            w = s * share + e
            if T.And(e < share, w < used):
                for lane in T.unroll(lanes - 1):
                    low[e] += others_s[0, lane, e]
                    high[e] += others_s[1, lane, e]
                T.atomic_store(words[total(g, use, w)], both(low[e], high[e], use), memory_order="relaxed")
                low[e] = first(both(low[e], high[e], use))  # what the others read
                t = t0 + T.if_then_else(w < M * half, w % half * 2, w - M * half)
                if t < tokens:
                    out[0, T.min(w // half, M), t] = low[e]
                if T.And(w < M * half, t + 1 < tokens):
                    out[0, w // half, t + 1] = high[e]

    @T.macro
    def ask_totals(words, g, use, word):
        for e in T.Parallel(read):
            word[e] = T.atomic_load(words[total(g, use, needed(e))], memory_order="relaxed")

    @T.macro
    def read_totals(words, g, use, word, total_s, at):
        for e in T.Parallel(read):
            while stale(word[e], use) != 0:
                word[e] = T.atomic_load(words[total(g, use, needed(e))], memory_order="relaxed")
        for e in T.Parallel(read):
            if e < n * half:
                total_s[at, 2 * e] = first(word[e])
                total_s[at, 2 * e + 1] = second(word[e])
            elif e < few:
                total_s[at, n * half + e] = first(word[e])

    return read, counters, (run, ROLE), publish_sums, publish_mean, ask, add_share, ask_totals, read_totals
