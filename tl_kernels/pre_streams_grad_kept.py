"""``pre_streams_grad`` with the rows kept on chip (``keep`` 1): x and du are loaded once and wait there for dH_pre.

A block keeps its slice of the channels of ``lag`` tiles of 32 tokens and has four roles, each at another tile; all begin an iteration
together:

    gates  from the totals of tile i - ``totalled`` dz and c; before there are any, the sums of dab
    rows   what tile i adds to dH_pre, published; dphi of tile i - lag
    give   stores dx of tile i - lag - 1; asks for x and du ``ahead`` iterations before they are needed, for dy of a later tile as soon as
           that dx has left its place; adds up a share of what all blocks have published of tile i - ``summed``: a warp for each of these,
           and one for the rest
    main   dx of tile i - lag, in dy's place: phi stays in its registers, as the right operand of a product of 32 tokens

Blocks are late by turns, and ``lag`` is how late one may be before the others wait: four tiles and three places for dy instead of three and
four took 154 us instead of 158 at C = 2560, 221 instead of 245 at 7168 (results/notes.md, 2026-11-30, sixth session).

The meeting is that of tl_kernels/relay.py with n words a token. x, du, dy and dx go by TMA: as copies of 16 bytes a thread they were 570
instructions of one warp, one after another, and took 400 us instead of 169 at 8192x4x2560 (results/notes.md, 2026-11-30, third session).

Only the first role's fragments have layouts by hand: TileLang 0.1.15 leaves out loops over such fragments where a role's threads do not
begin at 0.
"""

import tilelang.language as T

from tl_kernels.channel_slice import column_of, slice_columns, slice_macros, slices
from tl_kernels.coefficients import sigmoid
from tl_kernels.gate_sums import LANES, across, dab_macros
from tl_kernels.kept_tiles import SMALL, WARP, columns_of, lanes_of, ring_of, scratch_of_kept, share_of, steps_of
from tl_kernels.meeting import ROLE, leave_of, number_of, tag, tagged, value_of
from tl_kernels.mma import ACC, high, low, padded
from tl_kernels.shares import shares, shares_size
from tl_kernels.sizes import ceildiv, vector_width
from tl_kernels.widen import widen

#: Named barriers; 0 is T.sync_threads(), 1 and 2 are TileLang's.
TOP, GATES, ROWS, SHARE = 3, 4, 5, 6
#: Rows of the operand of phi that main reads at a time: the 48 of n = 4 in the three iterations at least that it has no tile.
PHI_ROWS = 16
#: Registers a thread of each role, together the 480 of the 96 that five warpgroups begin with.
REGISTERS = {"gates": (56, 0), "rows": (104, 1), "give": (48, 0), "main": (136, 1)}


