"""tuner/bench_launches.py: whose kernels they are, and sums that add up."""

import pytest

from tuner.bench_launches import count_launches, is_torch, short, summary

ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >(int, float)"


@pytest.mark.parametrize(
    ("name", "own"),
    [
        (ADD, True),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>()", True),
        ("Memset (Device)", True),
        ("Memcpy DtoD (Device -> Device)", True),
        ("post_res_kernel", False),
        ("_mhc_post_res_bwd_kernel", False),
        ("nvjet_tss_128x64_64x8_1x1_h_bz_TNT", False),
        ("triton_red_fused_add_mul_0", False),
    ],
)
def test_whose_kernel(name, own):
    assert is_torch(name) is own


def test_summary_counts_launches_and_time_by_kernel():
    found = summary([("pre_kernel", 70.0), (ADD, 20.0), ("post_res_kernel", 130.0), (ADD, 22.0)])
    assert (found["launches"], found["us"]) == (4, 242.0)
    assert (found["torch_launches"], found["torch_us"]) == (2, 42.0)
    assert [(k["name"].split("<")[0], k["launches"]) for k in found["kernels"]] == [
        ("post_res_kernel", 1),
        ("pre_kernel", 1),
        ("vectorized_elementwise_kernel", 2),
    ]


def test_names_lose_what_all_have():
    assert short("void at::native::(anonymous namespace)::fill<float>") == "fill<float>"
    assert len(short("x" * 500)) == 100


@pytest.mark.gpu
def test_a_real_profile_sees_one_elementwise_kernel():
    import torch

    x = torch.ones(1 << 20, device="cuda")
    found = count_launches(lambda: x + 1)
    if found is None:
        pytest.skip("the profiler sees no kernels on this machine")
    assert (found["launches"], found["torch_launches"]) == (1, 1)
    assert found["us"] > 0
