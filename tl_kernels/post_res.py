"""Layer output, F_post and F_res of Eq. 1: y[i] = sum_j H_res[i,j] x[j] + H_post[i] f. Forward and backward."""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC
from tl_kernels.sizes import vector_width
from tl_kernels.spec import Kernel, Tensor
from tl_kernels.tiles import channel_blocks, everywhere, row_default, row_invalid, row_space


def build_fwd(p, cfg):
    n, C, dtype = p.n, p.C, p.dtype
    bc, blocks = channel_blocks(p, cfg)
    T_ = T.dynamic("T")

    @T.prim_func
    def post_res(
        x: T.Tensor((T_, n, C), dtype),
        f: T.Tensor((T_, C), dtype),
        H_post: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        y: T.Tensor((T_, n, C), dtype),
    ):
        with T.Kernel(T_ * blocks, threads=cfg["threads"]) as b:
            t = b // blocks
            c0 = (b % blocks) * bc
            x_nC = T.alloc_fragment((n, bc), dtype)
            f_C = T.alloc_fragment((bc,), dtype)
            y_C = T.alloc_fragment((bc,), ACC)
            T.copy(x[t, 0:n, c0 : c0 + bc], x_nC)
            T.copy(f[t, c0 : c0 + bc], f_C)
            # i and j outside the parallel loop: this is what keeps loads and stores 16 bytes wide
            for i in T.unroll(n):
                for c in T.Parallel(bc):
                    y_C[c] = H_post[t, i] * f_C[c]
                for j in T.unroll(n):
                    for c in T.Parallel(bc):
                        y_C[c] += H_res[t, i, j] * x_nC[j, c]
                T.copy(y_C, y[t, i, c0 : c0 + bc])

    return post_res


def build_bwd(p, cfg):
    n, C, dtype = p.n, p.C, p.dtype
    bc, blocks = channel_blocks(p, cfg)
    T_ = T.dynamic("T")

    @T.prim_func
    def post_res_bwd(
        dy: T.Tensor((T_, n, C), dtype),
        x: T.Tensor((T_, n, C), dtype),
        f: T.Tensor((T_, C), dtype),
        H_post: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        dx: T.Tensor((T_, n, C), dtype),
        df: T.Tensor((T_, C), dtype),
        dH_post: T.Tensor((T_, n), ACC),
        dH_res: T.Tensor((T_, n, n), ACC),
    ):
        with T.Kernel(T_, threads=cfg["threads"]) as t:
            x_nC = T.alloc_fragment((n, bc), dtype)
            dy_nC = T.alloc_fragment((n, bc), dtype)
            f_C = T.alloc_fragment((bc,), dtype)
            acc_C = T.alloc_fragment((bc,), ACC)
            prod_post = T.alloc_fragment((n, bc), ACC)
            prod_res = T.alloc_fragment((n * n, bc), ACC)
            sum_post = T.alloc_fragment((n,), ACC)
            sum_res = T.alloc_fragment((n * n,), ACC)
            T.annotate_layout({sum_res: everywhere(n * n, cfg["threads"])})
            T.clear(prod_post)
            T.clear(prod_res)
            for b in T.serial(blocks):
                c0 = b * bc
                T.copy(x[t, 0:n, c0 : c0 + bc], x_nC)
                T.copy(dy[t, 0:n, c0 : c0 + bc], dy_nC)
                T.copy(f[t, c0 : c0 + bc], f_C)
                # df = sum_i H_post[i] dy[i]
                T.clear(acc_C)
                for i in T.unroll(n):
                    for c in T.Parallel(bc):
                        acc_C[c] += H_post[t, i] * dy_nC[i, c]
                T.copy(acc_C, df[t, c0 : c0 + bc])
                # dx[j] = sum_i H_res[i,j] dy[i]
                for j in T.unroll(n):
                    T.clear(acc_C)
                    for i in T.unroll(n):
                        for c in T.Parallel(bc):
                            acc_C[c] += H_res[t, i, j] * dy_nC[i, c]
                    T.copy(acc_C, dx[t, j, c0 : c0 + bc])
                # dH_post[i] = <f, dy[i]>, dH_res[i,j] = <x[j], dy[i]>
                for i in T.unroll(n):
                    for c in T.Parallel(bc):
                        prod_post[i, c] += T.cast(f_C[c], ACC) * T.cast(dy_nC[i, c], ACC)
                    for j in T.unroll(n):
                        for c in T.Parallel(bc):
                            prod_res[i * n + j, c] += T.cast(x_nC[j, c], ACC) * T.cast(dy_nC[i, c], ACC)
            T.reduce_sum(prod_post, sum_post, dim=1)
            T.reduce_sum(prod_res, sum_res, dim=1)
            T.copy(sum_post, dH_post[t, 0:n])
            for i in T.unroll(n):
                for j in T.unroll(n):
                    dH_res[t, i, j] = sum_res[i * n + j]

    return post_res_bwd


X = Tensor("x", "T n C", "stream")
F = Tensor("f", "T C", "stream")
COEFFICIENTS = (Tensor("H_post", "T n"), Tensor("H_res", "T n n"))

post_res = Kernel(
    name="post_res",
    build=build_fwd,
    inputs=(X, F, *COEFFICIENTS),
    outputs=(Tensor("y", "T n C", "stream"),),
    space=row_space,
    default=lambda p: row_default(p, block_C=640),
    invalid=lambda p, cfg: row_invalid(p, cfg, live=p.n + 1),
    reference=lambda *inputs: (reference.post_res(*inputs),),
)

post_res_bwd = Kernel(
    name="post_res_bwd",
    build=build_bwd,
    inputs=(Tensor("dy", "T n C", "stream"), X, F, *COEFFICIENTS),
    outputs=(Tensor("dx", "T n C", "stream"), Tensor("df", "T C", "stream"), Tensor("dH_post", "T n"), Tensor("dH_res", "T n n")),
    space=lambda p: row_space(p, reduces=True),
    default=lambda p: row_default(p, block_C=256 if p.n <= 5 else 16 * vector_width(p), reduces=True),
    invalid=lambda p, cfg: row_invalid(p, cfg, reduces=True, live=p.n * p.n + 3 * p.n + 2),
    reference=lambda dy, *inputs: reference.vjp(reference.post_res, inputs, dy),
)
