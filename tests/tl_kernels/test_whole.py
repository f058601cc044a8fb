"""``project_pre`` and ``post_res_project_pre``: a token's row on chip, in groups of blocks that wait for each other."""

import pytest
import torch

from tests.tl_kernels.checks import check, check_graphs, check_order, check_scratch, launcher
from tl_kernels import KERNELS, WHOLE, launch
from tl_kernels.cpu import available
from tl_kernels.launch import Launcher
from tl_kernels.meeting import scratch_size
from tl_kernels.whole import group_of, shared_bytes
from tuner.compile_job import lowered_shared_bytes

# n, C, configuration: one block or several to a group, one group or several, a ragged last slice, more than one part of a tile. slack and
# early: test_roles_in_every_order_their_barriers_allow
FORM = {"word": 4, "widen": 3, "roles": 3}
SMALL = {"block_T": 16, "block_C": 64, "groups": 1, "threads": 128, "ahead": 1, "levels": 1, "slack": 0, "early": 0, **FORM}
RELAY = {"levels": 2, "groups": 2}
PAIRS = {**RELAY, "word": 8}
GIVE = {**PAIRS, "block_T": 32, "roles": 4}
CPU = (
    (4, 64, {"groups": 2}),
    (4, 136, {}),
    (1, 200, {"block_T": 32, "groups": 2, "ahead": 2}),
    (4, 264, RELAY),
    (1, 136, {**RELAY, "ahead": 2}),
    (4, 264, PAIRS),
    (1, 136, {**PAIRS, "ahead": 2}),
    (3, 264, {**PAIRS, "block_T": 32, "slack": 1, "widen": 2}),
    (4, 264, GIVE),
    (3, 392, {**GIVE, "block_T": 16, "block_C": 128, "slack": 2, "ahead": 3}),
    (1, 136, {**RELAY, "block_T": 32, "slack": 1, "threads": 256, "roles": 4}),
)
WIDE = {**SMALL, "block_C": 128, "threads": 256}
SIXTEEN = {"block_T": 16, "threads": 128, "ahead": 3}
GPU = tuple((n, C, {**SMALL, "groups": 4}) for n in (1, 2, 3, 4) for C in (8, 200, 1288))
GPU += (
    *((n, C, {**SMALL, **RELAY, "groups": 3}) for n in (1, 2, 3, 4) for C in (264, 1288)),
    *((n, 1288, {**SMALL, "groups": 4, "slack": 1, "ahead": 3}) for n in (1, 4)),
    *((n, 1288, {**SMALL, **RELAY, "groups": 3, "ahead": 3}) for n in (2, 3)),
    (4, 2560, {**WIDE, "block_T": 32, "groups": 6}),
    (4, 2560, {**WIDE, "block_T": 32, "groups": 6, "ahead": 2}),
    (4, 2560, {**WIDE, "block_T": 32, "groups": 6, "threads": 128, "ahead": 2}),
    (4, 2560, {**WIDE, "groups": 6, "ahead": 3, "slack": 1}),
    (4, 2560, {**WIDE, "groups": 6, "ahead": 2, "levels": 2, "slack": 1}),
    (4, 2560, {**WIDE, "groups": 6, "ahead": 3, "levels": 2, "slack": 2}),
    (4, 2560, {**WIDE, "block_T": 32, "groups": 6, "slack": 1, "early": 1}),
    (2, 2560, {**WIDE, "block_T": 32, "block_C": 256, "groups": 13, "slack": 1, "early": 1}),
    (4, 4096, {**WIDE, "block_T": 32, "groups": 4, "levels": 2}),
    (4, 4096, {**WIDE, "groups": 4, "threads": 128, "ahead": 2, "levels": 2, "slack": 1}),
    (4, 7168, {**WIDE, "groups": 2, "threads": 128, "ahead": 3, "levels": 2, "slack": 1}),
    (4, 7168, {**WIDE, "groups": 2, "ahead": 3, "levels": 2, "slack": 2, "early": 1}),
    (4, 7168, {**WIDE, "block_T": 32, "groups": 2, "levels": 2, "slack": 1}),
    *((n, C, {**SMALL, **PAIRS, "groups": 3}) for n in (1, 2, 3, 4) for C in (264, 1288)),
    (4, 2560, {**WIDE, "groups": 6, "ahead": 3, "levels": 2, "slack": 2, "word": 8, "widen": 2}),
    *((n, C, {**SMALL, **GIVE, "groups": 3}) for n in (1, 2, 3, 4) for C in (264, 1288)),
    *(
        (4, C, {**WIDE, **GIVE, **SIXTEEN, "groups": g, "slack": slack})
        for C, g in ((2560, 6), (4096, 4), (7168, 2))
        for slack in (0, 1, 2)
    ),
    (4, 2560, {**WIDE, **GIVE, **SIXTEEN, "groups": 6, "threads": 256, "word": 4}),
    *(
        (n, 2560, {**WIDE, **GIVE, "groups": 6, "threads": threads, "ahead": ahead})
        for n in (2, 4)
        for threads in (128, 256)
        for ahead in (1, 2)
    ),
    (4, 2560, {**WIDE, "block_T": 32, "groups": 6, "ahead": 2, "levels": 2, "word": 8, "widen": 2}),
    (4, 7168, {**WIDE, "groups": 2, "ahead": 3, "levels": 2, "slack": 2, "early": 1, "word": 8, "widen": 2}),
    (4, 7168, {**WIDE, "block_T": 32, "groups": 2, "levels": 2, "early": 1, "word": 8, "widen": 2}),
    (2, 2560, {**WIDE, "block_T": 32, "block_C": 256, "groups": 13, "slack": 1, "early": 1, "widen": 2}),
    (4, 7168, None),
    (4, 4096, None),
    (3, 1280, None),
)
FEW = (CPU[1], CPU[3], CPU[5], CPU[8], CPU[9])  # the two programs share all but the main role
CASES = [
    pytest.param(name, "cpu", n, C, {**SMALL, **cfg}, id=f"{name}-cpu-n{n}-C{C}")
    for name in WHOLE
    for n, C, cfg in (FEW if name == "project_pre" else CPU)
]
NAMED = ("block_T", "threads", "ahead", "levels", "slack", "early", "word", "widen", "roles")
CASES += [
    pytest.param(
        name,
        "cuda",
        n,
        C,
        cfg,
        id=f"{name}-cuda-n{n}-C{C}-{'-'.join(str(cfg[k]) for k in NAMED) if cfg else 'default'}",
        marks=pytest.mark.gpu,
    )
    for name in WHOLE
    for n, C, cfg in GPU
    if cfg is None or KERNELS[name].invalid(KERNELS[name].problem(n, C), cfg) is None  # one of the two has more on chip
]


