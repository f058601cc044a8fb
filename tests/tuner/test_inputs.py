"""tuner/inputs.py: repeatable, of the spec's shapes and dtypes, consistent with each other."""

import pytest
import torch

from tl_kernels import KERNELS, NAMES
from tuner.inputs import make_inputs, splits_of


@pytest.mark.parametrize("name", NAMES)
def test_inputs_have_the_specs_shapes_and_dtypes_and_repeat(name):
    kernel = KERNELS[name]
    p = kernel.problem(3, 40, "float16")
    first, second, other = (make_inputs(kernel, p, 5, seed) for seed in (0, 0, 1))
    for tensor, a, b, c in zip(kernel.inputs, first, second, other, strict=True):
        assert tuple(a.shape) == tensor.shape(p, 5, splits_of(tensor)), tensor.name
        assert a.dtype is getattr(torch, tensor.dtype_name(p)), tensor.name
        assert a.is_contiguous()
        assert torch.isfinite(a).all()
        assert torch.equal(a, b), tensor.name
        assert not torch.equal(a, c), tensor.name


def test_splits_are_as_many_as_their_writers_make():
    """Of the coefficient kernels' dab a row for each of their blocks; what sums them up is timed on that many."""
    sums, writer = KERNELS["sum_parts"], KERNELS["coefficients_bwd"]
    dphi, dab = make_inputs(sums, sums.problem(4, 64), 5, 0)
    assert (len(dphi), len(dab)) == (3, writer.default(writer.problem(4, 64))["splits"])


def test_rinv_belongs_to_x():
    kernel = KERNELS["project_bwd"]
    p = kernel.problem(4, 64)
    values = dict(zip([t.name for t in kernel.inputs], make_inputs(kernel, p, 7, 0), strict=True))
    x = values["x"].double().flatten(1)
    torch.testing.assert_close(values["rinv"].double(), torch.rsqrt(x.square().mean(-1) + 1e-6), rtol=1e-6, atol=0)


def test_coefficients_lie_where_a_model_has_them():
    kernel = KERNELS["post_res"]
    _, _, H_post, H_res = make_inputs(kernel, kernel.problem(4, 32), 64, 0)
    assert H_res.min() > 0
    assert H_res.max() < 1
    assert H_post.min() > 0
    assert H_post.max() < 2
