"""``pre_grad`` against the float64 reference, and its tilings."""

import pytest

from tests.tl_kernels.checks import check, problems
from tl_kernels import KERNELS

#: Tokens of one warp and of several, several tokens a block, half a vector and two of them a thread, both directions.
TILINGS = (
    {"block_T": 4, "threads": 128},
    {"block_T": 2, "threads": 128, "block_C": 512, "reverse": False},
    {"threads": 32, "block_C": 128, "warps": 0},
    {"threads": 32, "block_C": 512, "warps": 0},
    {"threads": 128, "block_C": 1024, "reverse": False},
)


@problems()
@pytest.mark.parametrize("name", ["pre_grad"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@pytest.mark.parametrize("changes", TILINGS, ids=str)
def test_every_tiling_matches_the_reference(device, changes):
    kernel = KERNELS["pre_grad"]
    p = kernel.problem(3, 1096)
    cfg = {**kernel.default(p), "threads": 32, "block_C": 256, "warps": 8, **changes}
    assert kernel.invalid(p, cfg) is None
    check("pre_grad", device.type, 3, 1096, cfg=cfg)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"block_T": 3}, "block_T=3"),
        ({"threads": 16}, "threads=16"),
        ({"block_C": 320}, "block_C=320"),
        ({"threads": 128, "block_C": 1024, "warps": 6}, "warps=6"),
        ({"warps": 96}, "registers"),
    ],
)
def test_a_tiling_that_cannot_work_says_why(changes, why):
    kernel = KERNELS["pre_grad"]
    p = kernel.problem(4, 2560)
    assert why in kernel.invalid(p, {**kernel.default(p), "threads": 32, "block_C": 256, **changes})
