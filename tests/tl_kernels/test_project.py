"""``project`` and ``project_bwd`` against the float64 reference."""

import pytest
import torch

from tests.conftest import relative_error
from tests.tl_kernels.checks import check, launcher, problems
from tl_kernels import KERNELS, reference
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


@pytest.mark.gpu
def test_long_sums_keep_float32_accuracy():
    """Tensor cores truncate as they accumulate: at K = 28672 an unpromoted sum is off by 6e-5."""
    kernel = KERNELS["project"]
    run = launcher("project", "cuda", 4, 7168)
    x, phi = make_inputs(kernel, run.p, 512, 0, "cuda")
    z, _ = run(x, phi)
    assert relative_error(z, reference.project(x.double(), phi.double())[0]) < 5e-6
