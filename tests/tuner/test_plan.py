"""tuner/plan.py: names to tasks."""

import pytest

from tl_kernels import NAMES
from tuner.errors import TuneError
from tuner.hardware import Hardware
from tuner.plan import make_tasks, parse_tokens, pick_kernels, pick_workloads
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
