"""Everything that a run knows, as plain data for JSON (``--raw``)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tuner.study import Study

if TYPE_CHECKING:
    from tuner.pipeline import Pipeline


def raw(run: Pipeline) -> dict[str, Any]:
    """Every trial of every study; a ledger (tuner/ledger.py) reads it. The storage is not asked, it may be gone."""
    return {
        "schema_version": 1,
        "hardware": asdict(run.settings.hardware),
        "copy_gbps": run.copy_gbps,
        "seed": run.settings.seed,
        "command": run.settings.command,
        "seconds": round(run.deadline.seconds, 1),
        "devices": len(run.devices),
        "phases_s": {name: round(s, 2) for name, s in run.phases.seconds.items()},
        "storage_s": round(run.store.seconds, 2),
        "studies": [_study(study) for study in run.studies],
    }


def _study(study: Study) -> dict[str, Any]:
    search, task = study.search, study.task
    return {
        "kernel": task.kernel,
        "n": task.p.n,
        "C": list(task.covers),
        "dtype": task.p.dtype,
        "tokens": task.T,
        "study": task.key,
        "state": study.state,
        "sampler": search.sampler,
        "default": search.default,
        "funnel": search.funnel(),
        "confirmation": search.last_confirmation,
        "trials": [{"config": cfg, **asdict(result)} for cfg, result in search.results.values()],
    }
