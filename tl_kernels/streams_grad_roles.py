"""``streams_grad`` with a role of its own for the copies: they go on while the products are under way, and no tile waits for a whole one.

    feed   copies tile k + 1 as soon as main is done with tile k - 1, whether tile k has arrived or not; splits dz for the products
    main   dx and dphi of tile k

A stage is handed over by two mbarriers. FULL counts feed's threads twice: once when their copies have arrived (the copies say so
themselves), once when they have written dz, H_res and H_pre. FREE counts main's.

Blocks in whole slices and splits seldom are as many as there are multiprocessors. So there may be ``helpers``: blocks that take the last
tiles of several slices, one slice after another, with a split of dphi of their own.
"""

import tilelang.language as T

from tl_kernels.channel_slice import dphi_rows, slice_columns, slice_macros, slices
from tl_kernels.meeting import ROLE
from tl_kernels.mma import ACC, high, low, padded
from tl_kernels.sizes import ceildiv
from tl_kernels.widen import widen

#: A named barrier of main's threads; 0 is T.sync_threads(), 1 and 2 are TileLang's.
MAIN = 3
#: Floats more in a token's row of H_res: rows of eight tokens in different banks.
PAD = 4
#: Tiles that a helper loses to each new slice: phi is staged while nothing else happens.
CHANGE = 1


