"""``pre_streams_grad``: ``pre_grad`` and ``streams_grad`` in one, blocks that wait for each other."""

import pytest
import torch

from tests.tl_kernels.checks import check, check_graphs, check_order, check_scratch, launcher
from tl_kernels import KERNELS, launch
from tl_kernels.cpu import available
from tl_kernels.launch import Launcher
from tl_kernels.pre_streams_grad import shared_bytes
from tuner.compile_job import lowered_shared_bytes
from tuner.inputs import make_inputs

KERNEL = KERNELS["pre_streams_grad"]
SMALL = {"block_T": 64, "block_C": 64, "splits": 2, "threads": 256, "lag": 2, "keep": 0, "ahead": 1, "turns": 2, "widen": 3}
#: Rows kept on chip.
KEPT = {"block_T": 32, "keep": 1, "lag": 4, "ahead": 2, "turns": 3}
# one block or several to a group, a ragged last slice, a row in one piece or several, of 64 threads or of 128
CPU = (
    (3, 264, {"lag": 1}),
    (2, 1288, {"splits": 1}),
    (1, 2048, {"block_C": 128, "splits": 3}),
    (4, 264, KEPT),
    (2, 1288, {**KEPT, "block_C": 128, "splits": 1, "lag": 3}),
    (3, 200, {**KEPT, "lag": 3, "ahead": 1, "turns": 4}),
)
GPU = tuple((n, C, {"splits": 3}) for n in (1, 2, 3, 4) for C in (200, 1288, 2048))
GPU += (
    *((4, 2560, {"splits": 3, "lag": lag}) for lag in (1, 2, 3)),
    (2, 2560, {"splits": 3}),
    (2, 2560, {"block_C": 128, "splits": 6}),
    (4, 4096, {}),
    (4, 7168, {"splits": 1}),
    (4, 2560, {"block_C": 32, "splits": 1}),
)
GPU += tuple((n, C, {**KEPT, "splits": 3}) for n in (1, 2, 3, 4) for C in (264, 1288))
GPU += (
    (4, 2560, {**KEPT, "splits": 3, "widen": 2}),
    (4, 2560, {**KEPT, "splits": 3, "lag": 3, "turns": 4}),
    (4, 2560, {**KEPT, "splits": 3, "turns": 2}),
    (2, 2560, {**KEPT, "splits": 6, "block_C": 128, "lag": 3}),
    (4, 4096, {**KEPT, "widen": 2}),
    (4, 7168, {**KEPT, "splits": 1}),
)


def _id(case):
    n, C, changes = case
    return f"n{n}-C{C}-" + "-".join(str({**SMALL, **changes}[k]) for k in ("block_C", "splits", "lag", "ahead", "turns", "widen", "keep"))


CASES = [pytest.param("cpu", *case, id=f"cpu-{_id(case)}") for case in CPU]
CASES += [pytest.param("cuda", *case, id=f"cuda-{_id(case)}", marks=pytest.mark.gpu) for case in GPU]


@pytest.mark.parametrize(("device", "n", "C", "changes"), CASES)
def test_matches_the_reference(device, n, C, changes):
    check(KERNEL.name, device, n, C, cfg={**SMALL, **changes}, tokens=(1, 37, 300) if device == "cpu" else (1, 37, 131, 1000))


@pytest.mark.skipif(not available(), reason="no C++ compiler for the CPU target")
@pytest.mark.parametrize(("order", "changes"), [(1, {}), (5, KEPT), (23, KEPT)])
def test_roles_in_every_order_their_barriers_allow(monkeypatch, order, changes):
    check_order(monkeypatch, KERNEL, KERNEL.problem(1, 200), {**SMALL, "lag": 3, **changes}, order, 300)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"lag": 1}, {"lag": 2}, {"lag": 3}, KEPT, {**KEPT, "lag": 3, "turns": 4}])
def test_many_launches_of_many_lengths_with_one_scratch(changes):
    run = launcher(KERNEL.name, "cuda", 4, 1280, cfg={**SMALL, "splits": 6, **changes})
    check_scratch(run, (1, 63, 64, 65, 383, 384, 385, 2000))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, KEPT], ids=["", "kept"])
