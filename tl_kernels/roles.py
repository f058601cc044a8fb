"""The roles of a block's warps in the whole passes (tl_kernels/whole.py), each with a loop of its own: what one holds in registers is not
held by all.

    main     makes u of tile i - lag, asks for a tile, in this order or (``early`` 1) the other, works on tile i when it has arrived
    product  z of tile i - 1 for this slice of the channels, published
    sums     asks for words of the group, two tiles after the main role or more; makes H_pre of the sums of an iteration before, while the
             words are on their way: a load cannot be under way across a barrier; then adds up, with two levels a share and the totals

With ``roles`` 4 there is one more, and main only works on tile i:

    give     stores what main made of tile i - lag and makes u of it, then asks for the tile in its place

A store waits where memory is busy, and what main has to do next then waits too (results/notes.md, 2026-11-30).

The roles begin every tile together. With barriers between two roles only, so that each goes on as soon as it can, five of six shapes were
slower (results/notes.md, 2026-11-25): the lag that this order has is what makes up for a block that is late.

Barriers between the warps of a role are by hand: those TileLang would put in for shared memory know nothing of the roles.
"""

import tilelang.language as T

from tl_kernels.coefficients import sigmoid
from tl_kernels.meeting import ROLE, leave_of, meeting, number_of
from tl_kernels.mma import ACC, high, low, padded
from tl_kernels.pairs import pairs
from tl_kernels.relay import relay
from tl_kernels.whole import buffers_of, givers, group_of, lag_of, part_of, read_after, registers_of, ring_of, threads_of

#: Named barriers; 0 is T.sync_threads(), 4 that of relay.py.
PHI, TOP, MAIN, GIVE = 1, 2, 3, 5


def operand_row(m, part):
    """Where the product's operand has the high (0) or low (1) part of phi's row m. As wgmma deals out rows, a thread has both sums of m."""
    return m // 8 * 16 + part * 8 + m % 8


