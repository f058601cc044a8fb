"""The whole passes (tl_kernels/whole.py) with a loop of its own for every role, so that what a role holds in registers is not held by all.

The product holds its slice of phi there, high and low: 128 registers a thread for 512 channels. From shared memory it would be read again
for every tile, four times the bytes of the tile at 16 tokens, and take 64 KiB of room for tiles on their way.

The roles begin every tile together, as in one loop, and u comes first. The product takes registers that the sums can spare, so many that
its multiplications follow each other: with fewer, nvcc makes each wait for the one before (C7512), four times as long.
"""

import tilelang.language as T

from tl_kernels.meeting import ROLE
from tl_kernels.mma import high, low, padded
from tl_kernels.whole import PHI, TOP, lag_of, read_after, registers_of, roles


def apart(p, cfg, load, work, raw):
    """A macro that runs all tiles of a block; arguments and their order are those of tl_kernels/together.py."""
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, groups, threads, ahead = cfg["block_T"], cfg["block_C"], cfg["groups"], cfg["threads"], cfg["ahead"]
    N, lag, step = padded(M, 32), lag_of(cfg), groups * bt
    summed, totalled = read_after(cfg)
    everyone = threads + 2 * ROLE
    registers = registers_of(p, cfg)
    counters, room, product, sums, give_u, leave = roles(p, cfg)

    @T.macro
    def stage(c0, phi, x_s):
        """phi's slice into places of the streams that no tile has yet: row by row its high parts, then its low ones."""
        for j in T.unroll(n):
            for m, c in T.Parallel(M, bc):
                # no condition: channels beyond the streams' meet zeros. Under one, TileLang takes the T.min out and loads before the condition
                value = phi[m, T.min(j * C + c0 + c, K - 1)]
                x_s[ahead + m // bt, m % bt, j * bc + c] = high(value, dtype)
                x_s[ahead + (M + m) // bt, (M + m) % bt, j * bc + c] = low(value, dtype)

    @T.macro
    def fill(x_s, phi_f):
        for r, k in T.Parallel(2 * N, n * bc):
            # rows beyond phi's give sums that nobody reads
            at = T.min(r // 16 * 8 + r % 8, M - 1) + T.if_then_else(r % 16 < 8, 0, M)
            phi_f[r, k] = x_s[ahead + at // bt, at % bt, k]

    @T.macro
    def run(block, tokens, tensors, weights, outs, scratch, tiles, held, x_f, u_f):
        tx, s, g, c0 = block
        phi, alpha, b = weights
        u, parts = outs[0], outs[1]
        phi_f = T.alloc_fragment((2 * N, n * bc), dtype)
        z_NT, mean_s, total_s, pre_s, held_by_sums = room()
        epoch = T.alloc_var("uint32")
        epoch = scratch[counters + 2 * g]
        mine = T.max(T.ceildiv(T.ceildiv(tokens, bt) - g, groups), 0)
        if tx >= threads:
            stage(c0, phi, tiles[0])
            T.sync_threads(PHI, 2 * ROLE)
        if tx < threads:
            for i in T.unroll(ahead):
                if i < mine:
                    load(i, (i * groups + g) * bt, c0, tensors, tiles)
            for i in T.serial(mine + lag):
                t0 = (i * groups + g) * bt
                if ahead > 1 and i + ahead <= mine:
                    T.ptx_wait_group((ahead - 1) * (n + len(tiles) - 1))
                else:
                    T.ptx_wait_group(0)
                if raw:
                    T.fence_proxy_async()
                T.sync_threads(TOP, everyone)
                if i + ahead < mine:
                    load(i + ahead, t0 + ahead * step, c0, tensors, tiles)
                if i >= lag:
                    give_u(i, (i - 1) % 2, t0 - lag * step, tokens, c0, tiles[0], pre_s, x_f, u_f, u)
                if i < mine:
                    work(i, t0, tokens, c0, tiles, held, mean_s, outs[2:])
        elif tx < threads + ROLE:
            if registers is not None:
                T.set_max_nreg(registers[0], 1)
            fill(tiles[0], phi_f)
            for i in T.serial(mine + lag):
                T.sync_threads(TOP, everyone)
                if i >= 1 and i < mine + 1:
                    product(i, s, g, epoch, scratch, phi_f, tiles[0], mean_s, z_NT)
        else:
            if registers is not None:
                T.set_max_nreg(registers[1], 0)
            for i in T.serial(mine + lag):
                T.sync_threads(TOP, everyone)
                if i >= summed and i < mine + totalled:
                    t1 = ((i - summed) * groups + g) * bt
                    sums(i, mine, s, g, t1, tokens, epoch, scratch, held_by_sums, total_s, pre_s, alpha, b, parts)

        T.sync_threads()
        if tx == 0:
            leave(scratch, g, epoch, mine)

    return run
