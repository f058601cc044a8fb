"""Tilings of the programs that share ``tl_kernels/lanes.py``."""

import pytest

from tests.tl_kernels.checks import check
from tl_kernels import KERNELS

NAMES = ("pre_grad", "post_res_grads")
#: Tokens of one warp and of several, several tokens a block, half a vector and two of them a thread, both directions.
TILINGS = (
    {"block_T": 4, "threads": 128},
    {"block_T": 2, "threads": 128, "block_C": 512, "reverse": False},
    {"threads": 32, "block_C": 128, "warps": 0},
    {"threads": 32, "block_C": 512, "warps": 0},
    {"threads": 128, "block_C": 1024, "reverse": False},
)


@pytest.mark.parametrize("changes", TILINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_tiling_matches_the_reference(name, device, changes):
    kernel = KERNELS[name]
    p = kernel.problem(3, 1096)
    cfg = {**kernel.default(p), "threads": 32, "block_C": 256, "warps": 8, **changes}
    assert kernel.invalid(p, cfg) is None
    check(name, device.type, 3, 1096, cfg=cfg)


@pytest.mark.parametrize("name", NAMES)
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
def test_a_tiling_that_cannot_work_says_why(name, changes, why):
    kernel = KERNELS[name]
    p = kernel.problem(4, 2560)
    assert why in kernel.invalid(p, {**kernel.default(p), "threads": 32, "block_C": 256, **changes})
