"""What the programs that keep a token's row on chip share: the tile of a block and the rules of a configuration.

A token's row and its share of phi do not fit one block, so a group of ``ceildiv(C, block_C)`` blocks shares every tile of tokens, a slice
of the channels and of phi each, and meets in global memory (tl_kernels/meeting.py): with ``levels: 2`` in two steps (tl_kernels/relay.py),
with ``word: 8`` also in words of two sums (tl_kernels/pairs.py).
The warps of a block have three or four ``roles``, each at another tile (tl_kernels/roles.py): ``ahead`` tiles are on their way while one is
worked on, and those whose H_pre is not known yet wait on chip.

Words of the peers are asked for right after they were published, when a peer that is a little behind has not published them yet, and then
again. With ``slack`` 1 they are asked for a tile later, with 2 the totals of ``levels: 2`` too, for room on chip.
"""

from functools import partial

import tilelang.language as T

from tl_kernels.meeting import PASS_CONFIGS, ROLE, scratch_size, unserved_by
from tl_kernels.mma import padded
from tl_kernels.pairs import exchanged, pairs_size
from tl_kernels.relay import relay_size, share_of
from tl_kernels.sizes import ceildiv, vector_width
from tl_kernels.spec import Kernel, too_much_shared

#: Blocks of a group wait for each other, so all of them must fit the GPU at once: a little less than the 78 multiprocessors of an H20.
MOST_BLOCKS = 72


def group_of(p, cfg):
    """Blocks that share a tile."""
    return ceildiv(p.C, cfg["block_C"])


def part_of(p, cfg, threads=None):
    """Tokens that ``threads``, the main role's by default, work on at a time: 16 bytes of a stream a thread."""
    return (threads or cfg["threads"]) * vector_width(p) // cfg["block_C"]


def givers(cfg):
    """Threads of the role that gives, where there is one."""
    return ROLE if cfg["roles"] == 4 else 0


def threads_of(cfg):
    """Threads of a block: main's, give's, the product's and the sums'."""
    return cfg["threads"] + givers(cfg) + 2 * ROLE


def read_after(cfg):
    """Tiles between the main role's work on the streams and the sums of the same tile; with two levels, and the totals."""
    sums = 2 + (cfg["slack"] > 0)
    return sums, (sums + 1 + (cfg["slack"] > 1) if cfg["levels"] == 2 else sums)


def ring_of(cfg):
    """Places that tiles pass through in scratch; few, so that a word is written anew before L2 gives it to memory.

    A mean is published with the main role's work on tile k, when the sums have done tile k - 1 - d (:func:`read_after`). Their peers had
    published that tile's z, in iteration k - d, when their own sums had done tile k - 1 - 2 d: the last that any block may still have to
    read. With two levels a block may add up means alone, which come an iteration earlier.
    """
    return 2 * read_after(cfg)[0] + cfg["levels"]


def lag_of(cfg):
    """Tiles between the main role's work on the streams and its u of the same tile: H_pre is made when its sums are all there."""
    return read_after(cfg)[1] + 2


def scratch_of(p, cfg):
    """32-bit words of scratch."""
    if cfg["word"] == 8:
        return pairs_size(group_of(p, cfg), cfg["groups"], cfg["block_T"], p.M, ring_of(cfg))
    size = relay_size if cfg["levels"] == 2 else scratch_size
    return size(group_of(p, cfg), cfg["groups"], cfg["block_T"], p.M + 1, ring_of(cfg))


def buffers_of(p, cfg):
    """Tiles of the streams on chip: a tile is asked for when u of the one in its place is made, or ``early``, before, into a place more.
    phi passes through those not in use yet.
    """
    return cfg["ahead"] + max(lag_of(cfg) + (cfg["early"] > 0), 1 + ceildiv(2 * p.M, cfg["block_T"]))


def row_layouts(p, cfg, of):
    """[part, block_C] and ``of`` of it over the main role: every thread 16 bytes of each row, neighbours beside each other."""
    bc, threads, vec, part = cfg["block_C"], cfg["threads"], vector_width(p), part_of(p, cfg)

    def thread(t, c):
        return (t * bc + c) // vec % threads

    return (
        T.Fragment((part, bc), forward_thread_fn=thread, forward_index_fn=lambda t, c: c % vec),
        T.Fragment((of, part, bc), forward_thread_fn=lambda j, t, c: thread(t, c), forward_index_fn=lambda j, t, c: j * vec + c % vec),
    )


