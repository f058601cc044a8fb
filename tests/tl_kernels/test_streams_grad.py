"""``streams_grad`` against the float64 reference."""

import itertools
import re

import pytest
import tilelang
from tilelang import tvm

from tests.tl_kernels.checks import FEW, check, problems
from tl_kernels import KERNELS

KERNEL = KERNELS["streams_grad"]
#: Two slices of the channels, blocks of channels that divide C and that do not, one split and several.
TILINGS = (
    (4, 160, {"block_T": 64, "block_C": 64, "splits": 2, "threads": 256}),
    (4, 128, {"block_T": 64, "block_C": 64, "splits": 1, "threads": 256}),
    (2, 264, {"block_T": 64, "block_C": 128, "splits": 3, "threads": 256}),
    (8, 72, {"block_T": 32, "block_C": 32, "splits": 2, "threads": 256}),
)
IN_PLACE = {**dict(KERNEL.seeds[0]), "splits": 2}


@problems(FEW)
@pytest.mark.parametrize("name", ["streams_grad"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@problems(((1, 100, "bfloat16"), (3, 130, "float16"), (8, 72, "float32")), FEW)
@pytest.mark.parametrize("name", ["streams_grad"])
def test_sums_in_place(name, device, n, C, dtype):
    cfg = {**KERNEL.default(KERNEL.problem(n, C, dtype)), "sums": "in_place"}
    check(name, device, n, C, dtype, cfg=cfg)


@problems(((2, 77, "float32"),), ((2, 77, "float32"), (4, 1280, "bfloat16")))
@pytest.mark.parametrize("name", ["streams_grad"])
def test_sums_in_rows_without_a_division(name, device, n, C, dtype):
    cfg = {**KERNEL.default(KERNEL.problem(n, C, dtype)), "sums": "rows"}
    check(name, device, n, C, dtype, cfg=cfg)


@pytest.mark.parametrize(("n", "C", "changes"), TILINGS)
def test_every_tiling_of_sums_in_place(n, C, changes, device):
    p = KERNEL.problem(n, C)
    cfg = {**KERNEL.default(p), "sums": "in_place", **changes}
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
        (4, 2560, {"sums": "rows"}),
        (4, 2560, {"barriers": "hand"}),
        (4, 2560, {"barriers": "hand", "threads": 512}),
        (8, 2560, {"block_T": 32, "block_C": 32, "overlap": 0}),
        (8, 2560, {"block_C": 32, "stages": 1}),
    ],
)
def test_configurations_for_a_gpu(n, C, changes):
    check("streams_grad", "cuda", n, C, cfg={**IN_PLACE, **changes}, tokens=(1, 37, 64, 8190, 8192))


@pytest.mark.parametrize(
    ("n", "changes", "why"),
    [
        (4, {"block_C": 48, "threads": 512}, "4 slices"),  # 12 channels in each
        (5, {"block_C": 32, "threads": 512}, "16 columns"),  # 40 columns: no layout of shared memory that wgmma reads
        (4, {"block_C": 128}, "registers"),
        (4, {"sums": "rows", "barriers": "hand"}, "barriers=hand"),
    ],
)
def test_sums_in_place_that_cannot_work_say_why(n, changes, why):
    assert why in KERNEL.invalid(KERNEL.problem(n, 2560), {**IN_PLACE, **changes})


@pytest.mark.parametrize(("n", "changes"), [(4, {}), (4, {"threads": 512}), (2, {"block_C": 128}), (8, {"block_C": 16})])
def test_a_thread_writes_dx_where_it_read_dy(n, changes):
    """What lets ``barriers="hand"`` do without one between the two: looked up in the CUDA source, for every thread."""
    p, cfg = KERNEL.problem(n, 2560), {**IN_PLACE, "barriers": "hand", **changes}
    assert KERNEL.invalid(p, cfg) is None
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = tilelang.lower(KERNEL.build(p, cfg), target=target).kernel_source
    extents = {name: range(int(extent)) for name, extent in re.findall(r"for \(int (\w+) = 0; \w+ < (\d+);", source)}
    place = r"\*\(uint1\*\)\(\(\(bfloat16_t\*\)dy_s\) \+ (.*)\)"

    def places(pattern):
        found = [set() for _ in range(cfg["threads"])]
        for expression in re.findall(pattern, source, re.MULTILINE):
            expression = expression.replace("(int)threadIdx.x", "thread")
            names = sorted(extents.keys() & set(re.findall(r"\w+", expression)))
            code = compile(expression, "<source>", "eval")
            for thread, values in itertools.product(range(cfg["threads"]), itertools.product(*(extents[name] for name in names))):
                found[thread].add(eval(code, {"thread": thread, "tile": 0, **dict(zip(names, values, strict=True))}))
        return found

    read, written = places(rf"^ *\*\(uint1\*\)\(dy_f .* = {place};$"), places(rf"^ *{place} = ")
    assert read == written
    assert sum(map(len, written)) == len(set().union(*written)) == 64 * n * cfg["block_C"] // 2  # each pair of channels once


@pytest.mark.parametrize("seed", KERNEL.seeds, ids=str)
def test_every_seed_serves_some_problem(seed):
    assert any(KERNEL.invalid(KERNEL.problem(n, 2560), seed) is None for n in (2, 4, 8))
