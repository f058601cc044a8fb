"""Kernels made worse in the three ways that a static gate must see, and a job that compiles one of them in a worker."""

import dataclasses
import os

import tilelang.language as T

from tl_kernels import KERNELS
from tl_kernels.tiles import channel_blocks
from tuner import fingerprint as module

ACC = "float32"
#: Which of VARIANTS the worker compiles.
VARIABLE = "TEST_PLANTED_PROGRAM"


def build_narrowed(p, cfg):
    """The loop over streams inside the parallel one: elements are loaded one by one."""
    n, C, dtype = p.n, p.C, p.dtype
    bc, blocks = channel_blocks(p, cfg)
    T_ = T.dynamic("T")

    @T.prim_func
    def pre(x: T.Tensor((T_, n, C), dtype), H_pre: T.Tensor((T_, n), ACC), u: T.Tensor((T_, C), dtype)):
        with T.Kernel(T_ * blocks, threads=cfg["threads"]) as b:
            t = b // blocks
            c0 = (b % blocks) * bc
            u_C = T.alloc_fragment((bc,), ACC)
            for c in T.Parallel(bc):
                u_C[c] = 0.0
                for j in T.unroll(n):
                    u_C[c] += H_pre[t, j] * x[t, j, c0 + c]
            T.copy(u_C, u[t, c0 : c0 + bc])

    return pre


def build_doubled(p, cfg):
    """A first pass over the streams, for a sum, before the one that is needed."""
    n, C, dtype = p.n, p.C, p.dtype
    bc, blocks = channel_blocks(p, cfg)
    T_ = T.dynamic("T")

    @T.prim_func
    def pre(x: T.Tensor((T_, n, C), dtype), H_pre: T.Tensor((T_, n), ACC), u: T.Tensor((T_, C), dtype)):
        with T.Kernel(T_, threads=cfg["threads"]) as t:
            x_nC = T.alloc_fragment((n, bc), dtype)
            sum_C = T.alloc_fragment((bc,), ACC)
            u_C = T.alloc_fragment((bc,), ACC)
            T.clear(sum_C)
            for b in T.serial(blocks):
                T.copy(x[t, 0:n, b * bc : b * bc + bc], x_nC)
                for j in T.unroll(n):
                    for c in T.Parallel(bc):
                        sum_C[c] += x_nC[j, c]
            for b in T.serial(blocks):
                T.copy(x[t, 0:n, b * bc : b * bc + bc], x_nC)
                T.copy(sum_C, u_C)
                for j in T.unroll(n):
                    for c in T.Parallel(bc):
                        u_C[c] += H_pre[t, j] * x_nC[j, c]
                T.copy(u_C, u[t, b * bc : b * bc + bc])

    return pre


def capped(cfg):
    """Compile flags that leave a thread fewer registers than it needs; they would yield to the kernel's own launch bounds."""
    return {"tl.device_compile_flags": ["-maxrregcount=40", "-Xptxas", "--override-directive-values"]}


#: How it is made worse -> the kernel that is, and the worse one.
VARIANTS = {
    "narrowed": (KERNELS["pre"], dataclasses.replace(KERNELS["pre"], build=build_narrowed)),
    "doubled": (KERNELS["pre"], dataclasses.replace(KERNELS["pre"], build=build_doubled)),
    "spilled": (KERNELS["pre_bwd"], dataclasses.replace(KERNELS["pre_bwd"], pass_configs=capped)),
}


def fingerprint_variant(name, p, cfg, arch):
    """In a worker, in place of tuner.fingerprint.fingerprint_job: the worse one for the kernel of that name."""
    original, worse = VARIANTS[os.environ[VARIABLE]]
    return {"seconds": 0.0, **module.fingerprint(worse if original.name == name else KERNELS[name], p, cfg, arch).model_dump()}
