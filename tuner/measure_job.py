"""What the measuring process does: one process, one job at a time, so that nothing else runs on the device while it times.

It keeps the inputs and float64 answers of the last few shapes, because a study measures one shape many times.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch

from tl_kernels import KERNELS
from tl_kernels.launch import Launcher
from tl_kernels.spec import Config, Problem
from tuner.effort import Effort
from tuner.errors import one_line
from tuner.gate import RAGGED, Case, GateError, check, reference_fp64
from tuner.inputs import make_inputs
from tuner.timing import Clock, median, median_interval
from tuner.worker_main import FatalError

#: Share of the device's memory that kept cases may take, and bytes on the CPU.
KEEP_SHARE = 0.25
KEEP_CPU_BYTES = 1 << 30
_cases: OrderedDict[tuple[Any, ...], Case] = OrderedDict()


@functools.cache
def _clock(device: str) -> Clock:
    return Clock(device)


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


def _guard(device: str, body: Any) -> Any:
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
        if device != "cpu":
            try:
                torch.cuda.synchronize()
            except Exception:  # an illegal access or a launch failure stays with the context
                raise FatalError(one_line(e)) from e
        raise


def measure_job(
    name: str, p: Problem, T: int, cfg: Config, target: str, effort: Effort, seed: int, best_us: float | None
) -> dict[str, Any]:
    """Gate, then time one configuration. Returns ``{"outcome": "ok" | "slow" | "wrong", ...}`` with the error per output (the largest over
    the token counts), time_us, time_ci_us and samples; raises what the launch raises.
    """
    device = "cpu" if target == "cpu" else "cuda"

    def body() -> dict[str, Any]:
        launcher = Launcher(KERNELS[name], p, cfg, target)
        errors: dict[str, float] = {}
        # the tuned size too on a GPU: some faults show at full size only; on the CPU its float64 answer would cost more than the trial
        full = [] if target == "cpu" else [T]
        try:
            for tokens in (*RAGGED, *full):
                for output, error in check(launcher, _case(name, p, tokens, device, seed, True)).items():
                    errors[output] = max(error, errors.get(output, 0.0))
        except GateError as e:
            return {"outcome": "wrong", "reason": str(e)}
        case = _case(name, p, T, device, seed, bool(full))
        out = launcher.empty_outputs(T, case.inputs[0].device)
        samples, slow = _clock(device).measure(lambda: launcher(*case.inputs, out=out), effort.samples, effort.sample_ms, best_us)
        return {
            "outcome": "slow" if slow else "ok",
            "error": errors,
            "time_us": median(samples),
            "time_ci_us": median_interval(samples),
            "samples": len(samples),
        }

    return _guard(device, body)


def confirm_job(
    name: str, p: Problem, T: int, cfgs: list[Config], target: str, effort: Effort, seed: int, with_reference: bool
) -> list[list[float]]:
    """Samples in microseconds of every configuration (and, last, of the PyTorch reference in the stream dtype), interleaved."""
    device = "cpu" if target == "cpu" else "cuda"
    kernel = KERNELS[name]

    def body() -> list[list[float]]:
        case = _case(name, p, T, device, seed, device != "cpu")
        calls = []
        for cfg in cfgs:
            launcher = Launcher(kernel, p, cfg, target)
            out = launcher.empty_outputs(T, case.inputs[0].device)
            calls.append(functools.partial(launcher, *case.inputs, out=out))
        if with_reference:
            calls.append(functools.partial(run_reference, name, p, case.inputs))
        clock = _clock(device)
        first = clock.interleaved(calls, 1 if device == "cpu" else 3)[-1]
        rounds = max(3, min(effort.rounds, int(effort.confirm_ms * 1e3 / max(1e-3, sum(first)))))
        return [list(column) for column in zip(*clock.interleaved(calls, rounds), strict=True)]

    return _guard(device, body)


def run_reference(name: str, p: Problem, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The PyTorch reference as the CPU fallback runs it: in float32, results rounded to their dtypes."""
    kernel = KERNELS[name]
    results = kernel.reference(*(t.float() for t in inputs), **dict(p.options))
    return tuple(r.to(getattr(torch, t.dtype_name(p))) for r, t in zip(results, kernel.outputs, strict=True))


def copy_job(target: str) -> float:
    """Copy bandwidth in GB/s."""
    return _clock("cpu" if target == "cpu" else "cuda").copy_gbps()
