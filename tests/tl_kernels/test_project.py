"""``project`` and ``project_bwd`` against the float64 reference."""

import pytest
import torch

from tests.conftest import relative_error
from tests.tl_kernels.checks import check, launcher, problems
from tl_kernels import KERNELS, reference
from tl_kernels.project import shared_bytes
from tuner.compile_job import lowered_shared_bytes
from tuner.inputs import make_inputs


@problems()
@pytest.mark.parametrize("name", ["project", "project_bwd"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


def test_huge_and_zero_rows_stay_finite(device):
    run = launcher("project", device.type, 4, 64)
    x, phi = make_inputs(run.kernel, run.p, 5, 0, device)
    x[0], x[1] = 0, 1e30
    z, rinv = run(x, phi)
    assert torch.isfinite(z).all()
    assert rinv[0].item() == pytest.approx(1e3, rel=1e-4)  # rsqrt(norm_eps)
    assert rinv[1].item() == 0  # mean(x^2) overflows


TILES = {"block_T": 64, "block_K": 64, "threads": 128, "stages": 2, "splits": 8}


@pytest.mark.parametrize(
    ("name", "n", "dtype", "stages"),
    [("project", 4, "bfloat16", 2), ("project_bwd", 4, "bfloat16", 2), ("project_bwd", 2, "float32", 2), ("project_bwd", 1, "bfloat16", 0)],
)
def test_shared_memory_is_known_exactly(name, n, dtype, stages):
    kernel, cfg = KERNELS[name], {**TILES, "stages": stages}
    p = kernel.problem(n, 2560, dtype)
    assert shared_bytes(p, cfg, name == "project_bwd") == lowered_shared_bytes(kernel, kernel.build(p, cfg), cfg, "sm_90a")


@pytest.mark.parametrize(
    ("n", "C", "change", "why"),
    [
        (3, 130, {}, "stages=2: K=390 leaves rows off 16 bytes"),
        (3, 130, {"stages": 0}, None),
        (4, 130, {}, None),
        (8, 2560, {"block_K": 32, "threads": 256}, "8 warps cannot share 32 x 80 of dphi"),
        (2, 2560, {"block_K": 32, "threads": 256}, "8 warps cannot share 32 x 16 of dphi"),
        (4, 2560, {"block_K": 32, "threads": 256}, None),
        (8, 2560, {"block_K": 32}, None),
    ],
)
def test_what_cannot_be_compiled_says_why(n, C, change, why):
    kernel = KERNELS["project_bwd"]
    said = kernel.invalid(kernel.problem(n, C), {**TILES, **change})
    assert why in said if why else said is None


@pytest.mark.gpu
def test_long_sums_keep_float32_accuracy():
    """Tensor cores truncate as they accumulate: at K = 28672 an unpromoted sum is off by 6e-5."""
    kernel = KERNELS["project"]
    run = launcher("project", "cuda", 4, 7168)
    x, phi = make_inputs(kernel, run.p, 512, 0, "cuda")
    z, _ = run(x, phi)
    assert relative_error(z, reference.project(x.double(), phi.double())[0]) < 5e-6
