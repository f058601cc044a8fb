"""The whole gradient of x in one pass, written once: dx[j] = sum_i H_res[i,j] dy[i] + H_pre[j] du + (dz phi)_j + c/K x[j]; and dphi.

The three uses of x (``post_res``, ``pre``, ``project``) meet here, so autograd has nothing to add: 13u at n = 4. A block owns a slice of
the channels, whose phi and dphi stay on chip, and walks over its split of the tokens; the next tile is on its way while the present one is
worked on. dphi is summed per split (``sum_parts`` adds the splits), so it is bitwise repeatable.

The four terms of dx meet in the layout the product leaves dz phi in, all streams at once; dx takes the place of dy, which nobody reads any
more, and leaves from there in rows. Each value is converted once. (Summed in rows of 16 bytes, a stream at a time, it took 10%
longer at n = 4, C = 2560 and half as long again at n = 8: results/notes.md.)
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.channel_slice import dphi_rows, slice_columns, slice_macros, slices
from tl_kernels.meeting import PASS_CONFIGS
from tl_kernels.mma import ACC, can_stage, high, low, mma_dtype, padded, x_parts
from tl_kernels.spec import SHARED_LIMIT, Kernel, Tensor, too_much_shared
from tl_kernels.streams_grad_roles import build_roles, helpers_of, invalid_roles, shared_bytes_of_roles
from tl_kernels.widen import widen, widths

#: Channels more in a staged row that is read in the layout of a product and is not swizzled: rows of eight tokens in different banks.
#: Copies of 16 bytes a thread into such rows take 2.6 times the wavefronts (results/notes.md, 2026-11-25); hence the knob ``swizzle``.
PAD = 8


def build(p, cfg):
    if cfg["roles"]:
        return build_roles(p, cfg)
    from tilelang.layout import make_swizzled_layout  # specs come without TileLang

    n, C, M, K, dtype, mma = p.n, p.C, p.M, p.K, p.dtype, mma_dtype(p)
    bt, bc, splits, stages = cfg["block_T"], cfg["block_C"], cfg["splits"], cfg["stages"]
    N = padded(M, 16)
    kb = n * bc
    kp = dphi_rows(p, cfg)
    direct, nx = dtype == mma, x_parts(p)
    fetch = T.copy if stages == 1 else T.async_copy
    overlap = cfg["overlap"] == 1
    pad = pad_of(cfg)
    kg = slices(cfg) * slice_columns(p, cfg)
    product = T.wgmma_gemm if overlap else T.gemm
    rows = T.GemmWarpPolicy.FullRow  # every warp its own rows of dphi: x is then read once
    T_ = T.dynamic("T")

    stage_phi, read_rows, add_gradients, add_x, put_back, write_dx, write_dphi = slice_macros(p, cfg)

    @T.macro
    def load(t0, c0, at, tensors, tiles):
        x, dy, du, dzs, H_res, H_pre = tensors
        x_s, dy_s, du_s, dz_s, res_s, pre_s = tiles
        for j in T.unroll(n):
            fetch(x[t0 : t0 + bt, j, c0 : c0 + bc], x_s[at, :, j * bc : j * bc + bc])
            fetch(dy[t0 : t0 + bt, j, c0 : c0 + bc], dy_s[at, :, j * bc : j * bc + bc])
        fetch(du[t0 : t0 + bt, c0 : c0 + bc], du_s[at, :, 0:bc])
        fetch(dzs[:, t0 : t0 + bt], dz_s[at, :, :])
        fetch(H_res[t0 : t0 + bt, :, :], res_s[at, :, :, :])
        fetch(H_pre[t0 : t0 + bt, :], pre_s[at, :, :])

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
        with T.Kernel(T.ceildiv(C, bc), splits, threads=cfg["threads"]) as (block, s):
            T.import_source(widen(cfg))
            c0 = block * bc
            x_s = T.alloc_shared((stages, bt, kp), dtype)
            dy_s = T.alloc_shared((stages, bt, kb + pad), dtype)
            du_s = T.alloc_shared((stages, bt, bc + pad), dtype)
            dz_s = T.alloc_shared((stages, M + 1, bt), ACC)
            res_s = T.alloc_shared((stages, bt, n, n), ACC)
            pre_s = T.alloc_shared((stages, bt, n), ACC)
            dz_hi = T.alloc_shared((N, bt), mma)
            dz_lo = T.alloc_shared((N, bt), mma)
            # what columns past a slice's streams hold comes out in columns that nobody reads
            phi_hi = T.alloc_shared((N, kg), mma)
            phi_lo = T.alloc_shared((N, kg), mma)
            g_TK = T.alloc_fragment((bt, kg), ACC)
            dphi_KN = T.alloc_fragment((kp, N), ACC)
            dy_f = T.alloc_fragment((n, bt, bc), dtype)
            du_f = T.alloc_fragment((bt, bc), dtype)
            x_f = T.alloc_fragment((bt, bc), dtype)
            if cfg["swizzle"]:
                T.annotate_layout({v: make_swizzled_layout(v) for v in (dy_s, du_s)})
            tensors, staged = (x, dy, du, dzs, H_res, H_pre), (x_s, dy_s, du_s, dz_s, res_s, pre_s)
            tiles = T.ceildiv(T.ceildiv(T_, bt), splits)
            if stages == 2:
                load(s * bt, c0, 0, tensors, staged)
            stage_phi(phi, block, phi_hi, phi_lo)
            T.clear(dphi_KN)
            T.clear(dz_hi)
            T.clear(dz_lo)
            for tile in T.serial(tiles):
                t0 = (tile * splits + s) * bt
                st = tile % stages
                if stages == 1:
                    load(t0, c0, 0, tensors, staged)
                else:
                    t1 = t0 + splits * bt
                    T.ptx_wait_group(0)
                    T.sync_threads()
                    if tile + 1 < tiles:
                        load(t1, c0, (tile + 1) % 2, tensors, staged)
                for m, t in T.Parallel(M, bt):
                    dz_hi[m, t] = high(dz_s[st, m, t], mma)
                    dz_lo[m, t] = low(dz_s[st, m, t], mma)
                T.sync_threads()
                product(dz_hi, phi_hi, g_TK, transpose_A=True, clear_accum=True, policy=rows)
                product(dz_hi, phi_lo, g_TK, transpose_A=True, policy=rows)
                product(dz_lo, phi_hi, g_TK, transpose_A=True, policy=rows)
                # dphi^T = x^T dz
                if direct and nx == 1:
                    product(x_s[st, :, :], dz_hi, dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                    product(x_s[st, :, :], dz_lo, dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                else:
                    x_hi = T.alloc_shared((bt, kp), mma)
                    for t, c in T.Parallel(bt, kp):
                        x_hi[t, c] = high(T.cast(x_s[st, t, c], ACC), mma)
                    T.gemm(x_hi, dz_hi, dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                    T.gemm(x_hi, dz_lo, dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                    if nx == 2:
                        x_lo = T.alloc_shared((bt, kp), mma)
                        for t, c in T.Parallel(bt, kp):
                            x_lo[t, c] = low(T.cast(x_s[st, t, c], ACC), mma)
                        T.gemm(x_lo, dz_hi, dphi_KN, transpose_A=True, transpose_B=True, policy=rows)
                read_rows(st, dy_s, st, du_s, dy_f, du_f)
                if overlap:
                    T.wait_wgmma(2)  # not for the two of dphi, which may take until the end of the tile
                add_gradients(g_TK, st, pre_s, du_f, lambda st, t, i, j: res_s[st, t, i, j], dy_f)
                add_x(g_TK, st, lambda st, t: dz_s[st, M, t] * (1.0 / K), x_s, x_f)
                put_back(g_TK, st, dy_s)
                if overlap:
                    T.wait_wgmma(0)
                T.sync_threads()
                write_dx(dx, t0, block, T_, dy_s, st)
            write_dphi(dphi, s, block, dphi_KN)

    return streams_grad


def pad_of(cfg):
    return 0 if cfg["swizzle"] else PAD


def shared_bytes(p, cfg):
    """Shared memory, but for up to 1 KiB between tiles that begin at multiples of that."""
    if cfg["roles"]:
        return shared_bytes_of_roles(p, cfg)
    n, bt, bc, stages, kp = p.n, cfg["block_T"], cfg["block_C"], cfg["stages"], dphi_rows(p, cfg)
    part, N = (2 if mma_dtype(p) == "bfloat16" else 4), padded(p.M, 16)
    staged = stages * (bt * (bc * (n + 1) + 2 * pad_of(cfg) + kp) * p.itemsize + 4 * bt * (p.M + 1 + n * n + n))
    split = 0 if part == 2 else x_parts(p) * bt * kp * 4
    return staged + split + 2 * N * part * (bt + slices(cfg) * slice_columns(p, cfg))


def invalid(p, cfg):
    """Why a configuration cannot work, or None."""
    bt, bc, threads = cfg["block_T"], cfg["block_C"], cfg["threads"]
    if bt % 16 or bc % 8:
        return f"block_T={bt}, block_C={bc}: wanted multiples of 16 and 8"
    if threads // 32 > bt // 16 * (bc // 8):
        return f"block_T={bt}, block_C={bc}, threads={threads}: a warp multiplies at least 16 tokens by 8 channels"
    if cfg["overlap"] and (mma_dtype(p) != "bfloat16" or bt % 64 or threads % 128):
        return f"overlap={cfg['overlap']}: wanted bf16 streams, block_T a multiple of 64 and threads of 128"
    if cfg["swizzle"] and (p.itemsize != 2 or cfg["stages"] == 1 or (bc % 32 and not cfg["roles"])):
        return f"swizzle={cfg['swizzle']}: wanted 16-bit streams, 2 stages and block_C a multiple of 32"
    if cfg["stages"] > 1 and not can_stage(p):
        return f"stages={cfg['stages']}: C={p.C} leaves rows off 16 bytes, wanted 1"
    if cfg["roles"] and (why := invalid_roles(p, cfg)):
        return why
    if cfg["helpers"] and not cfg["roles"]:
        return f"helpers={cfg['helpers']}: wanted roles=1"
    if cfg["widen"] not in widths(p):
        return f"widen={cfg['widen']}: wanted {' or '.join(map(str, widths(p)))} with streams of {p.dtype}"
    kp = dphi_rows(p, cfg)
    if kp > 2 * p.n * bc:
        return f"block_C={bc}, threads={threads}: {threads // 32} warps need at least {threads // 4} columns of x"
    if bc % (8 * slices(cfg)):
        return f"block_C={bc}, threads={threads}: {slices(cfg)} slices of dz phi, wanted a multiple of 8 channels in each"
    live = (kp * padded(p.M, 16) + bt * (bc * (p.n // 2 + 1) + slices(cfg) * slice_columns(p, cfg))) // threads
    if live > 250:
        return f"block_T={bt}, block_C={bc}: {live} live registers a thread would spill"
    return too_much_shared(shared_bytes(p, cfg))


def default(p):
    """Fits the 99 KiB of shared memory of the smallest supported chips, at n = 8 too."""
    tiles = ((64, 32, 128), (32, 32, 128), (32, 16, 128), (16, 16, 64), (16, 8, 32))
    rest = {"stages": 1, "overlap": 0, "swizzle": 0, "roles": 0, "helpers": 0, "widen": 3}
    cfgs = [{"block_T": bt, "block_C": bc, "splits": 8, "threads": threads, **rest} for bt, bc, threads in tiles]
    smallest = min(SHARED_LIMIT.values()) * 1024
    return next(cfg for cfg in cfgs if invalid(p, cfg) is None and shared_bytes(p, cfg) <= smallest)


def _seed(block_C, splits, roles=1, overlap=1, swizzle=1, helpers=0, widen=3):
    cfg = {"block_T": 64, "block_C": block_C, "splits": splits, "threads": 256, "stages": 2}
    return {**cfg, "overlap": overlap, "swizzle": swizzle, "roles": roles, "helpers": helpers, "widen": widen}


DX = Tensor("dx", "T n C", "stream")

streams_grad = Kernel(
    name="streams_grad",
    build=build,
    inputs=(
        Tensor("dy", "T n C", "stream"),
        Tensor("du", "T C", "stream"),
        Tensor("x", "T n C", "stream"),
        Tensor("dzs", "Q T"),
        Tensor("H_pre", "T n"),
        Tensor("H_res", "T n n"),
        Tensor("phi", "M K"),
    ),
    outputs=(DX, Tensor("dphi", "S M K", split=True)),
    space=lambda p: {
        "block_T": (32, 64),
        "block_C": (16, 32, 64, 128),
        "splits": (1, 2, 3, 4, 5, 6, 7, 8, 13, 16),
        "threads": (128, 256, 512),
        "stages": (1, 2),
        "overlap": (0, 1),
        "swizzle": (0, 1),
        "roles": (0, 1),
        "helpers": tuple({0: 0, helpers_of(p): 0}),
        "widen": widths(p),
    },
    default=default,
    invalid=invalid,
    seeds=(
        _seed(64, 4, helpers=10, widen=2),
        _seed(64, 3, widen=2),
        _seed(64, 2, helpers=19, widen=2),
        _seed(64, 2, widen=2),
        _seed(128, 7, helpers=10, widen=2),
        _seed(16, 4, widen=2),
        _seed(64, 4, helpers=10),
        _seed(64, 3),
        _seed(64, 2, helpers=19),
        _seed(64, 2),
        _seed(64, 3, helpers=4),
        _seed(64, 5, helpers=10),
        _seed(64, 7, helpers=10),
        _seed(128, 7, helpers=10),
        _seed(128, 6),
        _seed(16, 4),
        _seed(64, 1, roles=0),
        _seed(64, 3, roles=0, overlap=0),
        _seed(128, 13, roles=0, swizzle=0),
        {**_seed(32, 3, roles=0, overlap=0, swizzle=0), "block_T": 32},
    ),
    reference=reference.streams_grad,
    gpu_only=("threads", "stages", "overlap", "swizzle", "roles", "helpers", "widen"),
    pass_configs=lambda cfg: PASS_CONFIGS if cfg["roles"] else {},
)
