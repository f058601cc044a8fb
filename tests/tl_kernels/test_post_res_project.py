"""``post_res_project`` against the float64 reference."""

import pytest

from tests.tl_kernels.checks import FEW, check, problems
from tests.tl_kernels.test_cuda_compile import nvcc
from tl_kernels import KERNELS
from tl_kernels.launch import compile_kernel


@problems(FEW)
@pytest.mark.parametrize("name", ["post_res_project"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


#: Tokens and channels of a block, splits, threads, stages: one block of channels, several, blocks and splits that C does not fill.
OVERLAPPED = {1: (64, 32, 1, 128, 2), 2: (64, 64, 4, 256, 3), 4: (64, 64, 2, 256, 2), 5: (64, 16, 2, 256, 2), 8: (64, 16, 1, 256, 2)}


def overlapped(n):
    return {**dict(zip(("block_T", "block_C", "splits", "threads", "stages"), OVERLAPPED[n], strict=True)), "overlap": 1}


@problems(
    ((1, 72, "bfloat16"), (2, 200, "bfloat16"), (4, 640, "bfloat16"), (5, 72, "bfloat16")), tuple((n, 1280, "bfloat16") for n in OVERLAPPED)
)
@pytest.mark.parametrize("name", ["post_res_project"])
def test_mixing_under_the_product(name, device, n, C, dtype):
    check(name, device, n, C, dtype, cfg=overlapped(n))


@nvcc
@pytest.mark.parametrize("n", [2, 4, 5])
def test_one_barrier_a_block_of_channels(n):
    kernel = KERNELS["post_res_project"]
    source = compile_kernel(kernel, kernel.problem(n, 1280), overlapped(n), "sm_90a").get_kernel_source()
    loop, after = source.split("for (int k = 0;")[1].split("AllReduce")[:2]
    assert loop.count("__syncthreads();") == 1
    # copies of this block and y of the one before are seen by all; the next copies overwrite what all have read
    order = ["cp_async_wait", "fence_proxy_async", "__syncthreads", "wgmma_ss", "cp_async_gs", "wait_wgmma"]
    assert [loop.index(step) for step in order] == sorted(loop.index(step) for step in order)
    # y of the last block is there, its product is done with shared memory, and its sums are there
    assert after.count("__syncthreads();") == 3
