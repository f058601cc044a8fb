"""Layer output of one sublayer and projection for the next in one pass: ``post_res``, then ``project_parts`` of y as it is stored.

y is written once and never read: 9u instead of 13u at n = 4. One block owns ``block_T`` tokens and a split of the channels; the next
channel block of x, f and phi is on its way while y of the present one is mixed, stored, squared and multiplied. ``order`` says which blocks
run beside each other: all of one split, or all splits of the same tokens.
"""

import tilelang.language as T

from tl_kernels import reference
from tl_kernels.mma import ACC, can_stage, high, low, mma_dtype, padded, x_parts
from tl_kernels.sizes import ceildiv
from tl_kernels.spec import Kernel, Tensor, too_much_shared


def build(p, cfg):
    n, C, M, K, dtype, mma = p.n, p.C, p.M, p.K, p.dtype, mma_dtype(p)
    bt, bc, splits, stages = cfg["block_T"], cfg["block_C"], cfg["splits"], cfg["stages"]
    rows, N = padded(M, 8), half(p)
    per = ceildiv(ceildiv(C, bc), splits)
    kb = n * bc
    nx = x_parts(p)
    fetch = T.copy if stages == 1 else T.async_copy
    T_ = T.dynamic("T")

    def grid(tokens, split):
        """The two in the order that blocks start in; and from there the two again."""
        return (tokens, split) if cfg["order"] == "channels" else (split, tokens)

    @T.prim_func
    def post_res_project(
        x: T.Tensor((T_, n, C), dtype),
        f: T.Tensor((T_, C), dtype),
        H_post: T.Tensor((T_, n), ACC),
        H_res: T.Tensor((T_, n, n), ACC),
        phi: T.Tensor((M, K), ACC),
        y: T.Tensor((T_, n, C), dtype),
        parts: T.Tensor((splits, M + 1, T_), ACC),
    ):
        with T.Kernel(*grid(T.ceildiv(T_, bt), splits), threads=cfg["threads"]) as place:
            t0 = grid(*place)[0] * bt
            s = grid(*place)[1]
            first = s * per * bc
            x_s = T.alloc_shared((stages, bt, kb), dtype)
            f_s = T.alloc_shared((stages, bt, bc), dtype)
            post_s = T.alloc_shared((bt, n), ACC)
            res_s = T.alloc_shared((bt, n * n), ACC)
            y_s = T.alloc_shared((bt, kb), mma)
            if nx == 2:
                y_lo = T.alloc_shared((bt, kb), mma)
            phi_s = T.alloc_shared((2 * N, kb), mma)
            z_s = T.alloc_shared((bt, 2 * N), ACC)
            z_TN = T.alloc_fragment((bt, 2 * N), ACC)
            block_TN = T.alloc_fragment((bt, 2 * N), ACC)
            phi_f = T.alloc_fragment((rows, kb), ACC)
            x_f = T.alloc_fragment((n, bt, bc), dtype)
            f_f = T.alloc_fragment((bt, bc), dtype)
            y_f = T.alloc_fragment((bt, bc), ACC)
            stored = T.alloc_fragment((bt, bc), dtype)
            square = T.alloc_fragment((bt, bc), ACC)
            mean = T.alloc_fragment((bt,), ACC)
            T.clear(z_TN)
            T.clear(square)
            T.clear(phi_s)
            for q in T.unroll(stages - 1):
                fetch(f[t0 : t0 + bt, first + q * bc : first + q * bc + bc], f_s[q, :, :])
                for j in T.unroll(n):
                    fetch(x[t0 : t0 + bt, j, first + q * bc : first + q * bc + bc], x_s[q, :, j * bc : j * bc + bc])
            for m, c in T.Parallel(rows, kb):
                at = first + c % bc
                phi_f[m, c] = T.if_then_else(m < M and at < C, phi[T.min(m, M - 1), T.min(c // bc * C + at, K - 1)], 0.0)
            for t, i in T.Parallel(bt, n):
                post_s[t, i] = T.if_then_else(t0 + t < T_, H_post[t0 + t, i], 0.0)
            for t, i, j in T.Parallel(bt, n, n):
                res_s[t, i * n + j] = T.if_then_else(t0 + t < T_, H_res[t0 + t, i, j], 0.0)
            for k in T.serial(per):
                c0 = first + k * bc
                ahead = c0 + (stages - 1) * bc
                if stages == 1:
                    fetch(f[t0 : t0 + bt, ahead : ahead + bc], f_s[0, :, :])
                    for j in T.unroll(n):
                        fetch(x[t0 : t0 + bt, j, ahead : ahead + bc], x_s[0, :, j * bc : j * bc + bc])
                else:
                    if k + stages - 1 <= per:
                        T.ptx_wait_group((n + 1) * (stages - 2))
                    else:
                        T.ptx_wait_group(0)
                    T.sync_threads()
                    if k + stages - 1 < per:
                        fetch(f[t0 : t0 + bt, ahead : ahead + bc], f_s[(k + stages - 1) % stages, :, :])
                        for j in T.unroll(n):
                            fetch(x[t0 : t0 + bt, j, ahead : ahead + bc], x_s[(k + stages - 1) % stages, :, j * bc : j * bc + bc])
                for m, c in T.Parallel(rows, kb):
                    phi_s[m, c] = high(phi_f[m, c], mma)
                    phi_s[N + m, c] = low(phi_f[m, c], mma)
                for m, c in T.Parallel(rows, kb):
                    at = c0 + bc + c % bc
                    phi_f[m, c] = T.if_then_else(m < M and at < C, phi[T.min(m, M - 1), T.min(c // bc * C + at, K - 1)], 0.0)
                for j in T.unroll(n):
                    for t, c in T.Parallel(bt, bc):
                        x_f[j, t, c] = x_s[k % stages, t, j * bc + c]
                for t, c in T.Parallel(bt, bc):
                    f_f[t, c] = f_s[k % stages, t, c]
                for i in T.unroll(n):
                    for t, c in T.Parallel(bt, bc):
                        y_f[t, c] = post_s[t, i] * f_f[t, c]
                    for j in T.unroll(n):
                        for t, c in T.Parallel(bt, bc):
                            y_f[t, c] += res_s[t, i * n + j] * x_f[j, t, c]
                    # what the next sublayer reads is the rounded y: project that
                    for t, c in T.Parallel(bt, bc):
                        stored[t, c] = y_f[t, c]
                    for t, c in T.Parallel(bt, bc):
                        y_s[t, i * bc + c] = high(T.cast(stored[t, c], ACC), mma)
                    if nx == 2:
                        for t, c in T.Parallel(bt, bc):
                            y_lo[t, i * bc + c] = low(T.cast(stored[t, c], ACC), mma)
                    for t, c in T.Parallel(bt, bc):
                        if t0 + t < T_ and c0 + c < C:
                            y[t0 + t, i, c0 + c] = stored[t, c]
                    for t, c in T.Parallel(bt, bc):
                        square[t, c] += T.cast(stored[t, c], ACC) * T.cast(stored[t, c], ACC)
                # tensor cores truncate as they accumulate: only one block's sum may grow there
                T.clear(block_TN)
                T.gemm(y_s, phi_s, block_TN, transpose_B=True)
                if nx == 2:
                    T.gemm(y_lo, phi_s, block_TN, transpose_B=True)
                for t, m in T.Parallel(bt, 2 * N):
                    z_TN[t, m] += block_TN[t, m]
            T.reduce_sum(square, mean, dim=1)
            T.copy(z_TN, z_s)
            for m, t in T.Parallel(N, bt):
                if t0 + t < T_ and m < M:
                    parts[s, m, t0 + t] = z_s[t, m] + z_s[t, N + m]
            for t in T.Parallel(bt):
                if t0 + t < T_:
                    parts[s, M, t0 + t] = mean[t] / K

    return post_res_project


def half(p):
    """Rows of each half of phi, high and low: few columns take a multiple that two warpgroups can share in one instruction each."""
    return padded(p.M, 32 if p.n <= 4 else 8)


def shared_bytes(p, cfg):
    """Shared memory at most, but for up to 1 KiB between tiles that begin at multiples of that; z takes the room of what is dead."""
    bt, bc, part, N, kb = cfg["block_T"], cfg["block_C"], (2 if mma_dtype(p) == "bfloat16" else 4), half(p), p.n * cfg["block_C"]
    staged = cfg["stages"] * bt * (kb + bc) * p.itemsize
    return staged + bt * (p.n + p.n * p.n) * 4 + part * kb * (x_parts(p) * bt + 2 * N)


def invalid(p, cfg):
    """Why a configuration cannot work, or None."""
    bt, bc, threads = cfg["block_T"], cfg["block_C"], cfg["threads"]
    if bt % 16 or bc % 8 or p.n * bc % 16:
        return f"block_T={bt}, block_C={bc}: wanted block_T and n*block_C in multiples of 16, block_C of 8"
    if cfg["stages"] > 1 and not can_stage(p):
        return f"stages={cfg['stages']}: C={p.C} leaves rows off 16 bytes, wanted 1"
    if cfg["splits"] > ceildiv(p.C, bc):
        return f"splits={cfg['splits']}: wanted at most C/block_C={ceildiv(p.C, bc)}"
    live = (bt * bc * (p.n // 2 + 4) + padded(p.M, 8) * p.n * bc + 4 * bt * half(p)) // threads
    if live > 250:
        return f"block_T={bt}, block_C={bc}: {live} live registers a thread would spill"
    return too_much_shared(shared_bytes(p, cfg))


def default(p):
    """Fits the 99 KiB of shared memory of the smallest supported chips, at n = 8 too."""
    small = p.itemsize == 4 or p.n > 4
    block_C = {1: 32, 2: 32, 3: 32, 4: 32 if p.dtype == "bfloat16" else 16}.get(p.n, 16 if p.dtype == "bfloat16" else 8)
    if p.n in (5, 7) and block_C == 8:
        block_C = 16
    return {
        "block_T": 32 if small else 64,
        "block_C": block_C,
        "splits": min(2, ceildiv(p.C, block_C)),
        "threads": 128,
        "stages": 1,
        "order": "channels",
    }


post_res_project = Kernel(
    name="post_res_project",
    build=build,
    inputs=(
        Tensor("x", "T n C", "stream"),
        Tensor("f", "T C", "stream"),
        Tensor("H_post", "T n"),
        Tensor("H_res", "T n n"),
        Tensor("phi", "M K"),
    ),
    outputs=(Tensor("y", "T n C", "stream"), Tensor("parts", "S Q T", split=True)),
    space=lambda p: {
        "block_T": (32, 64),
        "block_C": (16, 32, 64, 128),
        "splits": (1, 2, 4, 8, 16),
        "threads": (128, 256),
        "stages": (1, 2, 3),
        "order": ("channels", "tokens"),
    },
    default=default,
    invalid=invalid,
    seeds=tuple(
        dict(zip(("block_T", "block_C", "splits", "threads", "stages", "order"), seed, strict=True))
        for seed in (
            (64, 64, 2, 256, 2, "channels"),
            (64, 64, 1, 256, 3, "channels"),
            (64, 64, 4, 256, 2, "tokens"),
            (64, 64, 4, 256, 3, "tokens"),
            (64, 64, 16, 256, 2, "channels"),
            (64, 128, 2, 256, 3, "channels"),
        )
    ),
    reference=reference.post_res_project,
    # y may round either way where the exact value lies between two: parts answer to the y that was stored
    from_results={"parts": lambda p, inputs, results: reference.project_parts(results["y"], inputs[-1])},
    gpu_only=("threads", "stages", "order"),
)
