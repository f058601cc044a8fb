"""tuner/plan.py: names to tasks."""

import pytest

from tl_kernels import NAMES
from tuner.errors import TuneError
from tuner.hardware import Hardware
from tuner.plan import make_tasks, parse_tokens, pick_kernels, pick_workloads, shape_workloads
from tuner.workloads import load_workloads

GPU = Hardware(profile="h100", name="NVIDIA H100 80GB HBM3", arch="sm_90a")


def test_kernels_come_in_boundary_order_and_all_by_default():
    assert pick_kernels(None) == list(NAMES)
    assert pick_kernels(["post_res", "pre"]) == ["pre", "post_res"]


def test_a_close_name_is_suggested():
    with pytest.raises(TuneError, match="did you mean 'post_res'"):
        pick_kernels(["postres"])
    with pytest.raises(TuneError, match="did you mean 'mhc-27b'"):
        pick_workloads(["mhc27b"], load_workloads())


@pytest.mark.parametrize("text", ["x", "0", "", "8,-1"])
def test_bad_token_counts_are_refused(text):
    with pytest.raises(TuneError, match="--tokens"):
        parse_tokens(text)


def test_shapes_of_one_s_own_are_workloads():
    workloads = shape_workloads("8192x4x3072, 64x2x96,2048x4x3072,64x4x3072,2048x4x3072", "float32")
    assert [(w.n, w.C, w.dtype, w.tokens, w.cpu_tokens) for w in workloads] == [
        (4, 3072, "float32", [64, 2048, 8192], [64, 2048, 8192]),
        (2, 96, "float32", [64], [64]),
    ]


@pytest.mark.parametrize(
    ("text", "dtype", "said"),
    [
        ("8192x4", "bfloat16", "--shapes: got '8192x4', wanted TxnxC"),
        ("8x9x64", "bfloat16", r"--shapes: got '8x9x64', wanted T and C of at least 1 and n in 1\.\.8"),
        (",", "bfloat16", "--shapes: got none, wanted at least one TxnxC"),
        ("99999999999x4x64", "bfloat16", r"--shapes: n=4, C=64: tokens\[0\]: got 99999999999"),
        ("8x4x64", "float64", "unknown dtype 'float64'"),
    ],
)
def test_shapes_that_are_none_are_refused(text, dtype, said):
    with pytest.raises(TuneError, match=said):
        shape_workloads(text, dtype)


def test_a_program_without_channels_gets_one_task_for_all_workloads():
    workloads = pick_workloads(["mhc-27b", "deepseek-v4-flash"], load_workloads())
    tasks = make_tasks(["sinkhorn", "pre"], workloads, GPU, [2048, 8192])
    assert [(t.kernel, t.p.C, t.T) for t in tasks if t.kernel == "pre"] == [
        ("pre", 2560, 2048), ("pre", 2560, 8192), ("pre", 4096, 2048), ("pre", 4096, 8192),
    ]  # fmt: skip
    assert [(t.T, t.covers) for t in tasks if t.kernel == "sinkhorn"] == [(2048, (2560, 4096)), (8192, (2560, 4096))]


def test_a_program_without_tokens_gets_one_task_for_all_token_counts():
    workloads = pick_workloads(["mhc-27b", "deepseek-v4-flash"], load_workloads())
    tasks = make_tasks(["sum_parts"], workloads, GPU, [2048, 8192])
    assert [(t.p.C, t.T, t.covers) for t in tasks] == [(2560, 8192, (2560,)), (4096, 8192, (4096,))]
