"""``sum_parts`` against the float64 reference."""

import pytest
import torch

from tests.conftest import assert_close
from tests.tl_kernels.checks import SOME, check, launcher, problems
from tuner.inputs import make_inputs


@problems(SOME)
@pytest.mark.parametrize("name", ["sum_parts"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@pytest.mark.parametrize(("S", "S2"), [(1, 1), (1, 40), (5, 31), (16, 257)])
def test_any_number_of_splits(S, S2, device):
    run = launcher("sum_parts", device.type, 4, 100)
    M, K = run.p.M, run.p.K
    generator = torch.Generator().manual_seed(0)
    dphi, dab = torch.randn(S, M, K, generator=generator).to(device), torch.randn(S2, M + 3, generator=generator).to(device)
    got = run(dphi, dab)
    expected = dphi.double().sum(0), dab.double().sum(0)[:3], dab.double().sum(0)[3:]
    for tensor, value, want in zip(run.kernel.outputs, got, expected, strict=True):
        assert_close(tensor.name, value, want, 1e-6)


def test_splits_are_added_in_order(device):
    """1 survives only where it is added after -1e30 has met 1e30."""
    run = launcher("sum_parts", device.type, 2, 64)
    dphi, dab = (t[:3].clone() for t in make_inputs(run.kernel, run.p, 1, 0, device))
    for t in (dphi, dab):
        t[0], t[1], t[2] = 1e30, -1e30, 1.0
    for out in run(dphi, dab):
        assert (out == 1).all()
