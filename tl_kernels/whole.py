"""What the programs that keep a token's row on chip share: the tile of a block, the roles of its warps, the rules of a configuration.

A token's row and its share of phi do not fit one block, so a group of ``ceildiv(C, block_C)`` blocks shares every tile of tokens, a slice
of the channels and of phi each, and meets in global memory (tl_kernels/meeting.py). The warps of a block have roles, each at another tile,
so that no step waits for the one before:

    tile i      main role:  works on the streams                                  (tiles i+1 .. i+ahead are on their way)
    tile i-1    product:    z of this slice, published
    tile i-2    sums:       z of the group, H_pre;  then the main role's u

With ``levels: 2`` (tl_kernels/relay.py) sums take two tiles: of tile i-2 each block adds up its share; H_pre of tile i-3. Then sums are
what an iteration waits for, so the main role does not wait for those of its own: it begins with u of tile i-4, whose room it then gives to
the tile that is asked for next. With one level that would cost more, since what is asked for later arrives later.

With ``phi: "registers"`` every role has a loop of its own and u always comes first, see tl_kernels/apart.py.

Words of the peers are asked for right after they were published, when a peer that is a little behind has not published them yet, and are
asked for again; ``slack`` is how many tiles later they are read, each time, for room on chip.

Barriers are by hand: those TileLang would put in for shared memory know nothing of the roles and would make them take turns.
"""

import tilelang.language as T

from tl_kernels.coefficients import sigmoid
from tl_kernels.meeting import ROLE, meeting, scratch_size
from tl_kernels.mma import ACC, padded
from tl_kernels.relay import relay, relay_size, share_of
from tl_kernels.spec import SHARED_LIMIT, ceildiv, vector_width

#: Named barriers; 0 is T.sync_threads().
PHI, SUMS, PRE, MAIN, TOP = 1, 2, 3, 5, 6


def group_of(p, cfg):
    """Blocks that share a tile."""
    return ceildiv(p.C, cfg["block_C"])


def part_of(p, cfg):
    """Tokens the main role works on at a time: 16 bytes of a stream a thread."""
    return cfg["threads"] * vector_width(p) // cfg["block_C"]


def read_after(cfg):
    """Tiles between the main role's work on the streams and the sums of the same tile; with two levels, and the totals."""
    sums = 2 + cfg["slack"]
    return sums, (sums + 1 + cfg["slack"] if cfg["levels"] == 2 else sums)


def ring_of(cfg):
    """Places that tiles pass through in scratch: twice the first of :func:`read_after`, and as many as the last, in a power of two."""
    return 4 if cfg["slack"] == 0 else 8


def scratch_of(p, cfg):
    """32-bit words of scratch."""
    size = relay_size if cfg["levels"] == 2 else scratch_size
    return size(group_of(p, cfg), cfg["groups"], cfg["block_T"], p.M + 1, ring_of(cfg))


def u_first(cfg):
    """Whether the main role begins an iteration with u, and so has H_pre of an iteration before."""
    return cfg["levels"] == 2 or cfg["phi"] == "registers"


def lag_of(cfg):
    """Tiles between the main role's work on the streams and its u of the same tile."""
    return read_after(cfg)[1] + (1 if u_first(cfg) else 0)


def places_of(cfg):
    """Places for H_pre of a tile: one is read while the next is written."""
    return 2 if u_first(cfg) else 1


def buffers_of(cfg):
    """Tiles of the streams on chip. With two levels and phi in shared memory there is no room for one more: the tile of u makes place for the next."""
    return cfg["ahead"] + lag_of(cfg) + (0 if u_first(cfg) and cfg["phi"] == "shared" else 1)


