"""tuner/measure_job.py on the CPU target: gate first, then time; a wrong program gives no time."""

import tempfile
from dataclasses import replace
from functools import partial

import pytest
import tilelang.language as T
import torch

from tl_kernels import KERNELS
from tl_kernels.launch import Launcher
from tuner import measure_job as module
from tuner.confirm import rounds_needed
from tuner.device_lock import DeviceBusy, hold
from tuner.device_process import GPU_GONE
from tuner.device_state import State, Watch
from tuner.effort import Effort
from tuner.measure_job import confirm_job, copy_job, measure_job
from tuner.timing import Clock
from tuner.worker_main import FatalError

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
    assert result["gate_s"] > 0
    assert result["timing_s"] * 1e6 > result["time_us"] * result["samples"] / 2
    assert (result["clock_mhz"], result["dropped"], result["dirty"]) == (None, 0, None)


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
    assert result["gate_s"] > 0


def build_writing_past_the_end(p, cfg):
    """``pre`` with one token too many: TileLang keeps a program within the shapes that it declares, so this one declares a larger u."""
    n, C, dtype = p.n, p.C, p.dtype
    T_ = T.dynamic("T")

    @T.prim_func
    def pre(x: T.Tensor((T_, n, C), dtype), H_pre: T.Tensor((T_, n), "float32"), u: T.Tensor((T_ + 1, C), dtype)):
        with T.Kernel(T_ + 1, threads=32) as t:
            for c in T.serial(C):
                u[t, c] = H_pre[t, 0] * x[t, 0, c] + H_pre[t, 1] * x[t, 1, c]

    return pre


def test_a_compiled_program_that_writes_past_its_output_is_caught(monkeypatch):
    monkeypatch.setattr(module, "KERNELS", {"pre": replace(KERNEL, build=build_writing_past_the_end)})
    result = measure_job("pre", KERNEL.problem(2, 96, "float32"), 40, CFG, "cpu", EFFORT, 0, None)
    assert result["outcome"] == "wrong"
    assert result["reason"] == "u: written past its end at T=1"


def test_a_slow_configuration_is_marked():
    assert measure_job("pre", P, 40, CFG, "cpu", EFFORT, 0, best_us=1e-3)["outcome"] == "slow"


def test_confirmation_returns_one_list_per_configuration_and_one_for_the_reference():
    result = confirm_job("pre", P, 40, [CFG, CFG], "cpu", EFFORT, 0, True)
    samples = result.pop("samples")
    assert len(samples) == 3
    assert len({len(s) for s in samples}) == 1
    assert all(us > 0 for s in samples for us in s)
    assert result == {"clock_mhz": None, "dropped": 0, "dirty": None}


class Throttled:
    """A monitor of a GPU that is too hot."""

    def clock(self):
        return State(sm_mhz=1200.0, reasons=("hw_thermal_slowdown",))


def test_dirt_and_clocks_are_reported(monkeypatch):
    clock = Clock("cpu", Watch(Throttled()))
    monkeypatch.setattr(module, "clock_of", lambda device: clock)
    result = measure_job("pre", P, 40, CFG, "cpu", EFFORT, 0, None)
    assert result["outcome"] == "ok"
    assert result["samples"] == EFFORT.samples
    assert (result["clock_mhz"], result["dirty"]) == (1200.0, "hw_thermal_slowdown (3 of 3 batches)")
    assert result["dropped"] == 3
    confirmed = confirm_job("pre", P, 40, [CFG], "cpu", EFFORT, 0, False)
    assert confirmed["clock_mhz"] == 1200.0
    assert confirmed["dropped"] == 3 * max(EFFORT.rounds, rounds_needed())  # an account of its own
    assert confirmed["dirty"].startswith("hw_thermal_slowdown")


def test_timing_is_alone_on_the_device_and_the_gate_is_not(monkeypatch, tmp_path):
    """While another timing runs nothing gets in; while another gate runs (its lock is shared), the gate does and the timing does not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "hold", partial(hold, timeout_s=0.05))
    checked = []
    monkeypatch.setattr(module, "check", lambda launcher, case: checked.append(case.T) or {})
    for job in (measure, confirm, copy):
        with hold("cpu"), pytest.raises(DeviceBusy, match="process"):
            job()
    assert checked == []
    for job in (measure, confirm, copy):
        with hold("cpu", shared=True), pytest.raises(DeviceBusy, match="to time"):
            job()
    assert checked == [1, 37]
    assert measure()["outcome"] == "ok"  # and everything is free again


def measure():
    return measure_job("pre", P, 40, CFG, "cpu", EFFORT, 0, None)


def confirm():
    return confirm_job("pre", P, 40, [CFG], "cpu", EFFORT, 0, False)


def copy():
    return copy_job("cpu")


class Context:
    """CUDA as its errors show it: once ``dead``, every call raises what killed it."""

    def __init__(self, monkeypatch, dead=False):
        self.dead = dead
        monkeypatch.setattr(torch.cuda, "synchronize", self.call)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def call(self, *args):
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later")

    def die(self):
        self.dead = True
        self.call()


def test_a_sticky_error_ends_the_process(monkeypatch):
    context = Context(monkeypatch)
    with pytest.raises(FatalError, match="CUDA error: an illegal memory access"):
        module._guard("cuda", context.die)


def test_an_error_that_the_device_survives_does_not(monkeypatch):
    Context(monkeypatch)

    def fails():
        raise RuntimeError("too many resources requested for launch")

    with pytest.raises(RuntimeError, match="too many resources"):
        module._guard("cuda", fails)


def test_out_of_memory_is_tried_once_more_without_the_kept_cases(monkeypatch):
    Context(monkeypatch)
    tries = []

    def fills():
        tries.append(len(module._cases))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    measure()
    assert module._cases
    with pytest.raises(torch.cuda.OutOfMemoryError):
        module._guard("cuda", fills)
    assert tries[0] > 0
    assert tries[1:] == [0]


@pytest.mark.parametrize("job", [measure_job, confirm_job, copy_job])
def test_a_lost_gpu_is_said_so_that_nothing_else_is_tried_on_it(monkeypatch, job):
    """The process that follows the one that died finds no device."""

    def init():
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "init", init)
    args = {measure_job: ("pre", P, 40, CFG, "sm_90a", EFFORT, 0, None), confirm_job: ("pre", P, 40, [CFG], "sm_90a", EFFORT, 0, False)}
    with pytest.raises(FatalError, match=f"^{GPU_GONE}: RuntimeError: No CUDA GPUs are available$"):
        job(*args.get(job, ("sm_90a",)))


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    from tl_kernels.launch import device_arch

    arch = device_arch(torch.device("cuda", 0))
    result = measure_job("pre", P, 4096, CFG, arch, EFFORT, 0, None)
    assert result["outcome"] == "ok"
    assert result["clock_mhz"] > 100
    assert result["timing_s"] > 0
    confirmed = confirm_job("pre", P, 4096, [CFG], arch, EFFORT, 0, False)
    assert len(confirmed["samples"]) == 1
    assert confirmed["clock_mhz"] > 100
