"""``streams_grad`` against the float64 reference."""

import pytest

from tests.tl_kernels.checks import FEW, check, problems
from tl_kernels import KERNELS
from tl_kernels.streams_grad_roles import helpers_of

KERNEL = KERNELS["streams_grad"]
#: Two slices of the channels, blocks of channels that divide C and that do not, one split and several.
TILINGS = (
    (4, 160, {"block_T": 64, "block_C": 64, "splits": 2, "threads": 256}),
    (4, 128, {"block_T": 64, "block_C": 64, "splits": 1, "threads": 256}),
    (2, 264, {"block_T": 64, "block_C": 128, "splits": 3, "threads": 256}),
    (8, 72, {"block_T": 32, "block_C": 32, "splits": 2, "threads": 256}),
    (5, 72, {"block_T": 64, "block_C": 32, "splits": 2, "threads": 512}),  # slices of 40 columns in 48
)
SEED = {**dict(KERNEL.seeds[1]), "splits": 2, "widen": 3}
PLAIN = {**SEED, "roles": 0}
#: With a role for the copies: several tiles a block and none, helpers with several slices each, a ragged last slice, padded columns.
ROLES = (
    (4, 160, {}),
    (4, 160, {"splits": 1}),
    (4, 264, {"helpers": 2}),
    (2, 264, {"block_C": 128, "helpers": 3, "splits": 3}),
    (8, 72, {"block_C": 16, "helpers": 1}),
    (3, 200, {"block_C": 32, "helpers": 4}),
    (5, 72, {"block_C": 16, "splits": 1}),
    (1, 136, {"block_C": 128}),
    (2, 136, {"widen": 2}),
)


@problems(FEW, FEW)
@pytest.mark.parametrize("name", ["streams_grad"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@pytest.mark.parametrize(("n", "C", "changes"), TILINGS)
def test_every_tiling(n, C, changes, device):
    p = KERNEL.problem(n, C)
    cfg = {**KERNEL.default(p), **changes}
    assert KERNEL.invalid(p, cfg) is None
    check("streams_grad", device.type, n, C, cfg=cfg, tokens=(1, 37, 64, 131))


@pytest.mark.parametrize(("n", "C", "changes"), ROLES)
def test_roles(n, C, changes, device):
    cfg = {**SEED, **changes}
    assert KERNEL.invalid(KERNEL.problem(n, C), cfg) is None
    check("streams_grad", device.type, n, C, cfg=cfg, tokens=(1, 37, 64, 131, 1500))


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
    check("streams_grad", "cuda", n, C, cfg={**PLAIN, **changes}, tokens=(1, 37, 64, 8190, 8192))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "C", "changes"),
    [
        (1, 2560, {"block_C": 128, "splits": 6}),
        (2, 2560, {"block_C": 128, "splits": 7, "helpers": 10}),
        (3, 2560, {"splits": 4, "helpers": 10}),
        (4, 2560, {"splits": 4, "helpers": 10}),
        (4, 1000, {"splits": 9, "helpers": 4}),
        (4, 4096, {"splits": 2}),
        (4, 7168, {"splits": 2, "helpers": 19}),
        (4, 2560, {"splits": 4, "helpers": 10, "widen": 2}),
        (8, 2560, {"block_C": 16, "splits": 4, "widen": 2}),
        (8, 2560, {"block_C": 16, "splits": 4}),
    ],
)
def test_roles_on_a_gpu(n, C, changes):
    check("streams_grad", "cuda", n, C, cfg={**SEED, **changes}, tokens=(1, 37, 64, 700, 8190, 8192))


@pytest.mark.parametrize(
    ("n", "changes", "why"),
    [
        (4, {"roles": 0, "block_C": 48, "threads": 512, "swizzle": 0}, "4 slices"),  # 12 channels in each
        (4, {"block_C": 128}, "registers"),
        (4, {"roles": 0, "block_C": 48}, "swizzle=1"),
        (4, {"roles": 0, "stages": 1}, "swizzle=1"),
        (4, {"threads": 128}, "roles=1"),
        (4, {"swizzle": 0}, "roles=1"),
        (4, {"roles": 0, "helpers": 10}, "helpers=10"),
        (4, {"splits": 1, "helpers": 10}, "at least 2"),
        (4, {"helpers": 41}, "40 slices"),
        (8, {"block_C": 32}, "shared memory"),
    ],
)
def test_what_cannot_work_says_why(n, changes, why):
    assert why in KERNEL.invalid(KERNEL.problem(n, 2560), {**SEED, **changes})


@pytest.mark.parametrize(("C", "helpers"), [(2560, 10), (4096, 4), (7168, 19), (132 * 64, 0), (200 * 64, 0)])
def test_helpers_take_the_multiprocessors_left_over(C, helpers):
    G = C // 64
    assert helpers_of(KERNEL.problem(4, C)) == helpers
    assert G > 132 or helpers <= 132 - 132 // G * G


def test_swizzled_rows_are_for_16_bit_streams():
    seed = {**PLAIN, "overlap": 0, "block_C": 32}
    assert "swizzle=1" in KERNEL.invalid(KERNEL.problem(4, 2560, "float32"), seed)
    assert KERNEL.invalid(KERNEL.problem(4, 2560, "float16"), seed) is None


@pytest.mark.parametrize("seed", KERNEL.seeds, ids=str)
def test_every_seed_serves_some_problem(seed):
    assert any(KERNEL.invalid(KERNEL.problem(n, 2560), seed) is None for n in (2, 4, 8))