def row_layouts(p, cfg):
    """[part, block_C] and [n, part, block_C] over the main role: every thread 16 bytes of each row, neighbours beside each other."""
    bc, threads, vec, part = cfg["block_C"], cfg["threads"], vector_width(p), part_of(p, cfg)

    def thread(t, c):
        return (t * bc + c) // vec % threads

    return (
        T.Fragment((part, bc), forward_thread_fn=thread, forward_index_fn=lambda t, c: c % vec),
        T.Fragment((p.n, part, bc), forward_thread_fn=lambda j, t, c: thread(t, c), forward_index_fn=lambda j, t, c: j * vec + c % vec),
    )


def roles(p, cfg):
    """Where a group finds its number of tiles so far, and macros: ``room`` for what the roles share; the roles ``product`` and ``sums``
    (``relayed`` where there are two levels) of iteration i; ``give_u``; ``leave``.
    """
    n, C, M = p.n, p.C, p.M
    bt, bc, groups, threads = cfg["block_T"], cfg["block_C"], cfg["groups"], cfg["threads"]
    N, part, lag, buffers = padded(M, 32), part_of(p, cfg), lag_of(cfg), buffers_of(cfg)
    norm_eps, pre_eps = p.option("norm_eps"), p.option("pre_eps")
    summed, totalled = read_after(cfg)
    sizes = (group_of(p, cfg), groups, bt, M + 1, n + 1, ring_of(cfg))
    count, counters, number, publish, add_up, write_out, leave = meeting(*sizes)
    if cfg["levels"] == 2:
        count, run, lanes, columns, ask, add_share, read_totals = relay(*sizes)

    @T.macro
    def room():
        mean_s = T.alloc_shared((2, bt), ACC)
        total_s = T.alloc_shared((count,), ACC)
        pre_s = T.alloc_shared((places_of(cfg), bt, n), ACC)
        z_NT = T.alloc_fragment((2 * N, bt), ACC)
        words = T.alloc_fragment((group_of(p, cfg), count), "uint32")
        old = T.alloc_fragment((count,), "uint32")
        total = T.alloc_fragment((count,), ACC)
        return z_NT, mean_s, total_s, pre_s, (words, old, total)

    @T.macro
    def product(i, s, g, epoch, scratch, phi_b, x_s, mean_s, z_NT):
        T.gemm(phi_b, x_s[(i - 1) % buffers, :, :], z_NT, transpose_B=True, clear_accum=True)
        z = T.alloc_fragment((N, bt), ACC)
        for m, t in T.Parallel(N, bt):
            z[m, t] = z_NT[operand_row(m, 0), t]
        for m, t in T.Parallel(N, bt):
            z[m, t] += z_NT[operand_row(m, 1), t]
        for m, t in T.Parallel(N, bt):
            if m < M:
                publish(scratch, g, s, number(epoch, i - 1), m * bt + t, z[m, t])
        for t in T.Parallel(bt):
            publish(scratch, g, s, number(epoch, i - 1), M * bt + t, mean_s[(i - 1) % 2, t])

    @T.macro
    def give_u(i, place, t0, tokens, c0, x_s, pre_s, x_f, u_f, u):
        """By the main role: u of tile i - lag, which begins at t0."""
        for h in T.serial(bt // part):
            t2 = h * part
            T.clear(u_f)
            for j in T.unroll(n):
                for t, c in T.Parallel(part, bc):
                    x_f[t, c] = x_s[(i - lag) % buffers, t2 + t, j * bc + c]
                for t, c in T.Parallel(part, bc):
                    u_f[t, c] += pre_s[place, t2 + t, j] * x_f[t, c]
            for t, c in T.Parallel(part, bc):
                if t0 + t2 + t < tokens and c0 + c < C:
                    u[t0 + t2 + t, c0 + c] = u_f[t, c]

    @T.macro
    def put_pre(place, total_s, pre_s, alpha, b):
        """H_pre from the sums in ``total_s``."""
        T.sync_threads(SUMS, ROLE)
        for t, q in T.Parallel(bt, n):
            rinv = T.rsqrt(total_s[n * bt + t] + norm_eps)
            # a row whose norm overflowed has 1/r = 0 and counts as zero
            h = alpha[0] * T.if_then_else(rinv > 0, total_s[q * bt + t] * rinv, 0.0) + b[q]
            pre_s[place, t, q] = sigmoid(h) + pre_eps

    @T.macro
    def sums(i, mine, s, g, t0, tokens, epoch, scratch, held, total_s, pre_s, alpha, b, parts):
        words, old, total = held
        add_up(scratch, g, s, number(epoch, i - summed), words, old, total)
        for e in T.Parallel(count):
            total_s[e] = total[e]
        put_pre(i % places_of(cfg), total_s, pre_s, alpha, b)
        if not u_first(cfg):
            T.named_barrier_arrive(PRE, threads + ROLE)
        write_out(s, t0, tokens, total, parts)

    @T.macro
    def relayed(i, mine, s, g, t0, tokens, epoch, scratch, held, total_s, pre_s, alpha, b, parts):
        words = T.alloc_fragment((run, lanes, columns), "uint32")
        if i < mine + summed:
            ask(scratch, g, s, number(epoch, i - summed), words)
        if i >= totalled and i < mine + totalled:
            read_totals(scratch, g, number(epoch, i - totalled), total_s)
            put_pre(i % 2, total_s, pre_s, alpha, b)
        if i < mine + summed:
            add_share(scratch, g, s, number(epoch, i - summed), t0, tokens, words, parts)

    return counters, room, product, (sums if cfg["levels"] == 1 else relayed), give_u, leave


def operand_row(m, part):
    """Where the product's operand has the high (0) or low (1) part of phi's row m. As wgmma deals out rows, a thread has both, and their sums."""
    return m // 8 * 16 + part * 8 + m % 8


def phi_registers(p, cfg):
    """Registers a thread of the product for its slice of phi, high and low."""
    return 2 * padded(p.M, 32) * p.n * cfg["block_C"] // (2 * ROLE)


def registers_of(p, cfg):
    """Registers a thread of the product and of the sums with ``phi: "registers"``, together twice what a thread begins with, or None where
    that is right for both. 32 tokens take eight accumulators more than 16, and room to overlap them.
    """
    if phi_registers(p, cfg) <= 64:
        return None
    wide = cfg["block_T"] > 16
    return ((184, 72) if wide else (168, 88)) if cfg["threads"] > 128 else ((216, 120) if wide else None)


def most_words(p, cfg):
    """Words that a thread of the sums can hold."""
    registers = registers_of(p, cfg) if cfg["phi"] == "registers" else None
    return min(90, registers[1] - 28) if registers else 90


def shared_bytes(p, cfg, mixes):
    """Shared memory, an upper bound; ``mixes``: whether tiles of f, H_post and H_res stand beside those of the streams."""
    phi = 2 * padded(p.M, 32) * p.n * cfg["block_C"] if cfg["phi"] == "shared" else 0
    bt, kb, N, staged = cfg["block_T"], p.n * cfg["block_C"], padded(p.M, 32), cfg["ahead"] + 1
    beside = staged * bt * (cfg["block_C"] * p.itemsize + 4 * (p.n + p.n * p.n)) if mixes else 0
    small = bt * (places_of(cfg) * p.n + 2) + 3 * ROLE
    return (buffers_of(cfg) * bt * kb + phi) * p.itemsize + beside + 4 * small + 1024


def invalid(p, cfg, mixes=True):
    """Why a configuration cannot work, or None. ``mixes``: see :func:`shared_bytes`."""
    bt, bc, threads = cfg["block_T"], cfg["block_C"], cfg["threads"]
    G, part = ceildiv(p.C, bc), threads * vector_width(p) // bc
    if bt not in (16, 32, 64) or bc not in (64, 128, 256):
        return f"block_T={bt}, block_C={bc}: wanted 16, 32 or 64 tokens and 64, 128 or 256 channels"
    if threads % 128 or bt % max(1, part):
        return f"threads={threads}: wanted a multiple of 128 that works on a divisor of block_T={bt} tokens at a time, not {part}"
    if cfg["groups"] > 1 and G * cfg["groups"] > 256:
        return f"groups={cfg['groups']}: {G * cfg['groups']} blocks, wanted about as many as there are multiprocessors"
    if cfg["levels"] == 2:
        if share_of(G, bt, p.M + 1) > ROLE:
            return f"levels=2, block_T={bt}, block_C={bc}: {G} blocks to a group, wanted so many that each adds up at most {ROLE} values"
    elif (live := G * ceildiv((p.n + 1) * bt + ceildiv((p.M - p.n) * bt, G), ROLE)) > most_words(p, cfg):
        return f"block_T={bt}, block_C={bc}: {live} words a thread would spill"
    if cfg["phi"] == "registers" and (held := phi_registers(p, cfg)) > 128:
        return f"block_C={bc}, phi=registers: {held} registers a thread for {p.n * bc} channels of phi, wanted at most 128"
    need, limit = shared_bytes(p, cfg, mixes), SHARED_LIMIT[90] * 1024
    return f"{need} bytes of shared memory, wanted at most {limit}" if need > limit else None


def unserved(p):
    """Why no configuration serves a problem, or None."""
    if p.dtype != "bfloat16" or p.n > 4 or p.C % vector_width(p):
        return f"n={p.n}, C={p.C}, {p.dtype}: wanted at most 4 bfloat16 streams whose rows start on 16 bytes"
    return invalid(p, default(p))


def default(p):
    """For about 132 multiprocessors; narrow slices where C is small, so that there are blocks enough."""
    bc = 64 if p.C <= 1024 else 128 if p.C <= 90 * 128 else 256
    groups = max(1, 132 // ceildiv(p.C, bc))
    cfgs = [
        {"block_T": bt, "block_C": bc, "groups": groups, "threads": threads, "ahead": 1, "levels": 1, "phi": "shared", "slack": 0}
        for bt, threads in ((32, 256), (16, 128))
    ]
    return next((cfg for cfg in cfgs if invalid(p, cfg) is None), cfgs[-1])


#: What a search begins with, the best of each shape first (results/h100/tune.json, designs.txt).
SEEDS = tuple(
    dict(zip(("block_T", "block_C", "groups", "threads", "ahead", "levels", "phi", "slack"), values, strict=True))
    for values in (
        (32, 128, 6, 256, 1, 1, "registers", 1),
        (16, 128, 4, 128, 3, 2, "registers", 1),
        (16, 128, 2, 128, 3, 2, "registers", 1),
        (16, 128, 4, 256, 3, 2, "registers", 1),
        (16, 128, 2, 256, 3, 2, "registers", 1),
        (32, 128, 6, 128, 1, 1, "registers", 1),
        (32, 128, 6, 256, 2, 1, "registers", 0),
        (32, 128, 4, 256, 1, 2, "registers", 0),
        (32, 128, 2, 256, 1, 2, "registers", 0),
        (16, 128, 6, 256, 3, 1, "registers", 1),
        (16, 128, 6, 256, 3, 2, "registers", 1),
        (32, 128, 6, 256, 1, 1, "shared", 0),
        (16, 128, 4, 128, 2, 2, "shared", 1),
        (16, 128, 2, 256, 2, 2, "shared", 1),
        (16, 128, 6, 256, 2, 2, "shared", 1),
        (16, 128, 6, 256, 2, 1, "shared", 1),
    )
)


def space(p):
    return {
        "block_T": (16, 32),
        "block_C": (64, 128, 256),
        "groups": (1, 2, 4, 6, 8, 13, 16),
        "threads": (128, 256),
        "ahead": (1, 2, 3),
        "levels": (1, 2),
        "phi": ("shared", "registers"),
        "slack": (0, 1),
    }


def pass_configs(cfg):
    """No barriers but those written, no bounds checks but those written."""
    return {
        "tl.enable_fast_math": True,
        "tl.disable_warp_specialized": True,
        "tl.disable_thread_storage_sync": True,
        "tl.disable_safe_memory_legalize": True,
    }