def build_roles(p, cfg):
    from tilelang.layout import make_swizzled_layout  # specs come without TileLang

    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, splits, threads, helpers = (cfg[k] for k in ("block_T", "block_C", "splits", "threads", "helpers"))
    N, kb, kp = padded(M, 16), n * bc, dphi_rows(p, cfg)
    kg = slices(cfg) * slice_columns(p, cfg)
    G = ceildiv(C, bc)
    own = splits - 1 if helpers else splits  # splits of blocks with one slice
    each = ceildiv(G, helpers) if helpers else 0  # slices of a helper
    feed_registers, main_registers = registers_of(p)
    rows = T.GemmWarpPolicy.FullRow  # every warp its own rows of dphi: x is then read once
    T_ = T.dynamic("T")

    stage_phi, read_rows, add_gradients, add_x, put_back, write_dx, write_dphi = slice_macros(p, cfg)

    quarter = bt // 4
    # four tokens of dz a thread, so that their parts are stored 8 bytes at a time
    fours = T.Fragment(
        (N, quarter, 4),
        forward_thread_fn=lambda m, t, e: (m * quarter + t) % ROLE,
        forward_index_fn=lambda m, t, e: (m * quarter + t) // ROLE * 4 + e,
    )

    def tokens_of(k, run, tiles):
        """Where tile k begins; behind all tokens for a block that has none."""
        first, step, length, end = run
        tile = first + k % length * step
        return T.if_then_else(tile < end, tile, tiles) * bt

    @T.macro
    def load(t0, tokens, tensors, held):
        dzs, H_res, H_pre = tensors
        dz_f, c_f, res_f, pre_f = held
        for m, t, e in T.Parallel(N, quarter, 4):
            dz_f[m, t, e] = T.if_then_else(m < M and t0 + t * 4 + e < tokens, dzs[m, t0 + t * 4 + e], 0.0)
        for t in T.Parallel(bt):
            c_f[t] = T.if_then_else(t0 + t < tokens, dzs[M, t0 + t], 0.0)
        for t, q in T.Parallel(bt, even(n * n)):
            res_f[t, q] = T.if_then_else(q < n * n and t0 + t < tokens, H_res[t0 + t, q // n, q % n], 0.0)
        for t, q in T.Parallel(bt, even(n)):
            pre_f[t, q] = T.if_then_else(q < n and t0 + t < tokens, H_pre[t0 + t, q], 0.0)

    @T.macro
    def copy(st, t0, slice_, tensors, tiles):
        x, dy, du = tensors
        x_s, dy_s, du_s = tiles
        c0 = slice_ * bc
        for j in T.unroll(n):
            T.async_copy(x[t0 : t0 + bt, j, c0 : c0 + bc], x_s[st, :, j * bc : j * bc + bc])
            T.async_copy(dy[t0 : t0 + bt, j, c0 : c0 + bc], dy_s[st, :, j * bc : j * bc + bc])
        T.async_copy(du[t0 : t0 + bt, c0 : c0 + bc], du_s[st, :, 0:bc])

    @T.prim_func
    def streams_grad(
        dy: T.Tensor((T_, n, C), dtype),
        du: T.Tensor((T_, C), dtype),
        x: T.Tensor((T_, n, C), dtype),
        dzs: T.Tensor((M + 1, T_), ACC),
        H_pre: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        phi: T.Tensor((M, K), ACC),
        dx: T.Tensor((T_, n, C), dtype),
        dphi: T.Tensor((splits, M, K), ACC),
    ):
        with T.Kernel(G * own + helpers, threads=ROLE + threads) as block:
            T.import_source(widen(cfg))
            tx = T.get_thread_binding()
            x_s = T.alloc_shared((2, bt, kp), dtype)
            dy_s = T.alloc_shared((2, bt, kb), dtype)
            du_s = T.alloc_shared((2, bt, bc), dtype)
            res_s = T.alloc_shared((2, bt, n * n + PAD), ACC)
            pre_s = T.alloc_shared((2, bt, even(n)), ACC)
            c_s = T.alloc_shared((2, bt), ACC)
            dz_hi = T.alloc_shared((2, N, bt), dtype)
            dz_lo = T.alloc_shared((2, N, bt), dtype)
            # what columns past a slice's streams hold comes out in columns that nobody reads
            phi_hi = T.alloc_shared((N, kg), dtype)
            phi_lo = T.alloc_shared((N, kg), dtype)
            dz_f = T.alloc_fragment((N, quarter, 4), ACC)
            res_f = T.alloc_fragment((bt, even(n * n)), ACC)
            pre_f = T.alloc_fragment((bt, even(n)), ACC)
            c_f = T.alloc_fragment((bt,), ACC)
            g_TK = T.alloc_fragment((bt, kg), ACC)
            dphi_KN = T.alloc_fragment((kp, N), ACC)
            dy_f = T.alloc_fragment((n, bt, bc), dtype)
            du_f = T.alloc_fragment((bt, bc), dtype)
            x_f = T.alloc_fragment((bt, bc), dtype)
            full = T.alloc_barrier([2 * ROLE] * 2)
            free = T.alloc_barrier([threads] * 2)
            T.annotate_layout({dz_f: fours, **{v: make_swizzled_layout(v) for v in ((dy_s, du_s) if bc % 32 == 0 else (dy_s,))}})
            tiles = T.ceildiv(T_, bt)
            # tiles of each slice that its helper takes, so that all blocks take about as long
            left = T.max((tiles - own * each * CHANGE) // (1 + own * each), 1) if helpers else 0
            most = T.max(tiles - left, 0)
            # a block's tiles: of slice c, c + helpers, ... tiles first, first + step, ..., ``length`` of each
            first = T.alloc_var("int32")
            length = T.alloc_var("int32")
            count = T.alloc_var("int32")
            end = T.alloc_var("int32")
            here = T.alloc_var("int32")
            first = block // G
            end = most
            here = block % G
            length = T.max(T.ceildiv(most - block // G, own), 1)
            count = length
            if helpers and block >= G * own:
                first = most
                end = tiles
                here = block - G * own
                length = left
                count = left * T.ceildiv(G - here, helpers)
            step = T.if_then_else(block < G * own, own, 1) if helpers else own
            part = T.if_then_else(block < G * own, block // G, own) if helpers else block // G
            next_t0 = T.alloc_var("int32")
            t0 = T.alloc_var("int32")
            slice_ = T.alloc_var("int32")

            if tx < ROLE:
                T.set_max_nreg(feed_registers, 0)
                next_t0 = tokens_of(0, (first, step, length, end), tiles)
                load(next_t0, T_, (dzs, H_res, H_pre), (dz_f, c_f, res_f, pre_f))
                for k in T.serial(count):
                    st = k % 2
                    slice_ = here + k // length * helpers
                    T.mbarrier_wait_parity(free[st], k // 2 % 2 ^ 1)
                    copy(st, next_t0, slice_, (x, dy, du), (x_s, dy_s, du_s))
                    T.cp_async_barrier_noinc(full[st])
                    for m, t, e in T.Parallel(N, quarter, 4):
                        dz_hi[st, m, t * 4 + e] = high(dz_f[m, t, e], dtype)
                        dz_lo[st, m, t * 4 + e] = low(dz_f[m, t, e], dtype)
                    for t, q in T.Parallel(bt, even(n * n)):
                        res_s[st, t, q] = res_f[t, q]
                    for t, q in T.Parallel(bt, even(n)):
                        pre_s[st, t, q] = pre_f[t, q]
                    for t in T.Parallel(bt):
                        c_s[st, t] = c_f[t] * (1.0 / K)
                    T.fence_proxy_async()
                    T.mbarrier_arrive(full[st])
                    next_t0 = tokens_of(k + 1, (first, step, length, end), tiles)
                    load(next_t0, T_, (dzs, H_res, H_pre), (dz_f, c_f, res_f, pre_f))
            else:
                T.set_max_nreg(main_registers, 1)
                for k in T.serial(count):
                    st = k % 2
                    t0 = tokens_of(k, (first, step, length, end), tiles)
                    slice_ = here + k // length * helpers
                    if k % length == 0:
                        stage_phi(phi, slice_, phi_hi, phi_lo)
                        T.clear(dphi_KN)
                        T.fence_proxy_async()
                        T.sync_threads(MAIN, threads)
                    T.mbarrier_wait_parity(full[st], k // 2 % 2)
                    T.fence_proxy_async()
                    T.wgmma_gemm(dz_hi[st, :, :], phi_hi, g_TK, transpose_A=True, clear_accum=True, policy=rows)
                    T.wgmma_gemm(dz_hi[st, :, :], phi_lo, g_TK, transpose_A=True, policy=rows)
                    T.wgmma_gemm(dz_lo[st, :, :], phi_hi, g_TK, transpose_A=True, policy=rows)
                    # dphi^T = x^T dz
                    T.wgmma_gemm(x_s[st, :, :], dz_hi[st, :, :], dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                    T.wgmma_gemm(x_s[st, :, :], dz_lo[st, :, :], dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                    read_rows(st, dy_s, st, du_s, dy_f, du_f)
                    T.wait_wgmma(2)  # not for the two of dphi, which may take until the end of the tile
                    add_gradients(g_TK, st, pre_s, du_f, lambda st, t, i, j: res_s[st, t, i * n + j], dy_f)
                    add_x(g_TK, st, lambda st, t: c_s[st, t], x_s, x_f)
                    put_back(g_TK, st, dy_s)
                    T.wait_wgmma(0)
                    T.sync_threads(MAIN, threads)
                    write_dx(dx, t0, slice_, T_, dy_s, st)
                    T.mbarrier_arrive(free[st])
                    if k % length == length - 1:
                        write_dphi(dphi, part, slice_, dphi_KN)

    return streams_grad


def even(size):
    """What feed's threads can share out evenly: a tile's 64 tokens times this."""
    return padded(size, 2)


def registers_of(p):
    """Of a thread of each role; together at most the 168 that three warpgroups begin with. feed holds a tile's dz and coefficients."""
    feed = 88 if p.n <= 4 else 120
    return feed, (168 * 3 - feed) // 2


def shared_bytes_of_roles(p, cfg):
    """Shared memory, an upper bound."""
    n, bt, bc, kp, N = p.n, cfg["block_T"], cfg["block_C"], dphi_rows(p, cfg), padded(p.M, 16)
    staged = bt * (2 * (bc * (n + 1) + kp) + 4 * (n * n + PAD + even(n) + 1) + 4 * N)
    return 2 * staged + 4 * N * slices(cfg) * slice_columns(p, cfg) + 32


def invalid_roles(p, cfg):
    """Why a configuration with roles cannot work, or None."""
    bt, threads, splits, helpers = cfg["block_T"], cfg["threads"], cfg["splits"], cfg["helpers"]
    if bt != 64 or threads != 256 or cfg["stages"] != 2 or not cfg["overlap"] or not cfg["swizzle"]:
        return f"roles=1: wanted block_T=64, threads=256, stages=2, overlap=1, swizzle=1, not {dict(cfg)}"
    if helpers and splits == 1:
        return f"helpers={helpers}: one of the splits is theirs, wanted at least 2"
    if helpers > ceildiv(p.C, cfg["block_C"]):
        return f"helpers={helpers}: wanted at most one for each of {ceildiv(p.C, cfg['block_C'])} slices"
    return None


def helpers_of(p):
    """How many helpers are worth trying where 132 multiprocessors share slices of 64 channels: as many as there are multiprocessors left,
    with as few slices more for one than for another.
    """
    G = ceildiv(p.C, 64)
    left = 132 % G if G <= 132 else 0
    return ceildiv(G, ceildiv(G, left)) if left else 0