def test_graphs_have_scratch_of_their_own(changes):
    check_graphs(launcher(KERNEL.name, "cuda", 4, 1280, cfg={**SMALL, **changes}))


@pytest.mark.parametrize(("rinv", "changes"), [(0.0, {}), (1.0, {}), (0.0, KEPT)])
def test_a_row_whose_norm_overflowed_has_no_gradient_through_z(rinv, changes, device):
    """Its 1/r is 0, and what z holds then may be infinite."""
    run = launcher(KERNEL.name, device.type, 1, 200, cfg={**SMALL, "lag": 3, **changes})
    inputs = dict(zip([t.name for t in KERNEL.inputs], make_inputs(KERNEL, run.p, 70, 0, device.type), strict=True))
    inputs["zs"][-1, 3] = rinv
    inputs["zs"][:-1, 3] = float("inf") if rinv == 0 else 1.0
    assert all(bool(out.float().isfinite().all()) for out in run(*inputs.values()))


def test_rules_of_a_configuration():
    p = KERNEL.problem(4, 2560)
    good = {**SMALL, "splits": 3}
    assert KERNEL.invalid(p, good) is None
    for change, why in (
        ({"block_T": 32}, "wanted 64 tokens and 256 threads"),
        ({"threads": 512}, "wanted 64 tokens and 256 threads"),
        ({"splits": 16}, "640 blocks"),
        ({"block_C": 8}, "2 slices of dz phi"),
        ({"block_C": 128}, "bytes of shared memory"),
        ({"lag": 4}, "keep=0: wanted lag of at most 3"),
        ({**KEPT, "block_T": 64}, "keep=1, block_T=64"),
        ({**KEPT, "turns": 1}, "wanted lag from 3, turns from 2"),
        ({**KEPT, "lag": 3, "turns": 5}, "at most lag + 1"),
        ({**KEPT, "block_C": 128}, "at most 64"),
        ({**KEPT, "splits": 16}, "640 blocks"),
        ({**KEPT, "turns": 4}, "bytes of shared memory"),
    ):
        assert why in KERNEL.invalid(p, {**good, **change})
    assert KERNEL.invalid(p, {**good, **KEPT}) is None
    assert "wanted so many that each adds up at most 32 sums" in KERNEL.invalid(KERNEL.problem(4, 136), {**good, **KEPT})
    assert "wanted more" in KERNEL.unserved(KERNEL.problem(4, 136))  # 11 rounds of loads, unrolled
    assert KERNEL.unserved(KERNEL.problem(4, 200)) is None
    assert KERNEL.resident(KERNEL.problem(4, 7168), good) == 112


@pytest.mark.parametrize(("n", "C", "changes"), [(1, 2048, {}), (2, 1288, {**KEPT, "lag": 3})])
def test_shared_memory_is_known_within_a_kilobyte(n, C, changes):
    p, cfg = KERNEL.problem(n, C), {**SMALL, **changes}
    said, found = shared_bytes(p, cfg), lowered_shared_bytes(KERNEL, KERNEL.build(p, cfg), cfg, "sm_90a")
    assert found <= said < found + 1024


@pytest.mark.parametrize(("n", "C", "dtype"), [(5, 64, "bfloat16"), (4, 100, "bfloat16"), (4, 64, "float16")])
def test_says_what_it_does_not_serve(n, C, dtype):
    assert "wanted at most 4 bfloat16" in KERNEL.unserved(KERNEL.problem(n, C, dtype))


def test_a_gpu_too_small_to_hold_a_group_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "multiprocessors", lambda: 78)
    with pytest.raises(ValueError, match="pre_streams_grad: 112 blocks wait for each other, wanted at most 78"):
        Launcher(KERNEL, KERNEL.problem(4, 7168), SMALL, "sm_90a")


def test_every_seed_serves_some_problem():
    for seed in KERNEL.seeds:
        assert any(KERNEL.invalid(KERNEL.problem(n, C), seed) is None for n in (2, 4) for C in (2560, 7168)), seed