@pytest.mark.parametrize(("name", "device", "n", "C", "cfg"), CASES)
def test_matches_the_reference(name, device, n, C, cfg):
    check(name, device, n, C, cfg=cfg, tokens=(1, 37, 131) if device == "cpu" else (1, 37, 131, 1000))


@pytest.mark.skipif(not available(), reason="no C++ compiler for the CPU target")
@pytest.mark.parametrize(
    ("order", "levels", "slack", "early", "word", "roles"),
    [
        (1, 1, 0, 0, 4, 3),
        (2, 1, 1, 1, 4, 3),
        (1, 2, 0, 0, 4, 3),
        (2, 2, 1, 0, 4, 4),
        (2, 2, 2, 0, 4, 3),
        (1, 2, 2, 1, 4, 3),
        (1, 2, 0, 0, 8, 4),
        (2, 2, 2, 1, 8, 3),
        (5, 2, 2, 0, 8, 4),
    ],
)
def test_roles_in_every_order_their_barriers_allow(monkeypatch, order, levels, slack, early, word, roles):
    """An order or two of each kind."""
    kernel = KERNELS["post_res_project_pre"]
    knobs = {"levels": levels, "slack": slack, "early": early, "word": word, "roles": roles}
    cfg = {**SMALL, **knobs, "block_C": 128 if levels == 1 else 64}
    check_order(monkeypatch, kernel, kernel.problem(4, 136 if levels == 1 else 264), cfg, order, 50)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("levels", "slack", "word", "roles"),
    [(1, 0, 4, 3), (1, 1, 4, 3), *((2, slack, word, roles) for slack in (0, 1, 2) for word in (4, 8) for roles in (3, 4))],
)
@pytest.mark.parametrize("name", WHOLE)
def test_many_launches_of_many_lengths_with_one_scratch(name, levels, slack, word, roles):
    run = launcher(
        name, "cuda", 4, 1280, cfg={**SMALL, "block_T": 32, "groups": 6, "levels": levels, "slack": slack, "word": word, "roles": roles}
    )
    check_scratch(run, (1, 15, 16, 17, 95, 96, 97, 500))


@pytest.mark.gpu
@pytest.mark.parametrize("name", WHOLE)
def test_streams_and_graphs_have_scratch_of_their_own(name):
    check_graphs(launcher(name, "cuda", 4, 1280, cfg={**SMALL, "groups": 2}))


