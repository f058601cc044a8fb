"""The rewrite for the CPU target: TVM's JSON of a function is internal to the pinned TileLang, so its effect is pinned here."""

import pytest
import tilelang
import tilelang.language as T
import torch

from tl_kernels import KERNELS, NAMES
from tl_kernels.cpu import available, compile_cpu, to_cpu


def test_tilelang_is_the_pinned_release():
    assert tilelang.__version__.startswith("0.1.15")


def test_no_gpu_scope_or_bfloat16_is_left():
    for name in NAMES:
        kernel = KERNELS[name]
        p = kernel.problem(4, 256)
        before = kernel.build(p, kernel.default(p))
        after = to_cpu(before).script()
        for word in ("local.fragment", "shared.dyn", "bfloat16", "T.parallel", "layout_map"):
            assert word not in after, (name, word)
        assert before.script() == kernel.build(p, kernel.default(p)).script(), "the rewrite changed its input"


def program():
    @T.prim_func
    def rounded_product(a: T.Tensor((3, 16, 32), "float32"), b: T.Tensor((8, 32), "float32"), c: T.Tensor((3, 16, 8), "float32")):
        with T.Kernel(1, threads=32):
            a_s = T.alloc_shared((3, 16, 32), "bfloat16")
            b_s = T.alloc_shared((8, 32), "bfloat16")
            c_f = T.alloc_fragment((16, 8), "float32")
            for i, j, k in T.Parallel(3, 16, 32):
                a_s[i, j, k] = T.cast(a[i, j, k], "bfloat16")
            for j, k in T.Parallel(8, 32):
                b_s[j, k] = T.cast(b[j, k], "bfloat16")
            for i in T.serial(3):
                T.clear(c_f)
                T.gemm(a_s[i, :, :], b_s, c_f, transpose_B=True)
                T.copy(c_f, c[i, :, :])

    return rounded_product


@pytest.mark.skipif(not available(), reason="no C++ compiler for the CPU target")
def test_casts_round_to_nearest_even_and_one_matrix_of_several_multiplies():
    run = compile_cpu(program())
    a, b, c = torch.randn(3, 16, 32), torch.randn(8, 32), torch.full((3, 16, 8), float("nan"))
    a[0, 0, :3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(2.0**-130)])  # ties to even, a subnormal
    run(a, b, c)
    want = a.bfloat16().double() @ b.bfloat16().double().T
    assert torch.allclose(c.double(), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)
