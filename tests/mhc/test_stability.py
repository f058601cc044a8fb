"""Stability measures: values known by hand."""

import pytest
import torch

from mhc.stability import composite_gain, sum_errors
from tests.mhc.test_module import trained


def test_sum_errors_tell_rows_from_columns():
    H = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).expand(3, 2, 2)
    assert sum_errors(H) == pytest.approx((0.0, 0.25))


def test_gain_of_doubly_stochastic_matrices_is_one():
    hc = trained()
    with torch.no_grad():
        layers = [hc.coefficients(torch.randn(16, 4, 32))[2] for _ in range(30)]
    assert composite_gain(layers) == pytest.approx((1.0, 1.0), abs=0.02)


def test_gain_of_a_product_in_layer_order():
    first, second = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    # second @ first = [[0, 2], [0, 3]]; first @ second = [[3, 0], [0, 0]]
    assert composite_gain([first, second]) == (3.0, 5.0)


def test_unconstrained_mixing_explodes():
    torch.manual_seed(0)
    forward, backward = composite_gain([torch.eye(4) + 0.5 * torch.randn(8, 4, 4) for _ in range(30)])
    assert min(forward, backward) > 1e3


def test_no_tokens():
    empty = torch.zeros(0, 4, 4)
    assert sum_errors(empty) == (0.0, 0.0)
    assert composite_gain([empty]) == (1.0, 1.0)


@pytest.mark.parametrize("layers", [[], [torch.eye(2), torch.eye(3)], [torch.ones(2, 3)], [torch.ones(2)]], ids=len)
def test_bad_shapes(layers):
    with pytest.raises(ValueError, match="H_res: got shapes"):
        composite_gain(layers)