def phi_registers(p, cfg):
    """Registers a thread of the product for its slice of phi, high and low. From shared memory phi would be read again for every tile."""
    return 2 * padded(p.M, 32) * p.n * cfg["block_C"] // (2 * ROLE)


def registers_of(p, cfg):
    """Registers a thread of each role, with whether that is more than it begins with; together as many as those. Of three roles main keeps
    what it begins with. None where all do.

    The product takes what the sums can spare, so many that its multiplications follow each other: with fewer, nvcc makes each wait for the
    one before (C7512), four times as long. 32 tokens take eight accumulators more than 16, and room to overlap them.
    """
    wide, many = cfg["block_T"] > 16, cfg["threads"] > ROLE
    if cfg["roles"] == 4:
        product, sums, main, give = ((184, 56, 88, 64) if wide else (168, 64, 88, 72)) if many else (200, 96, 112, 104)
        counts = {"product": product, "sums": sums, "main": main, "give": give}
    elif phi_registers(p, cfg) <= 64 or not (wide or many):
        return None
    else:
        product, sums = ((184, 72) if wide else (168, 88)) if many else (216, 120)
        counts = {"product": product, "sums": sums}
    begin = 65536 // threads_of(cfg) // 8 * 8
    return {role: (count, int(count > begin)) for role, count in counts.items()}


def most_words(p, cfg):
    """Words that a thread of the sums can hold."""
    registers = registers_of(p, cfg)
    return min(90, registers["sums"][0] - 28) if registers else 90


def shared_bytes(p, cfg, mixes):
    """Shared memory; ``mixes``: whether tiles of f, H_post and H_res stand beside those of the streams."""
    bt, kb, staged = cfg["block_T"], p.n * cfg["block_C"], cfg["ahead"] + 1
    beside = staged * bt * (cfg["block_C"] * p.itemsize + 4 * (p.n + p.n * p.n)) if mixes else 0
    exchange = 0 if cfg["levels"] == 1 else ROLE if cfg["word"] == 4 else exchanged(group_of(p, cfg), bt, p.M)
    sums = 2 * bt * (p.n + 1) + 2 * bt * p.n + exchange
    return buffers_of(p, cfg) * bt * kb * p.itemsize + beside + 4 * sums


def invalid(p, cfg, mixes=True):
    """Why a configuration cannot work, or None. ``mixes``: see :func:`shared_bytes`."""
    bt, bc, threads = cfg["block_T"], cfg["block_C"], cfg["threads"]
    G, part = group_of(p, cfg), part_of(p, cfg)
    if bt not in SPACE["block_T"] or bc not in SPACE["block_C"]:
        return f"block_T={bt}, block_C={bc}: wanted {SPACE['block_T']} tokens and {SPACE['block_C']} channels"
    if threads % 128 or bt % max(1, part):
        return f"threads={threads}: wanted a multiple of 128 that works on a divisor of block_T={bt} tokens at a time, not {part}"
    if G > MOST_BLOCKS:
        return f"C={p.C}, block_C={bc}: {G} blocks to a group, wanted at most {MOST_BLOCKS}, which wait for each other"
    if cfg["groups"] > 1 and G * cfg["groups"] > 256:
        return f"groups={cfg['groups']}: {G * cfg['groups']} blocks, wanted about as many as there are multiprocessors"
    if cfg["slack"] > cfg["levels"]:
        return f"slack={cfg['slack']}, levels={cfg['levels']}: wanted at most one for each time that words are read"
    if cfg["word"] == 8 and cfg["levels"] == 1:
        return "word=8, levels=1: wanted levels=2 for words of two sums"
    if cfg["roles"] == 4 and (cfg["levels"] == 1 or cfg["early"]):
        return f"roles=4, levels={cfg['levels']}, early={cfg['early']}: wanted levels=2, early=0"
    if cfg["levels"] == 2:
        if share_of(G, bt, p.M + 1) > ROLE:
            return f"levels=2, block_T={bt}, block_C={bc}: {G} blocks to a group, wanted so many that each adds up at most {ROLE} values"
    elif (live := G * ceildiv((p.n + 1) * bt + ceildiv((p.M - p.n) * bt, G), ROLE)) > most_words(p, cfg):
        return f"block_T={bt}, block_C={bc}: {live} words a thread would spill"
    if (held := phi_registers(p, cfg)) > 128:
        return f"block_C={bc}: {held} registers a thread for {p.n * bc} channels of phi, wanted at most 128"
    return too_much_shared(shared_bytes(p, cfg, mixes))


