"""``activate`` and ``activate_bwd`` against the float64 reference."""

import pytest
import torch

from tests.tl_kernels.checks import COEFFICIENTS, FEW_COEFFICIENTS, check, launcher, problems
from tuner.inputs import make_inputs


@problems(FEW_COEFFICIENTS, COEFFICIENTS)
@pytest.mark.parametrize("name", ["activate", "activate_bwd"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype, tokens=(1, 37, 1000))


def test_options_reach_the_program(device):
    check("activate", device.type, 4, 64, pre_eps=0.25, post_mult=3.0)
    check("activate_bwd", device.type, 4, 64, post_mult=3.0)


@pytest.mark.parametrize("name", ["activate", "activate_bwd"])
def test_extreme_logits_and_overflowed_norms_stay_finite(name, device):
    run = launcher(name, device.type, 4, 64)
    inputs = dict(zip([t.name for t in run.kernel.inputs], make_inputs(run.kernel, run.p, 6, 0, device), strict=True))
    inputs["z"][0], inputs["z"][1] = 1e30, -1e30
    inputs["z"][2], inputs["rinv"][2] = torch.inf, 0.0  # a row so large that its norm overflowed
    for out in run(*inputs.values()):
        assert torch.isfinite(out[3:] if out.shape[0] == 6 else out[:0]).all()
        if out.shape[0] == 6:
            assert torch.isfinite(out[2]).all()
            assert not out.isnan().any()
