"""``sinkhorn`` and ``sinkhorn_bwd`` against the float64 reference, and what makes them a projection."""

import pytest
import torch

from tests.tl_kernels.checks import COEFFICIENTS, FEW_COEFFICIENTS, check, launcher, problems
from tl_kernels import KERNELS


@problems(FEW_COEFFICIENTS, COEFFICIENTS)
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_bwd"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@pytest.mark.parametrize("options", [{"order": "rows_first", "iters": 3, "eps": 1e-3}, {"iters": 1}], ids=str)
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_bwd"])
def test_options_reach_the_program(name, options, device):
    check(name, device.type, 4, 64, **options)


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_bwd"])
def test_no_iterations_are_refused(name):
    """They would leave a softmax, and ``coefficients`` takes them for the identity."""
    kernel = KERNELS[name]
    p = kernel.problem(4, 64, iters=0)
    assert "iters=0: wanted at least 1" in kernel.invalid(p, kernel.default(p))


@pytest.mark.parametrize("order", ["columns_first", "rows_first"])
def test_sharp_logits_give_doubly_stochastic_matrices(order, device):
    run = launcher("sinkhorn", device.type, 4, 64, order=order)
    h = torch.randn(64, 4, 4, device=device) * 3
    h[0], h[1, 0, 0], h[2] = 0, 300.0, -500.0
    (H,) = run(h)
    assert (H > 0).all()
    last, other = (2, 1) if order == "columns_first" else (1, 2)
    assert (H.sum(last) - 1).abs().max() < 1e-5
    assert (H[0].sum(other - 1) - 1).abs().max() < 1e-5


def test_backward_of_sharp_logits_stays_finite(device):
    run = launcher("sinkhorn_bwd", device.type, 4, 64)
    h = torch.randn(8, 4, 4, device=device)
    h[0, 0, 0], h[1], h[2, 1] = 300.0, -500.0, 80.0
    (dh,) = run(torch.randn(8, 4, 4, device=device), h)
    assert torch.isfinite(dh).all()
