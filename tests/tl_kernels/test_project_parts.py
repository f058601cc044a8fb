"""``project_parts`` against the float64 reference."""

import pytest

from tests.tl_kernels.checks import FEW, check, problems
from tl_kernels import KERNELS


@problems(FEW)
@pytest.mark.parametrize("name", ["project_parts"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@problems(((3, 72, "bfloat16"),), tuple((n, C, "bfloat16") for n in (1, 2, 4, 8) for C in (77, 1280)))
@pytest.mark.parametrize("name", ["project_parts"])
def test_tf32_parts_of_bfloat16_streams(name, device, n, C, dtype):
    kernel = KERNELS[name]
    cfg = {**kernel.default(kernel.problem(n, C, dtype)), "mma": "tf32"}
    check(name, device, n, C, dtype, cfg=cfg)
