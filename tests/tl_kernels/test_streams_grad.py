"""``streams_grad`` against the float64 reference."""

import pytest

from tests.tl_kernels.checks import FEW, check, problems
from tl_kernels import KERNELS

KERNEL = KERNELS["streams_grad"]
#: Two slices of the channels, blocks of channels that divide C and that do not, one split and several.
TILINGS = (
    (4, 160, {"block_T": 64, "block_C": 64, "splits": 2, "threads": 256}),
    (4, 128, {"block_T": 64, "block_C": 64, "splits": 1, "threads": 256}),
    (2, 264, {"block_T": 64, "block_C": 128, "splits": 3, "threads": 256}),
    (8, 72, {"block_T": 32, "block_C": 32, "splits": 2, "threads": 256}),
    (5, 72, {"block_T": 64, "block_C": 32, "splits": 2, "threads": 512}),  # slices of 40 columns in 48
)
SEED = {**dict(KERNEL.seeds[0]), "splits": 2}


@problems((*FEW, (1, 100, "bfloat16"), (3, 130, "float16"), (2, 77, "float32"), (8, 72, "float32")), FEW)
@pytest.mark.parametrize("name", ["streams_grad"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@pytest.mark.parametrize(("n", "C", "changes"), TILINGS)
def test_every_tiling(n, C, changes, device):
    p = KERNEL.problem(n, C)
    cfg = {**KERNEL.default(p), **changes}
    assert KERNEL.invalid(p, cfg) is None
    check("streams_grad", device.type, n, C, cfg=cfg, tokens=(1, 37, 64, 131))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "C", "changes"),
    [
        (2, 2560, {}),
        (4, 2560, {}),
        (4, 1000, {}),
        (4, 2560, {"threads": 512}),
        (4, 2560, {"swizzle": 0}),
        (4, 2560, {"overlap": 0}),
        (4, 2560, {"block_C": 32}),
        (8, 2560, {"block_T": 32, "block_C": 32, "overlap": 0}),
        (8, 2560, {"block_C": 32, "stages": 1, "swizzle": 0}),
    ],
)
def test_configurations_for_a_gpu(n, C, changes):
    check("streams_grad", "cuda", n, C, cfg={**SEED, **changes}, tokens=(1, 37, 64, 8190, 8192))


@pytest.mark.parametrize(
    ("n", "changes", "why"),
    [
        (4, {"block_C": 48, "threads": 512, "swizzle": 0}, "4 slices"),  # 12 channels in each
        (4, {"block_C": 128}, "registers"),
        (4, {"block_C": 48}, "swizzle=1"),
        (4, {"stages": 1}, "swizzle=1"),
    ],
)
def test_what_cannot_work_says_why(n, changes, why):
    assert why in KERNEL.invalid(KERNEL.problem(n, 2560), {**SEED, **changes})


def test_swizzled_rows_are_for_16_bit_streams():
    seed = {**SEED, "overlap": 0, "block_C": 32}
    assert "swizzle=1" in KERNEL.invalid(KERNEL.problem(4, 2560, "float32"), seed)
    assert KERNEL.invalid(KERNEL.problem(4, 2560, "float16"), seed) is None


@pytest.mark.parametrize("seed", KERNEL.seeds, ids=str)
def test_every_seed_serves_some_problem(seed):
    assert any(KERNEL.invalid(KERNEL.problem(n, 2560), seed) is None for n in (2, 4, 8))
