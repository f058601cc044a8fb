"""From a confirmation's samples to what the profile says of a kernel at a shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from mhc.schema import Entry
from tl_kernels.spec import Config
from tuner.confirm import decide
from tuner.hardware import Hardware
from tuner.search import Search
from tuner.task import config_key
from tuner.timing import median_interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class Confirmation:
    """What the confirmation job answered: ``samples`` in microseconds of each configuration, and of PyTorch where it was timed too."""

    configs: Sequence[Config]
    samples: Sequence[Sequence[float]]
    reference: Sequence[float] | None
    clock_mhz: float | None = None
    dirty: str | None = None


def stored_entry(search: Search, hardware: Hardware, copy_gbps: float, found: Confirmation) -> dict[str, Any]:
    """The confirmation as it stands in the storage: ``{"entry": fields of an Entry but C, "reference_us"}``."""
    task = search.task
    verdict = decide(found.samples, found.reference, config_key(found.configs[0]) == config_key(search.default))
    cfg = found.configs[verdict.chosen]
    result = search.results[config_key(cfg)][1]
    use_reference = verdict.reference_wins and hardware.is_cpu
    time_us = verdict.reference_us if use_reference and verdict.reference_us else verdict.time_us
    gbps = task.spec.bytes_moved(task.p, task.T) / time_us / 1e3
    entry = {
        "kernel": task.kernel,
        "n": task.p.n,
        "dtype": task.p.dtype,
        "tokens": task.T,
        "impl": "reference" if use_reference else "tilelang",
        "config": dict(cfg),
        "time_us": round(time_us, 3),
        "time_ci_us": _rounded(median_interval(found.reference) if use_reference and found.reference else verdict.time_ci_us),
        "gbps": round(gbps, 2),
        "copy_share": round(gbps / copy_gbps, 4),
        "default_us": None if verdict.default_us is None else round(verdict.default_us, 3),
        "default_ci_us": _rounded(verdict.default_ci_us),
        "default_config": dict(search.default),
        "runner_up_us": None if verdict.runner_up_us is None else round(verdict.runner_up_us, 3),
        "runner_up_ci_us": _rounded(verdict.runner_up_ci_us),
        "gain_ci": None if verdict.gain_ci is None else (round(verdict.gain_ci[0], 5), round(verdict.gain_ci[1], 5)),
        "verdict": verdict.verdict,
        "error": {name: float(f"{e:.3g}") for name, e in result.error.items()},
        "source_hash": task.spec.source_hash,
        "trials": search.count,
        "funnel": search.funnel(),
        "sampler": search.sampler,
        "registers": result.registers,
        "stack": result.stack,
        "shared_bytes": result.shared_bytes,
        "clock_mhz": found.clock_mhz,
        "dirty": found.dirty,
        **_provenance(hardware),
    }
    return {"entry": entry, "reference_us": verdict.reference_us}


def _provenance(hardware: Hardware) -> dict[str, Any]:
    import tilelang

    from tuner.writer import git_commit

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tilelang": tilelang.__version__,
        "driver": hardware.driver,
        "commit": git_commit(),
    }


def entries_of(stored: dict[str, Any], covers: Sequence[int]) -> list[Entry]:
    """One entry for every C that the study stands for; ``stored`` may come from an older tuner."""
    fields = {k: v for k, v in stored["entry"].items() if k in Entry.model_fields}
    return [Entry(**{**fields, "C": C}) for C in covers]


def _rounded(interval: Interval | None) -> Interval | None:
    return None if interval is None else (round(interval[0], 3), round(interval[1], 3))
