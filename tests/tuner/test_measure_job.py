"""tuner/measure_job.py on the CPU target: gate first, then time; a wrong program gives no time."""

import pytest

from tl_kernels import KERNELS
from tl_kernels.launch import Launcher
from tuner import measure_job as module
from tuner.effort import Effort
from tuner.measure_job import confirm_job, measure_job

EFFORT = Effort(trials=1, samples=5, sample_ms=50.0, finalists=1, rounds=4, confirm_ms=50.0)
KERNEL = KERNELS["pre"]
P = KERNEL.problem(2, 96)
CFG = KERNEL.default(P)


def test_a_right_configuration_gets_errors_and_a_time():
    result = measure_job("pre", P, 40, CFG, "cpu", EFFORT, 0, None)
    assert result["outcome"] == "ok"
    assert 0 < result["error"]["u"] < 4e-3
    low, high = result["time_ci_us"]
    assert 0 < low <= result["time_us"] <= high


def test_a_wrong_configuration_gets_a_reason_and_no_time(monkeypatch):
    class Wrong(Launcher):
        def __call__(self, *inputs, out=None):
            (u,) = super().__call__(*inputs, out=out)
            return (u * 1.05,)

    monkeypatch.setattr(module, "Launcher", Wrong)
    result = measure_job("pre", P, 40, CFG, "cpu", EFFORT, 0, None)
    assert result["outcome"] == "wrong"
    assert result["reason"].startswith("u: relative error")
    assert "time_us" not in result


def test_a_slow_configuration_is_marked():
    assert measure_job("pre", P, 40, CFG, "cpu", EFFORT, 0, best_us=1e-3)["outcome"] == "slow"


def test_confirmation_returns_one_list_per_configuration_and_one_for_the_reference():
    samples = confirm_job("pre", P, 40, [CFG, CFG], "cpu", EFFORT, 0, True)
    assert len(samples) == 3
    assert len({len(s) for s in samples}) == 1
    assert all(us > 0 for s in samples for us in s)


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    import torch

    from tl_kernels.launch import device_arch

    arch = device_arch(torch.device("cuda", 0))
    result = measure_job("pre", P, 4096, CFG, arch, EFFORT, 0, None)
    assert result["outcome"] == "ok"
    assert len(confirm_job("pre", P, 4096, [CFG], arch, EFFORT, 0, False)) == 1
