"""A whole boundary but for the Sinkhorn: ``post_res``, the projection of y as it is stored, H_pre from it, and ``pre`` of the same y.

y stays on chip until its H_pre is known, so it is written once and never read: 10u at n = 4. How, see tl_kernels/whole.py: the main role
mixes tile i in place, stores y and sums its squares, and makes u of an earlier tile.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC
from tl_kernels.roles import roles
from tl_kernels.spec import Tensor
from tl_kernels.whole import buffers_of, group_of, part_of, row_layouts, scratch_of, threads_of, whole_pass
from tl_kernels.widen import widen


def build(p, cfg):
    n, C, M, K, dtype = p.n, p.C, p.M, p.K, p.dtype
    bt, bc, groups = cfg["block_T"], cfg["block_C"], cfg["groups"]
    buffers, part = buffers_of(p, cfg), part_of(p, cfg)
    staged = cfg["ahead"] + 1
    row, rows = row_layouts(p, cfg, n)
    T_ = T.dynamic("T")

    @T.macro
    def load(i, t0, c0, tensors, tiles):
        x, f, H_post, H_res = tensors
        x_s, f_s, post_s, res_s = tiles
        for j in T.unroll(n):
            T.async_copy(x[t0 : t0 + bt, j, c0 : c0 + bc], x_s[i % buffers, :, j * bc : j * bc + bc])
        T.async_copy(f[t0 : t0 + bt, c0 : c0 + bc], f_s[i % staged, :, :])
        T.async_copy(H_post[t0 : t0 + bt, :], post_s[i % staged, :, :])
        T.async_copy(H_res[t0 : t0 + bt, :, :], res_s[i % staged, :, :, :])

    @T.macro
    def work(i, t0, tokens, c0, tiles, held, put_mean, home, outs):
        x_s, f_s, post_s, res_s = tiles
        x_f, f_f, y_f, stored, square, mean = held
        for h in T.serial(bt // part):
            t1 = h * part
            for j in T.unroll(n):
                for t, c in T.Parallel(part, bc):
                    x_f[j, t, c] = x_s[i % buffers, t1 + t, j * bc + c]
            for t, c in T.Parallel(part, bc):
                f_f[t, c] = f_s[i % staged, t1 + t, c]
            T.clear(square)
            for q in T.unroll(n):
                for t, c in T.Parallel(part, bc):
                    y_f[t, c] = post_s[i % staged, t1 + t, q] * f_f[t, c]
                for j in T.unroll(n):
                    for t, c in T.Parallel(part, bc):
                        y_f[t, c] += res_s[i % staged, t1 + t, q, j] * x_f[j, t, c]
                # what the next sublayer reads is the rounded y: project that
                for t, c in T.Parallel(part, bc):
                    stored[t, c] = y_f[t, c]
                for t, c in T.Parallel(part, bc):
                    x_s[i % buffers, t1 + t, q * bc + c] = stored[t, c]
                if len(outs) > 0:
                    for t, c in T.Parallel(part, bc):
                        if t0 + t1 + t < tokens and c0 + c < C:
                            outs[0][t0 + t1 + t, q, c0 + c] = stored[t, c]
                for t, c in T.Parallel(part, bc):
                    square[t, c] += T.cast(stored[t, c], ACC) * T.cast(stored[t, c], ACC)
            T.reduce_sum(square, mean, dim=1)
            for t in T.Parallel(part):
                put_mean(home, i, t1 + t, mean[t] / K)
        T.fence_proxy_async()

    run = roles(p, cfg, load, work, raw=False)

    @T.prim_func
    def post_res_project_pre(
        x: T.Tensor((T_, n, C), dtype),
        f: T.Tensor((T_, C), dtype),
        H_post: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        phi: T.Tensor((M, K), ACC),
        alpha: T.Tensor((3,), ACC),
        b: T.Tensor((M,), ACC),
        y: T.Tensor((T_, n, C), dtype),
        u: T.Tensor((T_, C), dtype),
        parts: T.Tensor((1, M + 1, T_), ACC),
        scratch: T.Tensor((scratch_of(p, cfg),), "uint32"),
    ):
        with T.Kernel(group_of(p, cfg), groups, threads=threads_of(cfg)) as (s, g):
            T.import_source(widen(cfg))
            tx = T.get_thread_binding()
            x_s = T.alloc_shared((buffers, bt, n * bc), dtype)
            f_s = T.alloc_shared((staged, bt, bc), dtype)
            post_s = T.alloc_shared((staged, bt, n), ACC)
            res_s = T.alloc_shared((staged, bt, n, n), ACC)
            x_f = T.alloc_fragment((n, part, bc), dtype)
            f_f = T.alloc_fragment((part, bc), dtype)
            y_f = T.alloc_fragment((part, bc), ACC)
            stored = T.alloc_fragment((part, bc), dtype)
            square = T.alloc_fragment((part, bc), ACC)
            mean = T.alloc_fragment((part,), ACC)
            T.annotate_layout({x_f: rows, f_f: row, y_f: row, stored: row, square: row})
            tensors, tiles = (x, f, H_post, H_res), (x_s, f_s, post_s, res_s)
            held = (x_f, f_f, y_f, stored, square, mean)
            run((tx, s, g, s * bc), T_, tensors, (phi, alpha, b), (u, parts, y), scratch, tiles, held, stored, y_f)

    return post_res_project_pre


post_res_project_pre = whole_pass(
    mixes=True,
    name="post_res_project_pre",
    build=build,
    inputs=(
        Tensor("x", "T n C", "stream"),
        Tensor("f", "T C", "stream"),
        Tensor("H_post", "T n"),
        Tensor("H_res", "T n n"),
        Tensor("phi", "M K"),
        Tensor("alpha", "3"),
        Tensor("b", "M"),
    ),
    outputs=(Tensor("y", "T n C", "stream"), Tensor("u", "T C", "stream"), Tensor("parts", "1 Q T")),
    reference=reference.post_res_project_pre,
    # y may round either way where the exact value lies between two: parts and u answer to the y that was stored
    from_results={
        "u": lambda p, inputs, results: reference.project_pre(results["y"], *inputs[4:], **dict(p.options))[0],
        "parts": lambda p, inputs, results: reference.project_pre(results["y"], *inputs[4:], **dict(p.options))[1],
    },
)
