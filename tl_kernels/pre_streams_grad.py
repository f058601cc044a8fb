"""``pre_grad`` and ``streams_grad`` in one: x and du come from memory once, 13u instead of 18u at n = 4.

dH_pre[j] = <x[j], du> takes a token's whole row, dx and dphi a slice of the channels of many tokens. So the blocks that share a tile of
tokens, a slice each, share its rows too, and meet in global memory (tl_kernels/meeting.py). A block has three roles:

    rows   asks for main's next tile; partial sums of dH_pre for some pieces of rows of tile i, published
    gates  the sums of all blocks for tile i - lag, and of them dz and c of the tile
    main   ``streams_grad`` of tile i - lag, as tl_kernels/streams_grad.py has it: first what needs no dz

What rows reads for its sums, it asks for again for main ``lag`` - 1 iterations later, when it is in L2: at 8192x4x2560 DRAM gave 1.03
times the floor's bytes with x one iteration behind, 1.2 times with two (results/notes.md, 2026-11-25, fourth session).

What all others wait for is main, so rows, which waits for memory anyway, issues its copies; and what they fill is swizzled: into rows
padded against conflicts a copy took 2.6 times the wavefronts (fifth session).

``keep`` 1 is another program: tl_kernels/pre_streams_grad_kept.py.

Only the first role's fragments have layouts by hand: TileLang 0.1.15 leaves out loops over such fragments where a role's threads do not
begin at 0.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.channel_slice import dphi_rows, slice_columns, slice_macros, slices
from tl_kernels.coefficients import sigmoid
from tl_kernels.gate_sums import LANES, across, dab_macros
from tl_kernels.kept_tiles import invalid_kept, scratch_of_kept, shared_bytes_of_kept
from tl_kernels.meeting import PASS_CONFIGS, ROLE, leave_of, number_of, place_of, tag, tagged, unserved_by, value_of
from tl_kernels.mma import ACC, high, low, padded
from tl_kernels.pre_streams_grad_kept import build_kept
from tl_kernels.sizes import ceildiv, vector_width
from tl_kernels.spec import Kernel, Tensor, too_much_shared
from tl_kernels.streams_grad import DX
from tl_kernels.widen import widths

#: Named barriers; 0 is T.sync_threads(), 1 and 2 are TileLang's.
TOP, MAIN, ROWS, GATES, READY = 3, 4, 5, 6, 7
WARPS = ROLE // 32
#: Registers a thread of each role, together the 128 that four warpgroups begin with: rows has 20 loads of 16 bytes under way.
MAIN_REGISTERS, ROWS_REGISTERS, GATES_REGISTERS = 144, 136, 88
#: Pieces of rows that a thread has under way at once, unrolled: with 32 (C = 8, n = 4) it was still compiling after four minutes.
ROUNDS = 8


def build(p, cfg):
    if cfg["keep"]:
        return build_kept(p, cfg)
    from tilelang.layout import make_swizzled_layout  # specs come without TileLang

    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, splits, threads = cfg["block_T"], cfg["block_C"], cfg["splits"], cfg["threads"]
    N, kb, kp = padded(M, 16), n * bc, dphi_rows(p, cfg)
    kg = slices(cfg) * slice_columns(p, cfg)
    lag, ring = cfg["lag"], ring_of(cfg)
    streams = tuple(range(n))
    rows = T.GemmWarpPolicy.FullRow
    everyone = threads + 2 * ROLE
    vec, G = vector_width(p), ceildiv(C, bc)
    lanes, pieces = pieces_of(p)
    units = bt * pieces  # pieces of rows in a tile, shared out among the blocks of a group
    few = few_of(p, cfg)
    beside = ROLE // lanes
    rounds = rounds_of(p, cfg)
    turns = tuple(range(rounds))
    whole = C % (lanes * vec) == 0
    words = n * pieces
    counters = splits * ring * words * bt
    rest = M - n + 1
    share = ceildiv(pieces, 2)  # pieces that a thread adds up: two to a token
    leave, number = leave_of(G, counters, ring), number_of(ring)
    L, (add_rows_of_dab, write_dab) = M + 3, dab_macros(p, cfg, GATES)
    T_ = T.dynamic("T")
    S2_ = T.dynamic("S2")

    stage_phi, read_rows, add_gradients, add_x, put_back, write_dx, write_dphi = slice_macros(p, cfg)

    def place(s, use, q, t):
        return (place_of(s, use, ring) * words + q) * bt + t

    def row(q, half):
        """The q-th word of a token that a thread adds up; past the last piece its last again, which does not count."""
        return T.min(half * share + q // n, pieces - 1) * n + q % n

    def halves(size):
        """[size, 2, bt]: a thread has half of what belongs to a token."""
        return T.Fragment((size, 2, bt), forward_thread_fn=lambda q, half, t: half * bt + t, forward_index_fn=lambda q, half, t: q)

    def token(size):
        return T.Fragment((size, bt), forward_thread_fn=lambda q, t: t, forward_index_fn=lambda q, t: q)

    def scalar():
        return T.Fragment((bt,), forward_thread_fn=lambda t: t, forward_index_fn=lambda t: 0)

    @T.macro
    def load(tile, t0, c0, tensors, tiles):
        dy, du, x, H_pre, H_res = tensors
        dy_s, du_s, x_s, pre_s, res_s = tiles
        for j in T.unroll(n):
            T.async_copy(x[t0 : t0 + bt, j, c0 : c0 + bc], x_s[tile % 2, :, j * bc : j * bc + bc])
            T.async_copy(dy[t0 : t0 + bt, j, c0 : c0 + bc], dy_s[tile % 2, :, j * bc : j * bc + bc])
        T.async_copy(du[t0 : t0 + bt, c0 : c0 + bc], du_s[tile % 2, :, 0:bc])
        T.async_copy(H_res[t0 : t0 + bt, :, :], res_s[tile % 2, :, :, :])
        T.async_copy(H_pre[t0 : t0 + bt, :], pre_s[tile % 2, :, :])

    @T.macro
    def ask_rows(first, t0, tokens, x, du, into):
        """A piece of a row of each stream and of du, from unit ``first`` of the tile that begins at t0."""
        for j in streams:
            for w, lane, k in T.Parallel(WARPS, 32, vec):
                e = T.min(first + w * 32 // lanes, units - 1)
                c = T.min((e % pieces * lanes + w * 32 % lanes + lane) * vec, C - vec)
                into[j][w, lane, k] = x[T.min(t0 + e // pieces, tokens - 1), j, c + k]
        for w, lane, k in T.Parallel(WARPS, 32, vec):
            e = T.min(first + w * 32 // lanes, units - 1)
            c = T.min((e % pieces * lanes + w * 32 % lanes + lane) * vec, C - vec)
            into[n][w, lane, k] = du[T.min(t0 + e // pieces, tokens - 1), c + k]

    @T.macro
    def add_rows(r, first, rows_f, held, part_s):
        """What they add to dH_pre, a sum a warp."""
        wide_f, dwide_f, sums_f, total = held
        for w, lane, k in T.Parallel(WARPS, 32, vec):
            dwide_f[w, lane, k] = rows_f[n][w, lane, k]
        for j in streams:
            for w, lane, k in T.Parallel(WARPS, 32, vec):
                wide_f[w, lane, k] = rows_f[j][w, lane, k]
            T.clear(sums_f[j])
            for k in T.unroll(vec):
                for w, lane in T.Parallel(WARPS, 32):
                    sums_f[j][w, lane] += wide_f[w, lane, k] * dwide_f[w, lane, k]
            if not whole:  # channels past the last count nothing
                for w, lane in T.Parallel(WARPS, 32):
                    e = T.min(first + r * beside + w * 32 // lanes, units - 1)
                    if (e % pieces * lanes + w * 32 % lanes + lane) * vec >= C:
                        sums_f[j][w, lane] = 0.0
        for j in streams:
            T.reduce_sum(sums_f[j], total, dim=1)
            for w in T.Parallel(WARPS):
                part_s[r, j, w] = total[w]

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
        scratch: T.Tensor((scratch_of(p, cfg),), "uint32"),
    ):
        with T.Kernel(G, splits, threads=everyone) as (block, s):
            tx = T.get_thread_binding()
            c0 = block * bc
            x_s = T.alloc_shared((2, bt, kp), dtype)
            dy_s = T.alloc_shared((2, bt, kb), dtype)
            du_s = T.alloc_shared((2, bt, bc), dtype)
            res_s = T.alloc_shared((2, bt, n, n), ACC)
            pre_s = T.alloc_shared((2, bt, n), ACC)
            dz_hi = T.alloc_shared((N, bt), dtype)
            dz_lo = T.alloc_shared((N, bt), dtype)
            c_s = T.alloc_shared((bt,), ACC)
            phi_hi = T.alloc_shared((N, kg), dtype)
            phi_lo = T.alloc_shared((N, kg), dtype)
            dzs_s = T.alloc_shared((2, rest, bt), ACC)
            zs_s = T.alloc_shared((2, n + 1, bt), ACC)
            part_s = T.alloc_shared((rounds, n, WARPS), ACC)
            dab_s = T.alloc_shared((LANES, across(p)), ACC)
            dab_f = T.alloc_fragment((LANES, across(p)), ACC)
            sum_s = T.alloc_shared((2, n + 1, bt), ACC)
            g_TK = T.alloc_fragment((bt, kg), ACC)
            dphi_KN = T.alloc_fragment((kp, N), ACC)
            dy_f = T.alloc_fragment((n, bt, bc), dtype)
            du_f = T.alloc_fragment((bt, bc), dtype)
            x_f = T.alloc_fragment((bt, bc), dtype)
            row_fs = [[T.alloc_fragment((WARPS, 32, vec), dtype) for _ in range(n + 1)] for _ in range(rounds)]
            wide_f = T.alloc_fragment((WARPS, 32, vec), ACC)
            dwide_f = T.alloc_fragment((WARPS, 32, vec), ACC)
            sums_f = [T.alloc_fragment((WARPS, 32), ACC) for _ in range(n)]
            total = T.alloc_fragment((WARPS,), ACC)
            held = (wide_f, dwide_f, sums_f, total)
            word = T.alloc_fragment((share * n, 2, bt), "uint32")
            old = T.alloc_fragment((2, bt), "uint32")
            both = T.alloc_fragment((n, 2, bt), ACC)
            slope = T.alloc_fragment((n, bt), ACC)
            dh = T.alloc_fragment((n, bt), ACC)
            db = T.alloc_fragment((n, bt), ACC)
            bias = T.alloc_fragment((n, bt), ACC)
            gain = T.alloc_fragment((bt,), ACC)
            dalpha = T.alloc_fragment((bt,), ACC)
            dots = T.alloc_fragment((bt,), ACC)
            T.annotate_layout(
                {
                    word: halves(share * n),
                    both: halves(n),
                    old: T.Fragment((2, bt), forward_thread_fn=lambda half, t: half * bt + t, forward_index_fn=lambda half, t: 0),
                    **{v: token(n) for v in (dh, db, bias, slope)},
                    **{v: scalar() for v in (gain, dalpha, dots)},
                    **{v: make_swizzled_layout(v) for v in (dy_s, du_s)},
                }
            )
            epoch = T.alloc_var("uint32")
            epoch = scratch[counters + 2 * s]
            mine = T.max(T.ceildiv(T.ceildiv(T_, bt) - s, splits), 0)

            if tx < ROLE:
                T.set_max_nreg(GATES_REGISTERS, 0)
                for m, t in T.Parallel(N, bt):
                    dz_hi[m, t] = 0
                for m, t in T.Parallel(N, bt):
                    dz_lo[m, t] = 0
                for q, t in T.Parallel(n, bt):
                    bias[q, t] = b[q]
                for t in T.Parallel(bt):
                    gain[t] = alpha[0]
                T.clear(db)
                T.clear(dalpha)
                for i in T.serial(mine + lag):
                    tile = i - lag
                    t0 = (tile * splits + s) * bt
                    st = i % 2
                    T.ptx_wait_group(0)
                    T.sync_threads(TOP, everyone)
                    if tile >= 0:
                        use = number(epoch, tile)
                        for q, half, t in T.Parallel(share * n, 2, bt):
                            word[q, half, t] = T.atomic_load(scratch[place(s, use, row(q, half), t)], memory_order="relaxed")
                    if tile + 1 >= 0 and tile + 1 < mine:
                        t1 = t0 + splits * bt
                        T.async_copy(dzs[n : M + 1, t1 : t1 + bt], dzs_s[(i + 1) % 2, :, :])
                        T.async_copy(zs[0:n, t1 : t1 + bt], zs_s[(i + 1) % 2, 0:n, :])
                        T.async_copy(zs[M : M + 1, t1 : t1 + bt], zs_s[(i + 1) % 2, n : n + 1, :])
                    if tile >= 0:
                        # while the words are on their way
                        use = number(epoch, tile)
                        for m, t in T.Parallel(rest - 1, bt):
                            dz_hi[n + m, t] = high(dzs_s[st, m, t], dtype)
                            dz_lo[n + m, t] = low(dzs_s[st, m, t], dtype)
                        for j in T.unroll(n):
                            for t in T.Parallel(bt):
                                h = gain[t] * T.if_then_else(zs_s[st, n, t] > 0, zs_s[st, j, t] * zs_s[st, n, t], 0.0) + bias[j, t]
                                slope[j, t] = T.if_then_else(t0 + t < T_, sigmoid(h) * (1.0 - sigmoid(h)), 0.0)
                        T.clear(old)
                        for q in T.unroll(share * n):
                            for half, t in T.Parallel(2, bt):
                                old[half, t] = T.bitwise_or(old[half, t], T.bitwise_xor(word[q, half, t], tag(use, ring)))
                        for half, t in T.Parallel(2, bt):
                            while T.bitwise_and(old[half, t], T.uint32(1)) != 0:
                                old[half, t] = T.uint32(0)
                                for q in T.unroll(share * n):
                                    word[q, half, t] = T.atomic_load(scratch[place(s, use, row(q, half), t)], memory_order="relaxed")
                                    old[half, t] = T.bitwise_or(old[half, t], T.bitwise_xor(word[q, half, t], tag(use, ring)))
                        T.clear(both)
                        for q in T.unroll(share * n):
                            for half, t in T.Parallel(2, bt):
                                value = value_of(word[q, half, t])
                                both[q % n, half, t] += T.if_then_else(half * share + q // n < pieces, value, 0.0)
                        for j, half, t in T.Parallel(n, 2, bt):
                            sum_s[half, j, t] = both[j, half, t]
                        T.sync_threads(GATES, ROLE)
                        T.clear(dots)
                        for j in T.unroll(n):
                            for t in T.Parallel(bt):
                                dh[j, t] = T.if_then_else(t0 + t < T_, sum_s[0, j, t] + sum_s[1, j, t], 0.0) * slope[j, t]
                                db[j, t] += dh[j, t]
                                dots[t] += dh[j, t] * zs_s[st, j, t]
                        for j in T.unroll(n):
                            for t in T.Parallel(bt):
                                dz_hi[j, t] = high(dh[j, t] * gain[t] * zs_s[st, n, t], dtype)
                                dz_lo[j, t] = low(dh[j, t] * gain[t] * zs_s[st, n, t], dtype)
                        for t in T.Parallel(bt):
                            r = zs_s[st, n, t]
                            # rows whose norm overflowed have no gradient through z
                            d = T.if_then_else(r > 0, dots[t] * r, 0.0)
                            dalpha[t] += d
                            c_s[t] = (dzs_s[st, rest - 1, t] - gain[t] * d * r * r) * (1.0 / K)
                        T.fence_proxy_async()
                        T.named_barrier_arrive(READY, threads + ROLE)
                if block == 0:
                    T.sync_threads(GATES, ROLE)
                    add_rows_of_dab(s, S2_, dab_S, 0, 1, dab_f, dab_s)
                    write_dab(s, dalpha, db, dab_s, sum_s, dab)
            elif tx < 2 * ROLE:
                T.set_max_nreg(ROWS_REGISTERS, 1)
                for i in T.serial(mine + lag):
                    T.ptx_wait_group(0)
                    T.fence_proxy_async()
                    T.sync_threads(TOP, everyone)
                    ahead = i + 1 - lag
                    if ahead >= 0 and ahead < mine:
                        load(i + 1, (ahead * splits + s) * bt, c0, (dy, du, x, H_pre, H_res), (dy_s, du_s, x_s, pre_s, res_s))
                    if i < mine:
                        first = block * units // G
                        for r in turns:
                            ask_rows(first + r * beside, (i * splits + s) * bt, T_, x, du, row_fs[r])
                        for r in turns:
                            add_rows(r, first, row_fs[r], held, part_s)
                        T.sync_threads(ROWS, ROLE)
                        for u, j in T.Parallel(few, n):
                            if first + u < (block + 1) * units // G:
                                value = T.alloc_var(ACC)
                                value = 0.0
                                for w in T.unroll(lanes // 32):
                                    value += part_s[u // beside, j, u % beside * (lanes // 32) + w]
                                use = number(epoch, i)
                                bits = tagged(value, use, ring)
                                e = first + u
                                T.atomic_store(scratch[place(s, use, e % pieces * n + j, e // pieces)], bits, memory_order="relaxed")
            else:
                T.set_max_nreg(MAIN_REGISTERS, 1)
                stage_phi(phi, block, phi_hi, phi_lo)
                T.clear(dphi_KN)
                T.fence_proxy_async()
                for i in T.serial(mine + lag):
                    tile = i - lag
                    t0 = (tile * splits + s) * bt
                    st = i % 2
                    T.sync_threads(TOP, everyone)
                    if tile >= 0:
                        read_rows(st, dy_s, st, du_s, dy_f, du_f)
                        T.clear(g_TK)
                        add_gradients(g_TK, st, pre_s, du_f, lambda st, t, i, j: res_s[st, t, i, j], dy_f)
                        T.sync_threads(READY, threads + ROLE)
                        T.wgmma_gemm(dz_hi, phi_hi, g_TK, transpose_A=True, policy=rows)
                        T.wgmma_gemm(dz_hi, phi_lo, g_TK, transpose_A=True, policy=rows)
                        T.wgmma_gemm(dz_lo, phi_hi, g_TK, transpose_A=True, policy=rows)
                        # dphi^T = x^T dz
                        T.wgmma_gemm(x_s[st, :, :], dz_hi, dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                        T.wgmma_gemm(x_s[st, :, :], dz_lo, dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                        T.wait_wgmma(2)  # not for the two of dphi, which may take until the end of the tile
                        add_x(g_TK, st, lambda st, t: c_s[t], x_s, x_f)
                        put_back(g_TK, st, dy_s)
                        T.wait_wgmma(0)
                        T.sync_threads(MAIN, threads)
                        write_dx(dx, t0, block, T_, dy_s, st)
                write_dphi(dphi, s, block, dphi_KN)
            T.sync_threads()
            if tx == 0:
                leave(scratch, s, epoch, mine)

    return pre_streams_grad


def pieces_of(p):
    """Threads that take a piece of a row, 16 bytes of each stream each, and the pieces of a row."""
    vec = vector_width(p)
    lanes = ROLE // 2 if p.C % (ROLE * vec) else ROLE
    return lanes, ceildiv(p.C, lanes * vec)


def few_of(p, cfg):
    """Pieces of a tile's rows that a block has at most."""
    return ceildiv(cfg["block_T"] * pieces_of(p)[1], ceildiv(p.C, cfg["block_C"]))