#: What a search may choose from; configurations below are in this order.
SPACE = {
    "block_T": (16, 32),
    "block_C": (64, 128, 256),
    "groups": (1, 2, 4, 6, 8, 13, 16),
    "threads": (128, 256),
    "ahead": (1, 2, 3),
    "levels": (1, 2),
    "slack": (0, 1, 2),
    "early": (0, 1),
    "word": (4, 8),
    "widen": (3, 2),
    "roles": (3, 4),
}


def default(p):
    """For about 132 multiprocessors; narrow slices where C is small, so that there are blocks enough."""
    bc = 64 if p.C <= 1024 else 128 if p.C <= MOST_BLOCKS * 128 else 256
    groups = max(1, 132 // ceildiv(p.C, bc))
    first = ((16, 256, 3, 2, 2),) if p.n > 2 else ()
    cfgs = [
        dict(zip(SPACE, (bt, bc, groups, threads, ahead, levels, slack, 0, 4, 3, 3), strict=True))
        for bt, threads, ahead, levels, slack in (*first, (32, 256, 1, 1, 1), (16, 256, 3, 1, 1), (16, 256, 3, 2, 2), (16, 128, 1, 1, 1))
    ]
    return next((cfg for cfg in cfgs if invalid(p, cfg) is None), cfgs[-1])


#: The best with a role that gives (results/h200/give.txt), whole.
_GIVE = (
    *((16, 128, groups, 256, 3, 2, 2, 0, 4 if groups == 2 else 8, 2, 4) for groups in (6, 4, 2, 8, 13)),
    *((32, 128, groups, 256, 2, 2, 0, 0, 8, 2, 4) for groups in (6, 4, 2, 8, 13)),
    (32, 128, 6, 256, 3, 2, 2, 0, 8, 2, 4),
    (32, 128, 6, 128, 2, 2, 0, 0, 8, 2, 4),
)
#: And without one (results/h200/bench.md of 2026-11-29, results/h100/whole/designs.txt), up to ``early``.
_BEST = (
    (32, 128, 6, 256, 2, 2, 0, 0),
    (32, 128, 4, 256, 1, 2, 1, 0),
    (32, 128, 2, 256, 1, 2, 0, 1),
    (16, 128, 6, 256, 3, 2, 2, 0),
    (16, 128, 4, 256, 3, 2, 2, 0),
    (16, 128, 2, 256, 3, 2, 2, 1),
    (32, 256, 13, 256, 1, 1, 1, 1),
    (32, 128, 6, 256, 1, 1, 1, 1),
)
_OTHERS = (
    (16, 128, 4, 128, 3, 2, 2, 0),
    (32, 128, 2, 256, 1, 2, 1, 0),
    (16, 128, 4, 256, 3, 1, 1, 1),
    (16, 128, 6, 256, 3, 2, 2, 1),
    (16, 128, 6, 256, 3, 1, 1, 1),
    (32, 128, 6, 256, 1, 2, 1, 0),
)
_ALL = (*_GIVE, *((*config, 8, 3, 3) for config in _BEST[:3]), *((*config, 4, 3, 3) for config in _BEST + _OTHERS))
#: What a search begins with.
SEEDS = tuple(dict(zip(SPACE, config, strict=True)) for config in _ALL)


def pass_configs(cfg):
    """No barriers but those written, no bounds checks but those written."""
    return {**PASS_CONFIGS, "tl.disable_safe_memory_legalize": True}


def whole_pass(mixes, **own):
    """The spec of a pass, but for what is its ``own``. ``mixes``: see :func:`shared_bytes`."""
    return Kernel(
        space=lambda p: SPACE,
        default=default,
        invalid=partial(invalid, mixes=mixes),
        unserved=unserved_by(invalid, default),
        least_arch=90,
        shortcut=True,
        scratch=scratch_of,
        resident=group_of,
        seeds=SEEDS,
        options={"norm_eps": 1e-6, "pre_eps": 1e-6},
        pass_configs=pass_configs,
        **own,
    )
