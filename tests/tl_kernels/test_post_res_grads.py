"""``post_res_grads`` against the float64 reference."""

import pytest

from tests.tl_kernels.checks import check, problems


@problems()
@pytest.mark.parametrize("name", ["post_res_grads"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)
