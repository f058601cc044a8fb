"""What the measuring process does, one job at a time: gate, timing, confirmation.

Timing holds the device's lock alone, so that nothing of another tuner runs on the device meanwhile; what else is done there holds it shared
(tuner/device_lock.py). The process keeps the inputs and float64 answers of the last few shapes, because a study measures one shape many
times.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tl_kernels import KERNELS
from tl_kernels.launch import Launcher
from tl_kernels.spec import Config, Problem
from tuner.confirm import rounds_needed
from tuner.device_lock import hold, lock_name
from tuner.device_process import clock_of, device_of, end_if_beyond_use, synchronize
from tuner.effort import Effort
from tuner.gate import RAGGED, Case, GateError, check, reference_fp64
from tuner.inputs import make_inputs
from tuner.timing import Clock, median, median_interval

#: Share of the device's memory that kept cases may take, and bytes on the CPU.
KEEP_SHARE = 0.25
KEEP_CPU_BYTES = 1 << 30
_cases: OrderedDict[tuple[Any, ...], Case] = OrderedDict()


R = TypeVar("R")


def _time(device: str, body: Callable[[Clock], R]) -> tuple[R, dict[str, Any]]:
    """Run ``body`` alone on the device. Returns its result and what the clocks were, ``timing_s`` included (waiting is not)."""
    with hold(lock_name(device)):
        start, clock = time.perf_counter(), clock_of(device)
        clock.watch.start()
        result = body(clock)
        return result, {**clock.watch.report(), "timing_s": time.perf_counter() - start}


@functools.cache
def _keep_bytes(device: str) -> int:
    return KEEP_CPU_BYTES if device == "cpu" else int(KEEP_SHARE * torch.cuda.get_device_properties(0).total_memory)


def _case(name: str, p: Problem, T: int, device: str, seed: int, answer: bool) -> Case:
    """Inputs (and their answer where ``answer``), kept for the next configuration of the same shape."""
    kernel = KERNELS[name]
    key = (name, p, T, device, seed, answer)
    if key not in _cases:
        inputs = make_inputs(kernel, p, T, seed, device)
        _cases[key] = Case(T, inputs, reference_fp64(kernel, p, inputs) if answer else ())
        while len(_cases) > 1 and sum(case.nbytes for case in _cases.values()) > _keep_bytes(device):
            _cases.popitem(last=False)
    _cases.move_to_end(key)
    return _cases[key]


def _make_room() -> None:
    _cases.clear()
    torch.cuda.empty_cache()


def _guard(device: str, body: Callable[[], R]) -> R:
    """Run ``body``; once more with the caches dropped when memory runs out; end the process when the device is beyond use."""
    try:
        try:
            return body()
        except torch.cuda.OutOfMemoryError:
            _make_room()
            return body()
    except GateError:
        raise
    except Exception as e:
        end_if_beyond_use(device, e)
        raise


def measure_job(
    name: str, p: Problem, T: int, cfg: Config, target: str, effort: Effort, seed: int, best_us: float | None
) -> dict[str, Any]:
    """Gate, then time one configuration. Returns ``{"outcome": "ok" | "slow", ...}`` with the error per output (the largest over the token
    counts), time_us, time_ci_us, samples (how many), clock_mhz, dropped and dirty (tuner/device_state.py), gate_s and timing_s in seconds;
    or ``{"outcome": "wrong", "reason": ..., "gate_s": ...}``. Raises what the launch raises.
    """
    device = device_of(target)

    def body() -> dict[str, Any]:
        launcher = Launcher(KERNELS[name], p, cfg, target)
        errors: dict[str, float] = {}
        # the tuned size too on a GPU: some faults show at full size only; on the CPU its float64 answer would cost more than the trial
        full = [] if target == "cpu" else [T]
        with hold(lock_name(device), shared=True):
            start = time.perf_counter()
            try:
                for tokens in (*RAGGED, *full):
                    for output, error in check(launcher, _case(name, p, tokens, device, seed, True)).items():
                        errors[output] = max(error, errors.get(output, 0.0))
            except GateError as e:
                return {"outcome": "wrong", "reason": str(e), "gate_s": time.perf_counter() - start}
            case = _case(name, p, T, device, seed, bool(full))
            out = launcher.empty_outputs(T, case.inputs[0].device)
            synchronize(device)
            gate_s = time.perf_counter() - start
        call = functools.partial(launcher, *case.inputs, out=out)
        (samples, slow), about = _time(device, lambda clock: clock.measure(call, effort.samples, effort.sample_ms, best_us))
        return {
            "outcome": "slow" if slow else "ok",
            "error": errors,
            "time_us": median(samples),
            "time_ci_us": median_interval(samples),
            "samples": len(samples),
            "gate_s": gate_s,
            **about,
        }

    return _guard(device, body)


def confirm_job(
    name: str, p: Problem, T: int, cfgs: list[Config], target: str, effort: Effort, seed: int, with_reference: bool
) -> dict[str, Any]:
    """Time configurations (and, last, the PyTorch reference in the stream dtype) side by side. Returns ``{"samples": one list of
    microseconds each, "clock_mhz", "dropped", "dirty"}``, of all of them together.
    """
    device = device_of(target)
    kernel = KERNELS[name]

    def body() -> dict[str, Any]:
        with hold(lock_name(device), shared=True):
            case = _case(name, p, T, device, seed, device != "cpu")
            synchronize(device)
        calls: list[Callable[[], Any]] = []
        for cfg in cfgs:
            launcher = Launcher(kernel, p, cfg, target)
            out = launcher.empty_outputs(T, case.inputs[0].device)
            calls.append(functools.partial(launcher, *case.inputs, out=out))
        if with_reference:
            calls.append(functools.partial(run_reference, name, p, case.inputs))

        def rounds(clock: Clock) -> list[list[float]]:
            first = clock.warm_up(calls, 1 if device == "cpu" else 3)[-1]
            affordable = int(effort.confirm_ms * 1e3 / max(1e-3, sum(first)))
            return clock.interleaved(calls, max(rounds_needed(len(cfgs) - 1 or 1), min(effort.rounds, affordable)))

        taken, about = _time(device, rounds)
        about.pop("timing_s")
        return {"samples": [list(column) for column in zip(*taken, strict=True)], **about}

    return _guard(device, body)


def run_reference(name: str, p: Problem, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The PyTorch reference as the CPU fallback runs it: in float32, results rounded to their dtypes."""
    kernel = KERNELS[name]
    results = kernel.reference(*(t.float() for t in inputs), **dict(p.options))
    return tuple(r.to(getattr(torch, t.dtype_name(p))) for r, t in zip(results, kernel.outputs, strict=True))


def copy_job(target: str) -> float:
    """Copy bandwidth in GB/s."""
    device = device_of(target)
    return _guard(device, lambda: _time(device, lambda clock: clock.copy_gbps())[0])
