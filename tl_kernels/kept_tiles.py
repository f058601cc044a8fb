"""Where the tiles of ``pre_streams_grad`` stand that keeps rows on chip (tl_kernels/pre_streams_grad_kept.py), how much room they take, and
the rules of a configuration.
"""

from tl_kernels.channel_slice import slices
from tl_kernels.gate_sums import LANES, across
from tl_kernels.meeting import ROLE
from tl_kernels.mma import padded
from tl_kernels.shares import shares_size
from tl_kernels.sizes import ceildiv
from tl_kernels.spec import too_much_shared

WARP = 32
#: Places of the small tensors: two tiles are on their way while one is used.
SMALL = 3
#: Lanes that share a word, each with some of the blocks.
MOST_LANES = 16


def steps_of(cfg):
    """Tiles between a tile's arrival and the sums of a share, the totals, and dx."""
    summed = 1 + (cfg["lag"] > 3)
    return summed, cfg["lag"] - 1, cfg["lag"]


def columns_of(p, cfg):
    """Columns of x in a tile, padded to the 64 that a warpgroup multiplies at a time; what is past n blocks is never stored."""
    return padded(p.n * cfg["block_C"], 64)


def share_of(p, cfg):
    """Sums of a tile that a block adds up; the last blocks may have none."""
    return ceildiv(p.n * cfg["block_T"], ceildiv(p.C, cfg["block_C"]))


def lanes_of(p, cfg):
    """Threads of a warp that add up a word of the share, each the words of some blocks."""
    return min(ceildiv(p.C, cfg["block_C"]), WARP // share_of(p, cfg), MOST_LANES)


def ring_of(cfg):
    """Places that tiles pass through in scratch. A block publishes tile k when it has the totals of tile k - 1 - totalled, whose blocks had
    added up their shares by then; and totals of tile k when all have published tile k.
    """
    return cfg["lag"] + 1


def scratch_of_kept(p, cfg):
    """32-bit words of scratch: the sums of every block and the totals, then two counters a group."""
    G = ceildiv(p.C, cfg["block_C"])
    return shares_size(G, cfg["splits"], p.n * cfg["block_T"], share_of(p, cfg), ring_of(cfg)) + 2 * cfg["splits"]


def shared_bytes_of_kept(p, cfg):
    """Shared memory, an upper bound."""
    n, M, bt, bc, lag, ahead = p.n, p.M, cfg["block_T"], cfg["block_C"], cfg["lag"], cfg["ahead"]
    rows = (lag + ahead + 1) * bt * (columns_of(p, cfg) + bc) * 2
    staged = cfg["turns"] * bt * n * bc * 2 + SMALL * bt * 4 * (n * n + n + n + M + 2)
    products = 2 * bt * 2 * (padded(M, 16) + padded(2 * M, 16))
    sums = 4 * (bt * n + ROLE * n + lanes_of(p, cfg) * share_of(p, cfg) + LANES * across(p) + (n + 1) * bt)
    return rows + staged + products + sums + 1024  # for the barriers


def invalid_kept(p, cfg):
    """Why a configuration that keeps rows on chip cannot work, or None."""
    bt, bc, threads, lag, ahead = (cfg[k] for k in ("block_T", "block_C", "threads", "lag", "ahead"))
    if bt != 32 or threads != 256:
        return f"keep=1, block_T={bt}, threads={threads}: wanted 32 tokens and 256 threads, for which there are registers"
    if lag < 3 or ahead < 1 or not 1 < cfg["turns"] <= lag + 1:
        return f"keep=1, lag={lag}, ahead={ahead}, turns={cfg['turns']}: wanted lag from 3, turns from 2 on and at most lag + 1"
    if bc % (8 * slices(cfg)) or p.n * bc > 256:
        return f"keep=1, block_C={bc}: wanted a multiple of {8 * slices(cfg)} channels, at most {256 // p.n}"
    if share_of(p, cfg) > WARP:
        return f"keep=1, block_C={bc}: {ceildiv(p.C, bc)} blocks to a group, wanted so many that each adds up at most {WARP} sums"
    if ceildiv(p.C, bc) * cfg["splits"] > 256:
        return f"splits={cfg['splits']}: {ceildiv(p.C, bc) * cfg['splits']} blocks, wanted about as many as there are multiprocessors"
    return too_much_shared(shared_bytes_of_kept(p, cfg))
