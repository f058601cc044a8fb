"""A pipeline over planted jobs: real worker processes, real storage, no compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tuner import planted
from tl_kernels import KERNELS
from tuner import pipeline as pipeline_module
from tuner.display import Display
from tuner.effort import Effort
from tuner.hardware import Hardware
from tuner.pipeline import Pipeline, Settings
from tuner.search import Task, open_storage
from tuner.writer import ProfileWriter

HARDWARE = Hardware(profile="cpu", name="Test CPU", arch="cpu")
EFFORT = Effort(trials=4, samples=5, sample_ms=10.0, finalists=2, rounds=5, confirm_ms=20.0)


def make_task(kernel: str = "pre_bwd", C: int = 1280, T: int = 64, arch: str = "cpu") -> Task:
    return Task(kernel, KERNELS[kernel].problem(4, C), T, arch, "cpu" if arch == "cpu" else "h100", (C,))


@pytest.fixture
def make_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pipeline]:
    """``make_pipeline(tasks, trials=..., compile=..., measure=...)`` on one storage and one profile per test."""

    def make(
        tasks: list[Task],
        trials: int = 4,
        compile: Callable[..., Any] = planted.compile_ok,
        measure: Callable[..., Any] = planted.measure_ok,
        time_limit: float | None = None,
    ) -> Pipeline:
        jobs = {"compile_job": compile, "measure_job": measure, "confirm_job": planted.confirm_ok, "copy_job": planted.copy_ok}
        for name, job in jobs.items():
            monkeypatch.setattr(pipeline_module, name, job)
        settings = Settings(HARDWARE, EFFORT, trials, time_limit, seed=0, jobs=2, command="mhc-tune", log=tmp_path / "workers.log")
        storage, writer = open_storage(f"sqlite:///{tmp_path}/study.db"), ProfileWriter(tmp_path / "cpu.yaml", HARDWARE)
        return Pipeline(settings, tasks, storage, writer, Display(Console(quiet=True)))

    return make