def build_kept(p, cfg):
    from tilelang.layout import make_swizzled_layout  # specs come without TileLang

    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, splits, threads, ahead = (cfg[k] for k in ("block_T", "block_C", "splits", "threads", "ahead"))
    summed, totalled, lag = steps_of(cfg)
    N, kb, kp, wide_K = padded(M, 16), n * bc, columns_of(p, cfg), padded(2 * M, 16)
    kg = slices(cfg) * slice_columns(p, cfg)
    column = column_of(p, cfg)
    G, words, share, lanes = ceildiv(C, bc), n * bt, share_of(p, cfg), lanes_of(p, cfg)
    run, ring = ceildiv(G, lanes), ring_of(cfg)
    counters = shares_size(G, splits, words, share, ring)
    places, turns = lag + ahead + 1, cfg["turns"]
    everyone = threads + 3 * ROLE
    rest, L = M - n + 1, M + 3
    vec = vector_width(p)
    beside = ROLE // bt  # threads that share a token's channels
    pieces = tuple(range(bc // (beside * vec)))
    streams = tuple(range(n))
    number, leave = number_of(ring), leave_of(G, counters, ring)
    add_rows_of_dab, write_dab = dab_macros(p, cfg, GATES)
    partial, its, total = shares(G, splits, words, share, lanes, ring)
    by_rows = T.GemmWarpPolicy.FullRow
    T_ = T.dynamic("T")
    S2_ = T.dynamic("S2")

    _, read_rows, add_gradients, add_x, put_back, _, write_dphi = slice_macros(p, cfg, kp)

    def start_of(tile, s):
        return (tile * splits + s) * bt

    def thread(*shape):
        """A fragment's layout of one element a thread, the first ones."""
        if len(shape) == 1:
            return T.Fragment(shape, forward_thread_fn=lambda t: t, forward_index_fn=lambda t: 0)
        return T.Fragment(shape, forward_thread_fn=lambda j, t: j * shape[1] + t, forward_index_fn=lambda j, t: 0)

    @T.macro
    def nothing(count):
        for _ in T.unroll(count):
            T.ptx_commit_group()

    @T.macro
    def ask_x(tile, mine, s, c0, x, du, x_s, du_s, full):
        t0 = start_of(tile, s)
        if tile < mine:
            for j in T.unroll(n):
                T.tma_copy(x[t0 : t0 + bt, j, c0 : c0 + bc], x_s[tile % places, :, j * bc : j * bc + bc], barrier=full[tile % (ahead + 1)])
            T.tma_copy(du[t0 : t0 + bt, c0 : c0 + bc], du_s[tile % places, :, 0:bc], barrier=full[tile % (ahead + 1)])
            T.mbarrier_arrive(full[tile % (ahead + 1)])

    @T.macro
    def ask_dy(tile, mine, s, c0, dy, dy_s, full):
        t0 = start_of(tile, s)
        if tile >= 0 and tile < mine:
            at = ahead + 1 + tile % turns
            for j in T.unroll(n):
                T.tma_copy(dy[t0 : t0 + bt, j, c0 : c0 + bc], dy_s[tile % turns, :, j * bc : j * bc + bc], barrier=full[at])
            T.mbarrier_arrive(full[at])

    @T.macro
    def write_dx(tile, s, c0, dx, dy_s):
        t0 = start_of(tile, s)
        if tile >= 0:
            for j in T.unroll(n):
                # post_res_grads of the boundary below reads it next, from the end on: what is still in L2 then need not be read again
                T.tma_copy(dy_s[tile % turns, :, j * bc : j * bc + bc], dx[t0 : t0 + bt, j, c0 : c0 + bc], eviction_policy="evict_last")

    @T.macro
    def wait(tile, mine, full, first, count):
        """For what ``count`` barriers from ``first`` on take turns to tell."""
        if tile >= 0 and tile < mine:
            T.mbarrier_wait_parity(full[first + tile % count], tile // count % 2)

    @T.macro
    def ask_others(mixed, known, mine, s, tensors, tiles):
        """Of the tile whose dx is next, H_pre and H_res; of that whose dz is, dzs and zs."""
        H_pre, H_res, dzs, zs = tensors
        pre_s, res_s, dzs_s, zs_s = tiles
        t0 = start_of(mixed, s)
        if mixed >= 0 and mixed < mine:
            T.async_copy(H_res[t0 : t0 + bt, :, :], res_s[mixed % SMALL, :, 0:n, :])
            T.async_copy(H_pre[t0 : t0 + bt, :], pre_s[mixed % SMALL, :, :])
        else:
            nothing(2)
        t1 = start_of(known, s)
        if known >= 0 and known < mine:
            T.async_copy(dzs[n : M + 1, t1 : t1 + bt], dzs_s[known % SMALL, :, :])
            T.async_copy(zs[0:n, t1 : t1 + bt], zs_s[known % SMALL, 0:n, :])
            T.async_copy(zs[M : M + 1, t1 : t1 + bt], zs_s[known % SMALL, n : n + 1, :])
        else:
            nothing(3)

    @T.macro
    def stage_phi(phi, c0, phi_f, first, above):
        """Rows from ``first`` on of a part of the operand, which has ``above`` rows above it: phi's high parts, then its low ones."""
        for j in streams:
            for r, c in T.Parallel(PHI_ROWS, bc):
                m = above + first + r
                row = T.min(T.if_then_else(m < M, m, m - M), M - 1)
                value = T.if_then_else(m < 2 * M and c0 + c < C, phi[row, T.min(j * C + c0 + c, K - 1)], 0.0)
                phi_f[first + r, column(j, c)] = T.if_then_else(m < M, high(value, dtype), low(value, dtype))

    @T.macro
    def add_rows(tile, x_s, du_s, part_s, fragments):
        """What a tile's slice adds to dH_pre, a sum for each thread that shares a token."""
        row_f, wide_f, dwide_fs, sum_f = fragments
        at = tile % places
        for h in pieces:
            for g, q, t, k in T.Parallel(bt // 8, beside, 8, vec):
                row_f[g, q, t, k] = du_s[at, g * 8 + t, (h * beside + q) * vec + k]
            for g, q, t, k in T.Parallel(bt // 8, beside, 8, vec):
                dwide_fs[h][g, q, t, k] = row_f[g, q, t, k]
        for j in streams:
            T.clear(sum_f)
            for h in pieces:
                for g, q, t, k in T.Parallel(bt // 8, beside, 8, vec):
                    row_f[g, q, t, k] = x_s[at, g * 8 + t, j * bc + (h * beside + q) * vec + k]
                for g, q, t, k in T.Parallel(bt // 8, beside, 8, vec):
                    wide_f[g, q, t, k] = row_f[g, q, t, k]
                for k in T.unroll(vec):
                    for g, q, t in T.Parallel(bt // 8, beside, 8):
                        sum_f[g, q, t] += wide_f[g, q, t, k] * dwide_fs[h][g, q, t, k]
            for g, q, t in T.Parallel(bt // 8, beside, 8):
                part_s[q, j * bt + g * 8 + t] = sum_f[g, q, t]

    @T.macro
    def ask_share(scratch, s, block, tile, epoch, mine_f):
        for q in T.unroll(run):
            for e in T.Parallel(WARP):
                mine_f[q, e] = T.atomic_load(scratch[its(s, number(epoch, tile), block, q, e)], memory_order="relaxed")

    @T.macro
    def add_share(scratch, s, block, tile, epoch, mine_f, old, sum_f, others_s):
        """The share's words of all blocks, in the order of the blocks; those that were not there are asked for again. Then published."""
        use = number(epoch, tile)
        T.clear(old)
        for q in T.unroll(run):
            for e in T.Parallel(WARP):
                old[e] = T.bitwise_or(old[e], T.bitwise_xor(mine_f[q, e], tag(use, ring)))
        for e in T.Parallel(WARP):
            while T.bitwise_and(old[e], T.uint32(1)) != 0 and block * share < words:
                old[e] = T.uint32(0)
                for q in T.unroll(run):
                    mine_f[q, e] = T.atomic_load(scratch[its(s, use, block, q, e)], memory_order="relaxed")
                    old[e] = T.bitwise_or(old[e], T.bitwise_xor(mine_f[q, e], tag(use, ring)))
        T.clear(sum_f)
        for q in T.unroll(run):
            for e in T.Parallel(WARP):
                if e // share + q * lanes < G:
                    sum_f[e] += value_of(mine_f[q, e])
        for e in T.Parallel(WARP):
            if e < lanes * share:
                others_s[e] = sum_f[e]
        T.sync_threads(SHARE, WARP)
        for e in T.Parallel(WARP):
            if T.And(e < share, block * share + e < words):
                for lane in T.unroll(lanes - 1):
                    sum_f[e] += others_s[(lane + 1) * share + e]
                T.atomic_store(scratch[total(s, use, block * share + e)], tagged(sum_f[e], use, ring), memory_order="relaxed")

    @T.macro
    def put_dz(at, m, t, value, dz_tiles):
        """The high part twice, for phi's high and low parts, and the low part. dphi takes the first M rows of each."""
        left_s, right_s = dz_tiles
        left_s[at, m, t] = high(value, dtype)
        left_s[at, M + m, t] = high(value, dtype)
        right_s[at, m, t] = low(value, dtype)

    @T.prim_func
    def pre_streams_grad(
        dy: T.Tensor((T_, n, C), dtype),
        du: T.Tensor((T_, C), dtype),
        x: T.Tensor((T_, n, C), dtype),
        dzs: T.Tensor((M + 1, T_), ACC),
        dab_S: T.Tensor((S2_, L), ACC),
        zs: T.Tensor((M + 1, T_), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        H_pre: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        phi: T.Tensor((M, K), ACC),
        dx: T.Tensor((T_, n, C), dtype),
        dphi: T.Tensor((splits, M, K), ACC),
        dab: T.Tensor((splits, L), ACC),
        scratch: T.Tensor((scratch_of_kept(p, cfg),), "uint32"),
    ):
        with T.Kernel(G, splits, threads=everyone) as (block, s):
            T.import_source(widen(cfg))
            tx = T.get_thread_binding()
            c0 = block * bc
            x_s = T.alloc_shared((places, bt, kp), dtype)
            du_s = T.alloc_shared((places, bt, bc), dtype)
            dy_s = T.alloc_shared((turns, bt, kb), dtype)
            res_s = T.alloc_shared((SMALL, bt, n + 1, n), ACC)
            pre_s = T.alloc_shared((SMALL, bt, n), ACC)
            dzs_s = T.alloc_shared((SMALL, rest, bt), ACC)
            zs_s = T.alloc_shared((SMALL, n + 1, bt), ACC)
            left_s = T.alloc_shared((2, wide_K, bt), dtype)
            right_s = T.alloc_shared((2, N, bt), dtype)
            c_s = T.alloc_shared((2, bt), ACC)
            dot_s = T.alloc_shared((n, bt), ACC)
            part_s = T.alloc_shared((beside, n * bt), ACC)
            others_s = T.alloc_shared((lanes * share,), ACC)
            dab_s = T.alloc_shared((LANES, across(p)), ACC)
            dab_f = T.alloc_fragment((LANES, across(p)), ACC)
            sum_s = T.alloc_shared((1, n + 1, bt), ACC)
            dz_tiles = (left_s, right_s)
            phi_f = T.alloc_fragment((N, kg), dtype)
            rest_f = T.alloc_fragment((max(wide_K - N, 16), kg), dtype)
            g_TK = T.alloc_fragment((bt, kg), ACC)
            dphi_KN = T.alloc_fragment((kp, N), ACC)
            dy_f = T.alloc_fragment((n, bt, bc), dtype)
            du_f = T.alloc_fragment((bt, bc), dtype)
            x_f = T.alloc_fragment((bt, bc), dtype)
            row_f = T.alloc_fragment((bt // 8, beside, 8, vec), dtype)
            wide_f = T.alloc_fragment((bt // 8, beside, 8, vec), ACC)
            dwide_fs = [T.alloc_fragment((bt // 8, beside, 8, vec), ACC) for _ in pieces]
            row_sum_f = T.alloc_fragment((bt // 8, beside, 8), ACC)
            mine_f = T.alloc_fragment((run, WARP), "uint32")
            old = T.alloc_fragment((WARP,), "uint32")
            share_f = T.alloc_fragment((WARP,), ACC)
            word = T.alloc_fragment((n, bt), "uint32")
            slope = T.alloc_fragment((n, bt), ACC)
            dh = T.alloc_fragment((n, bt), ACC)
            db = T.alloc_fragment((n, bt), ACC)
            bias = T.alloc_fragment((n, bt), ACC)
            gain = T.alloc_fragment((n, bt), ACC)
            dalpha = T.alloc_fragment((bt,), ACC)
            dots = T.alloc_fragment((bt,), ACC)
            T.annotate_layout(
                {
                    **{v: thread(n, bt) for v in (word, slope, dh, db, bias, gain)},
                    **{v: thread(bt) for v in (dalpha, dots)},
                    **{v: make_swizzled_layout(v) for v in (dy_s, du_s)},
                }
            )
            full = T.alloc_barrier([WARP] * (ahead + 1 + turns))
            epoch = T.alloc_var("uint32")
            epoch = scratch[counters + 2 * s]
            mine = T.max(T.ceildiv(T.ceildiv(T_, bt) - s, splits), 0)

            if tx < ROLE:
                T.set_max_nreg(*REGISTERS["gates"])
                for side in T.unroll(2):
                    for m, t in T.Parallel(wide_K, bt):
                        left_s[side, m, t] = 0
                    for m, t in T.Parallel(N, bt):
                        right_s[side, m, t] = 0
                for j, t in T.Parallel(n, bt):
                    bias[j, t] = b[j]
                for j, t in T.Parallel(n, bt):
                    gain[j, t] = alpha[0]
                gain0 = T.alloc_var(ACC)
                gain0 = alpha[0]
                T.clear(db)
                T.clear(dalpha)
                for k in T.unroll(totalled):
                    T.sync_threads(TOP, everyone)
                    if block == 0:
                        add_rows_of_dab(s, S2_, dab_S, k, totalled, dab_f, dab_s)
                for i in T.serial(totalled, mine + lag + 1):
                    tile = i - totalled
                    t0 = start_of(tile, s)
                    at = tile % SMALL
                    T.sync_threads(TOP, everyone)
                    if tile < mine:
                        for m, t in T.Parallel(rest - 1, bt):
                            put_dz(i % 2, n + m, t, dzs_s[at, m, t], dz_tiles)
                        for j, t in T.Parallel(n, bt):
                            r = zs_s[at, n, t]
                            h = gain[j, t] * T.if_then_else(r > 0, zs_s[at, j, t] * r, 0.0) + bias[j, t]
                            slope[j, t] = T.if_then_else(t0 + t < T_, sigmoid(h) * (1.0 - sigmoid(h)), 0.0)
                        use = number(epoch, tile)
                        for j, t in T.Parallel(n, bt):
                            word[j, t] = T.atomic_load(scratch[total(s, use, j * bt + t)], memory_order="relaxed")
                        for j, t in T.Parallel(n, bt):
                            while T.bitwise_and(T.bitwise_xor(word[j, t], tag(use, ring)), T.uint32(1)) != 0:
                                word[j, t] = T.atomic_load(scratch[total(s, use, j * bt + t)], memory_order="relaxed")
                        for j, t in T.Parallel(n, bt):
                            dh[j, t] = T.if_then_else(t0 + t < T_, value_of(word[j, t]), 0.0) * slope[j, t]
                            db[j, t] += dh[j, t]
                        for j, t in T.Parallel(n, bt):
                            dot_s[j, t] = dh[j, t] * zs_s[at, j, t]
                        for j, t in T.Parallel(n, bt):
                            put_dz(i % 2, j, t, dh[j, t] * gain[j, t] * zs_s[at, n, t], dz_tiles)
                        T.sync_threads(GATES, ROLE)
                        T.clear(dots)
                        for j in T.unroll(n):
                            for t in T.Parallel(bt):
                                dots[t] += dot_s[j, t]
                        for t in T.Parallel(bt):
                            r = zs_s[at, n, t]
                            # rows whose norm overflowed have no gradient through z
                            d = T.if_then_else(r > 0, dots[t] * r, 0.0)
                            dalpha[t] += d
                            c_s[i % 2, t] = (dzs_s[at, rest - 1, t] - gain0 * d * r * r) * (1.0 / K)
                        T.fence_proxy_async()
                if block == 0:
                    write_dab(s, dalpha, db, dab_s, sum_s, dab)
            elif tx < 2 * ROLE:
                T.set_max_nreg(*REGISTERS["rows"])
                T.clear(dphi_KN)
                for i in T.serial(mine + lag + 1):
                    T.sync_threads(TOP, everyone)
                    if i < mine:
                        add_rows(i, x_s, du_s, part_s, (row_f, wide_f, dwide_fs, row_sum_f))
                        T.sync_threads(ROWS, ROLE)
                        for e in T.Parallel(words):
                            value = T.alloc_var(ACC)
                            value = part_s[0, e]
                            for q in T.unroll(beside - 1):
                                value += part_s[q + 1, e]
                            use = number(epoch, i)
                            T.atomic_store(scratch[partial(s, use, block, e)], tagged(value, use, ring), memory_order="relaxed")
                    if i >= lag and i < mine + lag:
                        # dphi^T = x^T dz
                        at = (i - lag) % places
                        T.wgmma_gemm(
                            x_s[at, :, :], left_s[(i - 1) % 2, 0:N, :], dphi_KN, transpose_A=True, transpose_B=True, policy=by_rows
                        )
                        T.wgmma_gemm(x_s[at, :, :], right_s[(i - 1) % 2, :, :], dphi_KN, transpose_A=True, transpose_B=True, policy=by_rows)
                        T.wait_wgmma(0)
                    T.sync_threads(ROWS, ROLE)
                write_dphi(dphi, s, block, dphi_KN)
            elif tx < 3 * ROLE:
                T.set_max_nreg(*REGISTERS["give"])
                if tx < 2 * ROLE + WARP:
                    for i in T.unroll(ahead):
                        ask_x(i, mine, s, c0, x, du, x_s, du_s, full)
                    wait(0, mine, full, 0, ahead + 1)
                for i in T.serial(mine + lag + 1):
                    T.sync_threads(TOP, everyone)
                    if tx < 2 * ROLE + WARP:
                        ask_x(i + ahead, mine, s, c0, x, du, x_s, du_s, full)
                        wait(i + 1, mine, full, 0, ahead + 1)
                    elif tx < 2 * ROLE + 2 * WARP:
                        write_dx(i - 1 - lag, s, c0, dx, dy_s)
                        T.tma_store_wait(0)  # the places have been read
                        ask_dy(i - lag + turns - 1, mine, s, c0, dy, dy_s, full)
                        wait(i + 1 - lag, mine, full, ahead + 1, turns)
                    elif tx < 2 * ROLE + 3 * WARP:
                        if i >= summed and i < mine + summed:
                            ask_share(scratch, s, block, i - summed, epoch, mine_f)
                            add_share(scratch, s, block, i - summed, epoch, mine_f, old, share_f, others_s)
                    else:
                        ask_others(i - lag + 2, i - totalled + 2, mine, s, (H_pre, H_res, dzs, zs), (pre_s, res_s, dzs_s, zs_s))
                        T.ptx_wait_group(5)
                T.tma_store_wait(0)
            else:
                T.set_max_nreg(*REGISTERS["main"])
                # phi a few rows at a time while there is no tile yet, so that nobody waits for them
                for k in T.unroll(lag):
                    T.sync_threads(TOP, everyone)
                    if k * PHI_ROWS < N:
                        stage_phi(phi, c0, phi_f, k * PHI_ROWS, 0)
                    elif k * PHI_ROWS < wide_K:
                        stage_phi(phi, c0, rest_f, k * PHI_ROWS - N, N)
                for i in T.serial(lag, mine + lag + 1):
                    at = (i - lag) % places
                    turn = (i - lag) % turns
                    st = (i - lag) % SMALL
                    T.sync_threads(TOP, everyone)
                    if i < mine + lag:
                        read_rows(turn, dy_s, at, du_s, dy_f, du_f)
                        T.gemm(left_s[(i - 1) % 2, 0:N, :], phi_f, g_TK, transpose_A=True, clear_accum=True, policy=by_rows)
                        T.gemm(right_s[(i - 1) % 2, :, :], phi_f, g_TK, transpose_A=True, policy=by_rows)
                        if wide_K > N:
                            T.gemm(left_s[(i - 1) % 2, N:wide_K, :], rest_f, g_TK, transpose_A=True, policy=by_rows)
                        add_gradients(g_TK, st, pre_s, du_f, lambda st, t, i, j: res_s[st, t, i, j], dy_f)
                        add_x(g_TK, at, lambda at, t, side=(i - 1) % 2: c_s[side, t], x_s, x_f)
                        put_back(g_TK, turn, dy_s)
                        T.fence_proxy_async()
            T.sync_threads()
            if tx == 0:
                leave(scratch, s, epoch, mine)

    return pre_streams_grad
