"""``post_res_coefficients_bwd``: ``coefficients_bwd`` where H_pre has no gradient."""

import pytest
import torch

from tests.tl_kernels.checks import COEFFICIENTS, check, launcher, problems
from tuner.inputs import make_inputs

NAME = "post_res_coefficients_bwd"


@problems((COEFFICIENTS[0], COEFFICIENTS[3], COEFFICIENTS[7]), COEFFICIENTS)
def test_matches_the_reference(device, n, C, dtype):
    check(NAME, device, n, C, dtype)


@pytest.mark.parametrize("options", [{"iters": 0}, {"iters": 3, "order": "rows_first", "post_mult": 3.0}], ids=str)
def test_options(device, options):
    check(NAME, device.type, 4, 64, tokens=(37,), **options)


def test_leaves_the_rows_of_H_pre_zero(device):
    run = launcher(NAME, device.type, 4, 64)
    dzs, dab = run(*make_inputs(run.kernel, run.p, 40, 0, device.type))
    assert not dzs[:4].any()
    assert not dab.sum(0)[[0, 3, 4, 5, 6]].any()
    assert torch.count_nonzero(dzs[4:]) > 0
