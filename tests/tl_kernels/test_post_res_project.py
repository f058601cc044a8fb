"""``post_res_project`` against the float64 reference."""

import pytest

from tests.tl_kernels.checks import FEW, check, problems


@problems(FEW)
@pytest.mark.parametrize("name", ["post_res_project"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)
