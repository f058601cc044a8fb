"""Where words of a meeting in two steps stand when what a block adds up stands together, for all blocks of its group: places of ``shares``
[G, share] each, and behind all places those of the totals. Used with words of 32 bits (tl_kernels/pre_streams_grad_kept.py) and of 64
(tl_kernels/pairs.py).
"""

import tilelang.language as T

from tl_kernels.meeting import place_of
from tl_kernels.mma import padded


def shares_size(G, groups, words, share, ring):
    """Words of all places, of the sums and of the totals; ``words`` of a block's sums of a tile."""
    return groups * ring * (G + 1) * padded(words, share)


def shares(G, groups, words, share, lanes, ring):
    """Where word w of block r stands, ``partial(g, use, r, w)``; the q-th word that thread e adds up for block s, ``its(g, use, s, q, e)``;
    and a total, ``total(g, use, w)``. A word is added up by ``lanes`` threads, each those of some blocks.
    """
    width = padded(words, share)
    totals = groups * ring * G * width

    def partial(g, use, r, w):
        return place_of(g, use, ring) * (G * width) + w // share * (G * share) + r * share + w % share

    def its(g, use, s, q, e):
        # any where there is none, so that a load has no condition
        row = T.min(T.min(e // share, lanes - 1) + q * lanes, G - 1)
        return partial(g, use, row, T.min(s * share + e % share, words - 1))

    def total(g, use, w):
        return totals + place_of(g, use, ring) * width + w

    return partial, its, total