def roles(p, cfg, load, work, raw):
    """A macro that runs all tiles of a block.

    ``load(i, t0, c0, tensors, tiles)`` asks for tile i, with a copy a stream and one for each tensor beside them, ``work(i, t0, tokens, c0,
    tiles, held, put_mean, home, outs)`` is what the main role does with it when it has arrived, ``put_mean(home, i, t, value)`` of the mean
    squares included: macros of the kernel. ``raw``: whether the streams alone are loaded, and the product takes them as they arrived.
    ``tensors`` and ``tiles`` begin with the streams, ``outs`` with u and parts; the others are what ``work`` stores, or give. With three
    roles a thread of main asks for, works on and makes u of the same 16 bytes of every row of the streams: no barrier stands between these.
    """
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, groups, threads = (cfg[k] for k in ("block_T", "block_C", "groups", "threads"))
    ahead, levels, early = (cfg[k] for k in ("ahead", "levels", "early"))
    N, G, step, lag, buffers = padded(M, 32), group_of(p, cfg), groups * bt, lag_of(cfg), buffers_of(p, cfg)
    summed, totalled = read_after(cfg)
    norm_eps, pre_eps = p.option("norm_eps"), p.option("pre_eps")
    registers, apart = registers_of(p, cfg), cfg["roles"] == 4
    others = threads + givers(cfg)  # the first thread of the product
    everyone = threads_of(cfg)
    takes = part_of(p, cfg, givers(cfg))  # tokens that u is made of at a time
    ring, few, paired = ring_of(cfg), (n + 1) * bt, cfg["word"] == 8
    number, sizes = number_of(ring), (G, groups, bt, M + 1, n + 1, ring)
    copies = n if raw else n + 3  # of a tile
    spare = ahead + 1  # the first place of the streams that no tile comes to before iteration 1
    if paired:
        count, counters, share_shape, publish_sums, publish_mean, ask, add_share, ask_totals, read_totals = pairs(G, groups, bt, M, n, ring)
    elif levels == 2:
        count, counters, share_shape, publish, ask, add_share, ask_totals, read_totals = relay(*sizes)
    else:
        count, counters, publish, begin, ask, add_up, write_out = meeting(*sizes)
    leave = leave_of(G, counters, ring)
    word_type = "uint64" if paired else "uint32"

    def start_of(i, g):
        """The first token of group g's tile i."""
        return (i * groups + g) * bt

    @T.macro
    def stage(c0, phi, x_s):
        """phi's slice into places of the streams that no tile has yet, while the main role is at its first: high parts, then low ones."""
        for j in T.unroll(n):
            for m, c in T.Parallel(M, bc):
                # no condition: channels beyond the streams' meet zeros. Under one, TileLang takes the T.min out and loads before it
                value = phi[m, T.min(j * C + c0 + c, K - 1)]
                x_s[spare + m // bt, m % bt, j * bc + c] = high(value, dtype)
                x_s[spare + (M + m) // bt, (M + m) % bt, j * bc + c] = low(value, dtype)

    @T.macro
    def fill(x_s, phi_f):
        for r, k in T.Parallel(2 * N, n * bc):
            # rows beyond phi's give sums that nobody reads
            at = T.min(r // 16 * 8 + r % 8, M - 1) + T.if_then_else(r % 16 < 8, 0, M)
            phi_f[r, k] = x_s[spare + at // bt, at % bt, k]

    @T.macro
    def take(z_NT, z, step, first):
        """z [N, bt / step] of every ``step``-th token from the ``first`` on: the product with phi's high parts and with its low ones."""
        for m, t in T.Parallel(N, bt // step):
            z[m, t] = z_NT[operand_row(m, 0), t * step + first]
        for m, t in T.Parallel(N, bt // step):
            z[m, t] += z_NT[operand_row(m, 1), t * step + first]

    @T.macro
    def put_mean(home, i, t, value):
        scratch, g, s, epoch = home
        if paired:
            publish_mean(scratch, g, s, number(epoch, i), t, value)
        else:
            publish(scratch, g, s, number(epoch, i), M * bt + t, value)

    @T.macro
    def multiply(i, s, g, epoch, scratch, phi_f, x_s, z_NT):
        T.gemm(phi_f, x_s[i % buffers, :, :], z_NT, transpose_B=True, clear_accum=True)
        if paired:
            even = T.alloc_fragment((N, bt // 2), ACC)
            odd = T.alloc_fragment((N, bt // 2), ACC)
            take(z_NT, even, 2, 0)
            take(z_NT, odd, 2, 1)
            publish_sums(scratch, g, s, number(epoch, i), even, odd)
        else:
            z = T.alloc_fragment((N, bt), ACC)
            take(z_NT, z, 1, 0)
            for m, t in T.Parallel(N, bt):
                if m < M:
                    publish(scratch, g, s, number(epoch, i), m * bt + t, z[m, t])

    @T.macro
    def put_pre(i, tile, total_s, pre_s, affine):
        """H_pre of a tile from the sums of iteration i."""
        gain, bias = affine
        for t, q in T.Parallel(bt, n):
            rinv = T.rsqrt(total_s[i % 2, n * bt + t] + norm_eps)
            # a row whose norm overflowed has 1/r = 0 and counts as zero
            h = gain[t, q] * T.if_then_else(rinv > 0, total_s[i % 2, q * bt + t] * rinv, 0.0) + bias[t, q]
            pre_s[tile % 2, t, q] = sigmoid(h) + pre_eps

    @T.macro
    def add_all(i, mine, g, epoch, scratch, kept, total_s, pre_s, affine, parts):
        words = T.alloc_fragment((G, count), "uint32")
        at, until, total = kept
        if i >= summed and i < mine + summed:
            ask(scratch, g, number(epoch, i - summed), at, words)
        if i > summed and i <= mine + summed:
            put_pre(i - 1, i - 1 - summed, total_s, pre_s, affine)
            write_out(start_of(i - 1 - summed, g), at, until, total, parts)
        if i >= summed and i < mine + summed:
            add_up(scratch, g, number(epoch, i - summed), at, words, total)
            for e in T.Parallel(count):
                if e < few:
                    total_s[i % 2, e] = total[e]

    @T.macro
    def add_in_steps(i, mine, s, g, tokens, epoch, scratch, total_s, pre_s, affine, parts):
        words = T.alloc_fragment(share_shape, word_type)
        word = T.alloc_fragment((count,), word_type)
        if i >= summed and i < mine + summed:
            ask(scratch, g, s, number(epoch, i - summed), words)
        if i >= totalled and i < mine + totalled:
            ask_totals(scratch, g, number(epoch, i - totalled), word)
        if i > totalled and i <= mine + totalled:
            put_pre(i - 1, i - 1 - totalled, total_s, pre_s, affine)
        if i >= summed and i < mine + summed:
            add_share(scratch, g, s, number(epoch, i - summed), start_of(i - summed, g), tokens, words, parts)
        if i >= totalled and i < mine + totalled:
            read_totals(scratch, g, number(epoch, i - totalled), word, total_s, i % 2)

    @T.macro
    def give_u(i, t0, tokens, c0, x_s, pre_s, x_f, u_f, u, made):
        """u of tile i, which begins at t0; ``made``: a tensor that main's streams are stored in, or nothing."""
        for h in T.serial(bt // takes):
            t2 = h * takes
            T.clear(u_f)
            for j in T.unroll(n):
                for t, c in T.Parallel(takes, bc):
                    x_f[t, c] = x_s[i % buffers, t2 + t, j * bc + c]
                if len(made) > 0:
                    for t, c in T.Parallel(takes, bc):
                        if t0 + t2 + t < tokens and c0 + c < C:
                            made[0][t0 + t2 + t, j, c0 + c] = x_f[t, c]
                for t, c in T.Parallel(takes, bc):
                    u_f[t, c] += pre_s[i % 2, t2 + t, j] * x_f[t, c]
            for t, c in T.Parallel(takes, bc):
                if t0 + t2 + t < tokens and c0 + c < C:
                    u[t0 + t2 + t, c0 + c] = u_f[t, c]

    @T.macro
    def go_on(i, mine, t0, c0, tensors, tiles):
        """Ask for tile i; for copies of nothing behind the last, so that all but ``ahead`` tiles' copies are done in the end too."""
        if i < mine:
            load(i, t0, c0, tensors, tiles)
        else:
            for _ in T.unroll(copies):
                T.ptx_commit_group()

    @T.macro
    def give(i, mine, g, tokens, c0, tensors, tiles, pre_s, u, made):
        x_f = T.alloc_fragment((takes, bc), dtype)
        u_f = T.alloc_fragment((takes, bc), ACC)
        if i >= lag:
            give_u(i - lag, start_of(i - lag, g), tokens, c0, tiles[0], pre_s, x_f, u_f, u, made)
            T.sync_threads(GIVE, givers(cfg))
        go_on(i + ahead, mine, start_of(i + ahead, g), c0, tensors, tiles)

    @T.macro
    def set_registers(role):
        if registers is not None:
            T.set_max_nreg(*registers[role])

    @T.macro
    def run_roles(block, tokens, tensors, weights, outs, scratch, tiles, held, x_f, u_f):
        tx, s, g, c0 = block
        phi, alpha, b = weights
        x_s, u, parts = tiles[0], outs[0], outs[1]
        phi_f = T.alloc_fragment((2 * N, n * bc), dtype)
        z_NT = T.alloc_fragment((2 * N, bt), ACC)
        at = T.alloc_fragment((count,), "int32")
        until = T.alloc_fragment((count,), "int32")
        total = T.alloc_fragment((count,), ACC)
        kept = (at, until, total)
        gain = T.alloc_fragment((bt, n), ACC)
        bias = T.alloc_fragment((bt, n), ACC)
        total_s = T.alloc_shared((2, few), ACC)
        pre_s = T.alloc_shared((2, bt, n), ACC)
        epoch = T.alloc_var("uint32")
        epoch = scratch[counters + 2 * g]
        words = T.view(scratch, (scratch.shape[0] // 2,), "uint64") if paired else scratch
        mine = T.max(T.ceildiv(T.ceildiv(tokens, bt) - g, groups), 0)

        if tx >= others:
            T.sync_threads(TOP, everyone)
            stage(c0, phi, x_s)
            T.sync_threads(PHI, 2 * ROLE)
        if tx < threads:
            if apart:
                set_registers("main")
            else:
                for i in T.unroll(ahead):
                    go_on(i, mine, start_of(i, g), c0, tensors, tiles)
            for i in T.serial(mine + lag):
                t0 = start_of(i, g)
                T.sync_threads(TOP, everyone)
                if not apart:
                    if early == 1:
                        go_on(i + ahead, mine, t0 + ahead * step, c0, tensors, tiles)
                    if i >= lag:
                        give_u(i - lag, t0 - lag * step, tokens, c0, x_s, pre_s, x_f, u_f, u, ())
                    if early == 0:
                        go_on(i + ahead, mine, t0 + ahead * step, c0, tensors, tiles)
                    T.ptx_wait_group(ahead * copies)
                    if raw:
                        T.fence_proxy_async()
                    else:
                        T.sync_threads(MAIN, threads)  # all of it reads H_post and H_res
                if i < mine:
                    work(i, t0, tokens, c0, tiles, held, put_mean, (words, g, s, epoch), () if apart else outs[2:])
        elif apart and tx < others:
            set_registers("give")
            for i in T.unroll(ahead):
                go_on(i, mine, start_of(i, g), c0, tensors, tiles)
            T.ptx_wait_group((ahead - 1) * copies)
            T.fence_proxy_async()
            for i in T.serial(mine + lag):
                T.sync_threads(TOP, everyone)
                give(i, mine, g, tokens, c0, tensors, tiles, pre_s, u, outs[2:])
                T.ptx_wait_group((ahead - 1) * copies)  # tile i + 1 is there when all begin it
                T.fence_proxy_async()
        elif tx < others + ROLE:
            set_registers("product")
            fill(x_s, phi_f)
            for i in T.serial(1, mine + lag):
                T.sync_threads(TOP, everyone)
                if i < mine + 1:
                    multiply(i - 1, s, g, epoch, words, phi_f, x_s, z_NT)
        else:
            set_registers("sums")
            if levels == 1:
                begin(s, tokens, at, until)
                T.clear(total)
            for t, q in T.Parallel(bt, n):
                # read once: behind words on their way a load waits for them, even one that hits L1
                gain[t, q] = alpha[0]
                bias[t, q] = b[q]
            for i in T.serial(1, mine + lag):
                T.sync_threads(TOP, everyone)
                if levels == 1:
                    add_all(i, mine, g, epoch, words, kept, total_s, pre_s, (gain, bias), parts)
                else:
                    add_in_steps(i, mine, s, g, tokens, epoch, words, total_s, pre_s, (gain, bias), parts)

        T.sync_threads()
        if tx == 0:
            leave(scratch, g, epoch, mine)

    return run_roles
