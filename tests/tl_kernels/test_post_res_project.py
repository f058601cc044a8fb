"""``post_res_project`` against the float64 reference."""

import pytest

from tests.tl_kernels.checks import FEW, check, problems
from tl_kernels import KERNELS

KERNEL = KERNELS["post_res_project"]


@problems(FEW)
@pytest.mark.parametrize("name", ["post_res_project"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@problems(((2, 200, "bfloat16"), (4, 100, "float32"), (8, 72, "bfloat16")), FEW)
@pytest.mark.parametrize("name", ["post_res_project"])
def test_all_splits_of_a_tile_beside_each_other(name, device, n, C, dtype):
    """More splits than divide the blocks of channels."""
    cfg = {**KERNEL.default(KERNEL.problem(n, C, dtype)), "splits": 3, "order": "tokens"}
    check(name, device, n, C, dtype, cfg=cfg)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "C", "changes"),
    [
        (4, 2560, {}),
        (4, 7168, {"splits": 8}),
        (4, 1000, {"splits": 3}),
        (2, 2560, {"block_C": 128, "stages": 3}),
        (4, 2560, {"order": "channels"}),
    ],
)
def test_configurations_for_a_gpu(n, C, changes):
    cfg = {**next(seed for seed in KERNEL.seeds if seed["order"] == "tokens"), **changes}
    check("post_res_project", "cuda", n, C, cfg=cfg, tokens=(1, 37, 64, 8190, 8192))