@pytest.mark.parametrize("name", WHOLE)
def test_rules_of_a_configuration(name):
    kernel = KERNELS[name]
    p = kernel.problem(4, 2560)
    good = {**WIDE, "block_T": 32, "groups": 6}
    assert kernel.invalid(p, good) is None
    for change, why in (
        ({"block_T": 64}, "wanted (16, 32) tokens"),
        ({"block_C": 32}, "(64, 128, 256) channels"),
        ({"threads": 192}, "wanted a multiple of 128"),
        ({"block_T": 16, "block_C": 64}, "divisor of block_T=16 tokens at a time, not 32"),
        ({"groups": 16}, "groups=16: 320 blocks"),
        ({"ahead": 6}, "bytes of shared memory"),
        ({"slack": 2}, "slack=2, levels=1: wanted at most one for each time that words are read"),
        ({"roles": 4}, "roles=4, levels=1, early=0: wanted levels=2, early=0"),
        ({"word": 8}, "word=8, levels=1: wanted levels=2"),
        ({"block_C": 256}, "256 registers a thread for 1024 channels of phi, wanted at most 128"),
    ):
        assert why in kernel.invalid(p, {**good, **change})
    assert "each adds up at most 128 values" in kernel.invalid(kernel.problem(4, 256), {**good, "block_T": 16, "levels": 2})
    assert "128 blocks to a group, wanted at most 72" in kernel.invalid(kernel.problem(4, 16384), {**good, "groups": 1})
    assert "112 words a thread would spill" in kernel.invalid(kernel.problem(4, 7168), {**good, "groups": 2})


@pytest.mark.parametrize(
    ("name", "n", "C", "change"),
    [
        ("project_pre", 4, 2560, GIVE),
        ("project_pre", 2, 520, {"early": 1, "ahead": 2}),
        ("post_res_project_pre", 4, 2560, PAIRS),
        ("post_res_project_pre", 2, 520, {**RELAY, "slack": 2}),
        ("post_res_project_pre", 1, 520, {"early": 1, "ahead": 2}),
    ],
)
def test_shared_memory_is_known_exactly(name, n, C, change):
    """Three ways to exchange sums, and what the second program has beside."""
    kernel, cfg = KERNELS[name], {**SMALL, "block_C": 128, **change}
    p = kernel.problem(n, C)
    assert shared_bytes(p, cfg, name == "post_res_project_pre") == lowered_shared_bytes(kernel, kernel.build(p, cfg), cfg, "sm_90a")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("n", "C", "dtype"), [(5, 64, "bfloat16"), (4, 100, "bfloat16"), (4, 64, "float16"), (4, 16384, "bfloat16")])
def test_says_what_it_does_not_serve(name, n, C, dtype):
    kernel = KERNELS[name]
    assert "wanted at most" in kernel.unserved(kernel.problem(n, C, dtype))
    assert kernel.unserved(kernel.problem(4, 2560)) is None


@pytest.mark.parametrize("name", WHOLE)
def test_needs_hopper(name):
    kernel = KERNELS[name]
    p = kernel.problem(4, 2560)
    assert kernel.unserved_on(p, "sm_90a") is None
    assert kernel.unserved_on(p, "sm_100a") is None
    for arch in ("cpu", "sm_89"):
        assert kernel.unserved_on(p, arch) == f"{name}: wanted compute capability 9.0 or later, not {arch}"


@pytest.mark.parametrize("name", WHOLE)
def test_a_gpu_too_small_to_hold_a_group_is_an_error_not_a_hang(monkeypatch, name):
    """A MIG slice of one seventh of an H100 has 16 multiprocessors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "multiprocessors", lambda: 16)
    with pytest.raises(ValueError, match=f"{name}: 20 blocks wait for each other, wanted at most 16"):
        Launcher(KERNELS[name], KERNELS[name].problem(4, 2560), {**WIDE, "groups": 1}, "sm_90a")


@pytest.mark.parametrize("name", WHOLE)
def test_scratch_is_the_places_and_the_counters(name):
    kernel = KERNELS[name]
    p = kernel.problem(4, 2560)
    cfg = {**SMALL, "block_C": 128, "groups": 6}
    assert group_of(p, cfg) == 20
    assert kernel.scratch(p, cfg) == scratch_size(20, 6, 16, 25, 5) == 6 * 5 * 20 * 25 * 16 + 12
    assert kernel.scratch(p, {**cfg, "levels": 2}) == 6 * 6 * 21 * 25 * 16 + 12  # and the totals
    # 192 words of two sums and 16 of one are shares of 12 for 18 of the 20 blocks: three sectors each
    assert kernel.scratch(p, {**cfg, "levels": 2, "word": 8}) == 2 * 6 * 6 * 21 * 18 * 12 + 12
