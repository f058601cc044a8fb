"""The comparison every kernel test relies on must itself fail when it should."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import assert_close, poison, relative_error

ONE = torch.ones(4, 3)


def test_the_error_is_relative_to_the_whole_tensor():
    assert relative_error(1.01 * ONE, ONE) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(0.01 * ONE, torch.zeros(4, 3)) == pytest.approx(0.01 * 12**0.5, rel=1e-4)
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
    assert_close("y", 1.01 * ONE, ONE, rtol=0.011)


@pytest.mark.parametrize(
    ("actual", "expected", "complaint"),
    [
        (1.01 * ONE, ONE, "dx: relative error 1.000e-02, wanted at most 1.0e-03"),
        (torch.ones(3, 4), ONE, "dx: shape"),
        (poison(torch.empty(4, 3)), ONE, "dx: 12 of 12 actual values are NaN"),
        (ONE, poison(torch.empty(4, 3)), "dx: 12 of 12 expected values are NaN"),
        (ONE / 0, ONE / 0, "dx: 12 of 12 actual values are NaN or infinite"),
    ],
)
def test_a_wrong_tensor_is_named(actual, expected, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_close("dx", actual, expected, rtol=1e-3)


def test_poison_marks_integers_too():
    assert poison(torch.empty(2, dtype=torch.int32)).tolist() == [2**31 - 1] * 2
