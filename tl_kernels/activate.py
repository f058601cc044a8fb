"""Scale and activate, Eq. 16-18: h = alpha z/r + b; H_pre = sigmoid(h) + pre_eps, H_post = post_mult sigmoid(h), logits of H_res.

Columns of z, phi's rows and b: H_pre [n], H_post [n], then comb [source j, target i] as Hugging Face stores it; h_res leaves as [i, j].
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC
from tl_kernels.spec import Kernel, Tensor
from tl_kernels.tiles import everywhere


def slope(e):
    """Derivative of the sigmoid at h from e = exp(-h), also where e overflows."""
    sigma = 1.0 / (1.0 + e)
    return sigma * (1.0 - sigma)


def build_fwd(p, cfg):
    n, M = p.n, p.M
    bt = cfg["block_T"]
    pre_eps, post_mult = p.option("pre_eps"), p.option("post_mult")
    T_ = T.dynamic("T")

    @T.prim_func
    def activate(
        z: T.Tensor((T_, M), ACC),
        rinv: T.Tensor((T_,), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        H_pre: T.Tensor((T_, n), ACC),
        H_post: T.Tensor((T_, n), ACC),
        h_res: T.Tensor((T_, n, n), ACC),
    ):
        with T.Kernel(T.ceildiv(T_, bt), threads=cfg["threads"]) as block:
            t0 = block * bt
            for t, i in T.Parallel(bt, n):
                if t0 + t < T_:
                    r = rinv[t0 + t]
                    # a row whose norm overflowed has 1/r = 0 and counts as zero, also where z overflowed with it
                    h = alpha[0] * T.if_then_else(r > 0, z[t0 + t, i] * r, 0.0) + b[i]
                    H_pre[t0 + t, i] = 1.0 / (1.0 + T.exp(-h)) + pre_eps
            for t, i in T.Parallel(bt, n):
                if t0 + t < T_:
                    r = rinv[t0 + t]
                    h = alpha[1] * T.if_then_else(r > 0, z[t0 + t, n + i] * r, 0.0) + b[n + i]
                    H_post[t0 + t, i] = post_mult / (1.0 + T.exp(-h))
            for t, i, j in T.Parallel(bt, n, n):
                if t0 + t < T_:
                    r = rinv[t0 + t]
                    m = 2 * n + j * n + i
                    h_res[t0 + t, i, j] = alpha[2] * T.if_then_else(r > 0, z[t0 + t, m] * r, 0.0) + b[m]

    return activate


def build_bwd(p, cfg):
    n, M = p.n, p.M
    bt, splits = cfg["threads"], cfg["splits"]  # one thread a token
    post_mult = p.option("post_mult")
    T_ = T.dynamic("T")

    @T.prim_func
    def activate_bwd(
        dH_pre: T.Tensor((T_, n), ACC),
        dH_post: T.Tensor((T_, n), ACC),
        dh_res: T.Tensor((T_, n, n), ACC),
        z: T.Tensor((T_, M), ACC),
        rinv: T.Tensor((T_,), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        dz: T.Tensor((T_, M), ACC),
        drinv: T.Tensor((T_,), ACC),
        dalpha: T.Tensor((splits, 3), ACC),
        db: T.Tensor((splits, M), ACC),
    ):
        with T.Kernel(splits, threads=bt) as s:
            z_TM = T.alloc_fragment((bt, M), ACC)
            dh_TM = T.alloc_fragment((bt, M), ACC)
            r_T = T.alloc_fragment((bt,), ACC)
            dr_T = T.alloc_fragment((bt,), ACC)
            db_TM = T.alloc_fragment((bt, M), ACC)
            dalpha_T3 = T.alloc_fragment((bt, 3), ACC)
            db_M = T.alloc_fragment((M,), ACC)
            dalpha_3 = T.alloc_fragment((3,), ACC)
            T.annotate_layout({db_M: everywhere(M, bt), dalpha_3: everywhere(3, bt)})
            T.clear(db_TM)
            T.clear(dalpha_T3)
            for k in T.serial(T.ceildiv(T.ceildiv(T_, bt), splits)):
                t0 = (k * splits + s) * bt
                for t in T.Parallel(bt):
                    r_T[t] = T.if_then_else(t0 + t < T_, rinv[t0 + t], 0.0)
                    dr_T[t] = 0.0
                for m in T.unroll(M):
                    for t in T.Parallel(bt):
                        # rows whose norm overflowed (1/r = 0) have no gradient through z
                        z_TM[t, m] = T.if_then_else(r_T[t] > 0, z[t0 + t, m], 0.0)
                for m in T.unroll(M):
                    group = T.min(m // n, 2)
                    i = m % n
                    j = T.max(m - 2 * n, 0) // n
                    for t in T.Parallel(bt):
                        e = T.exp(-(alpha[group] * z_TM[t, m] * r_T[t] + b[m]))
                        dH = T.if_then_else(
                            m < n, dH_pre[t0 + t, i], T.if_then_else(m < 2 * n, post_mult * dH_post[t0 + t, i], dh_res[t0 + t, i, j])
                        )
                        dh_TM[t, m] = T.if_then_else(t0 + t < T_, dH * T.if_then_else(m < 2 * n, slope(e), 1.0), 0.0)
                for m in T.unroll(M):
                    group = T.min(m // n, 2)
                    for t in T.Parallel(bt):
                        # dz = dh alpha/r, d(1/r) = sum_m dh alpha z
                        if t0 + t < T_:
                            dz[t0 + t, m] = dh_TM[t, m] * alpha[group] * r_T[t]
                        dr_T[t] += dh_TM[t, m] * alpha[group] * z_TM[t, m]
                        db_TM[t, m] += dh_TM[t, m]
                        dalpha_T3[t, group] += dh_TM[t, m] * z_TM[t, m] * r_T[t]
                for t in T.Parallel(bt):
                    if t0 + t < T_:
                        drinv[t0 + t] = dr_T[t]
            T.reduce_sum(db_TM, db_M, dim=0)
            T.reduce_sum(dalpha_T3, dalpha_3, dim=0)
            for m in T.unroll(M):
                db[s, m] = db_M[m]
            T.copy(dalpha_3, dalpha[s, 0:3])

    return activate_bwd


def _invalid(p, cfg):
    if cfg["threads"] % 32:
        return f"threads={cfg['threads']}: wanted a multiple of 32"
    return None


def _invalid_bwd(p, cfg):
    if cfg["threads"] & (cfg["threads"] - 1):
        return f"threads={cfg['threads']}: a reduction over threads needs a power of two"
    return _invalid(p, cfg)


Z = (Tensor("z", "T M"), Tensor("rinv", "T"), Tensor("alpha", "3"), Tensor("b", "M"))

activate = Kernel(
    name="activate",
    build=build_fwd,
    inputs=Z,
    outputs=(Tensor("H_pre", "T n"), Tensor("H_post", "T n"), Tensor("h_res", "T n n")),
    space=lambda p: {"block_T": (8, 16, 32, 64, 128), "threads": (32, 64, 128, 256)},
    default=lambda p: {"block_T": 32, "threads": 128},
    invalid=_invalid,
    reference=reference.activate,
    options={"pre_eps": 1e-6, "post_mult": 2.0},
)

activate_bwd = Kernel(
    name="activate_bwd",
    build=build_bwd,
    inputs=(Tensor("dH_pre", "T n"), Tensor("dH_post", "T n"), Tensor("dh_res", "T n n"), *Z),
    outputs=(Tensor("dz", "T M"), Tensor("drinv", "T"), Tensor("dalpha", "3", partial=True), Tensor("db", "M", partial=True)),
    space=lambda p: {"threads": (32, 64, 128), "splits": (32, 64, 128, 256, 512)},
    default=lambda p: {"threads": 32, "splits": 256},
    invalid=_invalid_bwd,
    reference=lambda dH_pre, dH_post, dh_res, *inputs, post_mult: reference.vjp(
        reference.activate, inputs, (dH_pre, dH_post, dh_res), post_mult=post_mult
    ),
    options={"post_mult": 2.0},
)
