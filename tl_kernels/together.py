"""The whole passes (tl_kernels/whole.py) in one loop that all roles share, phi in shared memory."""

import tilelang.language as T

from tl_kernels.meeting import ROLE
from tl_kernels.mma import high, low, padded
from tl_kernels.whole import MAIN, PRE, lag_of, operand_row, read_after, roles


def together(p, cfg, load, work, raw):
    """A macro that runs all tiles of a block.

    ``load(i, t0, c0, tensors, tiles)`` asks for tile i, ``work(i, t0, tokens, c0, tiles, held, mean_s, outs)`` is what the main role does
    with it when it has arrived: macros of the kernel. ``raw``: whether the product takes the streams as they arrived. ``tensors`` and
    ``tiles`` begin with the streams, ``outs`` with u and parts; the others are ``work``'s.
    """
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, groups, threads, ahead, levels = (cfg[k] for k in ("block_T", "block_C", "groups", "threads", "ahead", "levels"))
    N, lag, step, summed = padded(M, 32), lag_of(cfg), groups * bt, read_after(cfg)[0]
    counters, room, product, sums, give_u, leave = roles(p, cfg)

    @T.macro
    def fill(c0, phi, phi_s):
        for j in T.unroll(n):
            for m, c in T.Parallel(N, bc):
                value = T.if_then_else(m < M and c0 + c < C, phi[T.min(m, M - 1), T.min(j * C + c0 + c, K - 1)], 0.0)
                phi_s[operand_row(m, 0), j * bc + c] = high(value, dtype)
                phi_s[operand_row(m, 1), j * bc + c] = low(value, dtype)

    @T.macro
    def run(block, tokens, tensors, weights, outs, scratch, tiles, held, x_f, u_f):
        tx, s, g, c0 = block
        phi, alpha, b = weights
        u, parts = outs[0], outs[1]
        phi_s = T.alloc_shared((2 * N, n * bc), dtype)
        z_NT, mean_s, total_s, pre_s, held_by_sums = room()
        epoch = T.alloc_var("uint32")
        epoch = scratch[counters + 2 * g]
        mine = T.max(T.ceildiv(T.ceildiv(tokens, bt) - g, groups), 0)
        if tx < threads:
            for i in T.unroll(ahead):
                if i < mine:
                    load(i, (i * groups + g) * bt, c0, tensors, tiles)
        fill(c0, phi, phi_s)
        for i in T.serial(mine + lag):
            t0 = (i * groups + g) * bt
            if ahead > 1 and i + ahead <= mine:
                T.ptx_wait_group((ahead - 1) * (n + len(tiles) - 1))
            else:
                T.ptx_wait_group(0)
            if raw:
                T.fence_proxy_async()
            T.sync_threads()
            if tx < threads:
                if levels == 2 and i >= lag:
                    give_u(i, (i - 1) % 2, t0 - lag * step, tokens, c0, tiles[0], pre_s, x_f, u_f, u)
                if i + ahead < mine:
                    if levels == 2:
                        T.sync_threads(MAIN, threads)
                    load(i + ahead, t0 + ahead * step, c0, tensors, tiles)
                if i < mine:
                    work(i, t0, tokens, c0, tiles, held, mean_s, outs[2:])
                if levels == 1 and i >= lag:
                    T.sync_threads(PRE, threads + ROLE)
                    give_u(i, 0, t0 - lag * step, tokens, c0, tiles[0], pre_s, x_f, u_f, u)
            elif tx < threads + ROLE:
                if i >= 1 and i < mine + 1:
                    product(i, s, g, epoch, scratch, phi_s, tiles[0], mean_s, z_NT)
            else:
                if i >= summed:
                    sums(i, mine, s, g, t0 - summed * step, tokens, epoch, scratch, held_by_sums, total_s, pre_s, alpha, b, parts)

        T.sync_threads()
        if tx == 0:
            leave(scratch, g, epoch, mine)

    return run