def rounds_of(p, cfg):
    """Pieces that a group of threads adds up one after another."""
    return ceildiv(few_of(p, cfg), ROLE // pieces_of(p)[0])


def ring_of(cfg):
    """Places that tiles pass through in scratch. A block that publishes tile i has read tile i - 1 - lag, which all had published by then,
    each after it had read tile i - 2 - 2 lag.
    """
    return 2 * cfg["lag"] + 2


def scratch_of(p, cfg):
    """32-bit words of scratch: the places, then two counters a group."""
    if cfg["keep"]:
        return scratch_of_kept(p, cfg)
    return cfg["splits"] * (ring_of(cfg) * p.n * pieces_of(p)[1] * cfg["block_T"] + 2)


def shared_bytes(p, cfg):
    """Shared memory, an upper bound."""
    if cfg["keep"]:
        return shared_bytes_of_kept(p, cfg)
    n, bt, bc, kp, N = p.n, cfg["block_T"], cfg["block_C"], dphi_rows(p, cfg), padded(p.M, 16)
    staged = 2 * (bt * (bc * (n + 1) + kp) * p.itemsize + 4 * bt * (n * n + n + 1))
    products = 2 * N * 2 * (bt + slices(cfg) * slice_columns(p, cfg))
    rounds = rounds_of(p, cfg)
    beside = 4 * (2 * bt * (p.M - n + 1 + 2 * (n + 1)) + bt + rounds * n * WARPS + LANES * across(p))
    return staged + products + beside


def invalid(p, cfg):
    """Why a configuration cannot work, or None."""
    bt, bc, threads = cfg["block_T"], cfg["block_C"], cfg["threads"]
    if cfg["keep"]:
        return invalid_kept(p, cfg)
    if cfg["lag"] > 3 or cfg["ahead"] != 1 or cfg["turns"] != 2 or cfg["widen"] != 3:
        return f"keep=0: wanted lag of at most 3, ahead=1, turns=2, widen=3, not {dict(cfg)}"
    if bt != 64 or threads != 256:
        return f"block_T={bt}, threads={threads}: wanted 64 tokens and 256 threads, for which there are registers"
    if bc % (8 * slices(cfg)):
        return f"block_C={bc}, threads={threads}: {slices(cfg)} slices of dz phi, wanted a multiple of 8 channels in each"
    if dphi_rows(p, cfg) > 2 * p.n * bc:
        return f"block_C={bc}, threads={threads}: {threads // 32} warps need at least {threads // 4} columns of x"
    G = ceildiv(p.C, bc)
    if bt * pieces_of(p)[1] < G:
        return f"block_C={bc}: {G} blocks to a group, wanted at most {bt * pieces_of(p)[1]}, one for each piece of a row"
    if rounds_of(p, cfg) > ROUNDS:
        return f"C={p.C}, block_C={bc}: {G} blocks for the rows of 64 tokens, wanted more"
    if G * cfg["splits"] > 256:
        return f"splits={cfg['splits']}: {G * cfg['splits']} blocks, wanted about as many as there are multiprocessors"
    return too_much_shared(shared_bytes(p, cfg))


def _config(block_C, splits, lag, keep=0, ahead=1, turns=2, widen=3):
    cfg = {"block_T": 32 if keep else 64, "block_C": block_C, "splits": splits, "threads": 256, "lag": lag}
    return {**cfg, "keep": keep, "ahead": ahead, "turns": turns, "widen": widen}


def default(p):
    """For about 132 multiprocessors."""
    return _config(64, max(1, 132 // ceildiv(p.C, 64)), 2)


pre_streams_grad = Kernel(
    name="pre_streams_grad",
    build=build,
    inputs=(
        Tensor("dy", "T n C", "stream"),
        Tensor("du", "T C", "stream"),
        Tensor("x", "T n C", "stream"),
        Tensor("dzs", "Q T"),
        Tensor("dab", "S2 M+3", split=True),
        Tensor("zs", "Q T"),
        Tensor("alpha", "3"),
        Tensor("b", "M"),
        Tensor("H_pre", "T n"),
        Tensor("H_res", "T n n"),
        Tensor("phi", "M K"),
    ),
    outputs=(DX, Tensor("dphi", "S M K", split=True), Tensor("dab", "S M+3", split=True)),
    space=lambda p: {
        "block_T": (32, 64),
        "block_C": (32, 64, 128),
        "splits": (1, 2, 3, 4, 6, 8, 13, 16),
        "threads": (256,),
        "lag": (1, 2, 3, 4),
        "keep": (0, 1),
        "ahead": (1, 2),
        "turns": (2, 3, 4),
        "widen": widths(p),
    },
    default=default,
    invalid=invalid,
    unserved=unserved_by(invalid, default),
    least_arch=90,
    last_arch=90,  # wgmma
    shortcut=True,
    scratch=scratch_of,
    seeds=(
        *(_config(64, splits, 4, keep=1, ahead=2, turns=3, widen=2) for splits in (3, 2, 1, 4, 6)),
        *(_config(64, splits, 3, keep=1, ahead=2, turns=4, widen=2) for splits in (3, 2, 1, 4, 6)),
        _config(128, 6, 3, keep=1, ahead=2, turns=4, widen=2),
        *(_config(64, splits, lag) for splits, lag in ((3, 2), (2, 2), (1, 2), (3, 3))),
    ),
    reference=reference.pre_streams_grad,
    options={},
    pass_configs=lambda cfg: PASS_CONFIGS,
    resident=lambda p, cfg: ceildiv(p.C, cfg["block_C"]),
)
