"""The knob ``widen``: a bfloat16 is the same float32 either way."""

import pytest
import tilelang
import tilelang.language as T
import torch
from tilelang import tvm

from tl_kernels import KERNELS
from tl_kernels.widen import widen, widths

PATTERNS = 1 << 16


def converts(instructions):
    @T.prim_func
    def convert(a: T.Tensor((PATTERNS,), "bfloat16"), b: T.Tensor((PATTERNS,), "float32")):
        with T.Kernel(PATTERNS // 1024, threads=128) as block:
            T.import_source(widen({"widen": instructions}))
            for i in T.Parallel(1024):
                b[block * 1024 + i] = a[block * 1024 + i]

    return convert


@pytest.mark.parametrize("instructions", [2, 3])
def test_the_program_brings_its_function_along(instructions):
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = tilelang.lower(converts(instructions), target=target, enable_device_compile=False).kernel_source
    assert source.count("__bfloat1622float2(") == 2
    assert ("#define __bfloat1622float2 widen_pair" in source) == (instructions == 2)


@pytest.mark.gpu
@pytest.mark.parametrize("instructions", [2, 3])
def test_every_bfloat16_keeps_its_bits(instructions):
    run = tilelang.compile(converts(instructions), target="cuda")
    bits = torch.arange(PATTERNS, dtype=torch.int32, device="cuda")
    b = torch.empty(PATTERNS, device="cuda")
    run(bits.to(torch.int16).view(torch.bfloat16), b)
    # a NaN may lose its payload to CUDA's own function
    where = ~b.isnan() if instructions == 3 else slice(None)
    assert torch.equal(b.view(torch.int32)[where], (bits << 16)[where])


def test_only_bfloat16_can_be_widened_so():
    kernel = KERNELS["streams_grad"]
    p = kernel.problem(4, 64, "float32")
    assert widths(p) == (3,)
    assert kernel.invalid(p, {**kernel.default(p), "widen": 2}) == "widen=2: wanted 3 with streams of float32"
