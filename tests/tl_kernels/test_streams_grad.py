"""``streams_grad`` against the float64 reference."""

from tests.tl_kernels.checks import check, problems


@problems()
def test_matches_the_reference(device, n, C, dtype):
    check("streams_grad", device, n, C, dtype)
