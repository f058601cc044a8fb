"""Layer input, F_pre of Eq. 1: u = sum_j H_pre[j] x[j]. Forward and backward."""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC
from tl_kernels.spec import Kernel, Tensor
from tl_kernels.tiles import channel_blocks, row_default, row_invalid, row_space


def build_fwd(p, cfg):
    n, C, dtype = p.n, p.C, p.dtype
    bc, blocks = channel_blocks(p, cfg)
    T_ = T.dynamic("T")

    @T.prim_func
    def pre(x: T.Tensor((T_, n, C), dtype), H_pre: T.Tensor((T_, n), ACC), u: T.Tensor((T_, C), dtype)):
        with T.Kernel(T_ * blocks, threads=cfg["threads"]) as b:
            t = b // blocks
            c0 = (b % blocks) * bc
            x_nC = T.alloc_fragment((n, bc), dtype)
            u_C = T.alloc_fragment((bc,), ACC)
            T.copy(x[t, 0:n, c0 : c0 + bc], x_nC)
            T.clear(u_C)
            for j in T.unroll(n):
                for c in T.Parallel(bc):
                    u_C[c] += H_pre[t, j] * x_nC[j, c]
            T.copy(u_C, u[t, c0 : c0 + bc])

    return pre


def build_bwd(p, cfg):
    n, C, dtype = p.n, p.C, p.dtype
    bc, blocks = channel_blocks(p, cfg)
    T_ = T.dynamic("T")

    @T.prim_func
    def pre_bwd(
        du: T.Tensor((T_, C), dtype),
        x: T.Tensor((T_, n, C), dtype),
        H_pre: T.Tensor((T_, n), ACC),
        dx: T.Tensor((T_, n, C), dtype),
        dH_pre: T.Tensor((T_, n), ACC),
    ):
        with T.Kernel(T_, threads=cfg["threads"]) as t:
            x_nC = T.alloc_fragment((n, bc), dtype)
            du_C = T.alloc_fragment((bc,), dtype)
            dx_C = T.alloc_fragment((bc,), ACC)
            prod = T.alloc_fragment((n, bc), ACC)
            total = T.alloc_fragment((n,), ACC)
            T.clear(prod)
            for b in T.serial(blocks):
                c0 = b * bc
                T.copy(x[t, 0:n, c0 : c0 + bc], x_nC)
                T.copy(du[t, c0 : c0 + bc], du_C)
                for j in T.unroll(n):
                    # dx[j] = H_pre[j] du
                    for c in T.Parallel(bc):
                        dx_C[c] = H_pre[t, j] * du_C[c]
                    T.copy(dx_C, dx[t, j, c0 : c0 + bc])
                    # dH_pre[j] = <x[j], du>
                    for c in T.Parallel(bc):
                        prod[j, c] += T.cast(x_nC[j, c], ACC) * T.cast(du_C[c], ACC)
            T.reduce_sum(prod, total, dim=1)
            T.copy(total, dH_pre[t, 0:n])

    return pre_bwd


X = Tensor("x", "T n C", "stream")
H_PRE = Tensor("H_pre", "T n")

pre = Kernel(
    name="pre",
    build=build_fwd,
    inputs=(X, H_PRE),
    outputs=(Tensor("u", "T C", "stream"),),
    space=row_space,
    default=lambda p: row_default(p, block_C=640),
    invalid=lambda p, cfg: row_invalid(p, cfg, live=p.n + 1),
    reference=lambda *inputs: (reference.pre(*inputs),),
)

pre_bwd = Kernel(
    name="pre_bwd",
    build=build_bwd,
    inputs=(Tensor("du", "T C", "stream"), X, H_PRE),
    outputs=(Tensor("dx", "T n C", "stream"), Tensor("dH_pre", "T n")),
    space=lambda p: row_space(p, reduces=True),
    default=lambda p: row_default(p, block_C=1024, reduces=True),
    invalid=lambda p, cfg: row_invalid(p, cfg, reduces=True, live=2 * p.n + 2),
    reference=lambda du, *inputs: reference.vjp(reference.pre, inputs, du),
)
