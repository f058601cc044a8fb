"""A pipeline over planted jobs: real worker processes, real storage, no compiler."""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mhc.profile import save_profile
from mhc.schema import Entry, Profile, Provenance
from tests.tuner import planted, planted_latency
from tl_kernels import KERNELS
from tuner import cli, latency_check, latency_job, latency_runs
from tuner import pipeline as pipeline_module
from tuner.devices import Device
from tuner.display import Display
from tuner.effort import Effort
from tuner.hardware import Hardware, cpu_model
from tuner.pipeline import Pipeline
from tuner.settings import Settings
from tuner.storage import open_storage
from tuner.store import Store
from tuner.task import Task
from tuner.writer import ProfileWriter

#: With characters that a URL must quote; as it stands in the URL.
PASSWORD = "s3cr3t%40pw"
HARDWARE = Hardware(profile="cpu", name="Test CPU", arch="cpu")
EFFORT = Effort(trials=4, samples=5, sample_ms=10.0, finalists=2, rounds=9, confirm_ms=20.0)


def make_task(kernel: str = "pre_bwd", C: int = 1280, T: int = 64, arch: str = "cpu", device: str = "Test CPU") -> Task:
    return Task(kernel, KERNELS[kernel].problem(4, C), T, arch, "cpu" if arch == "cpu" else "h100", (C,), device)


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose files have the names of modules that are not to be taken from it."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("tuner", "mhc", "tl_kernels", "queue", "select", "runpy", "json"):
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__name__} was taken from the working folder')\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def make_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pipeline]]:
    """``make_pipeline(tasks, trials=..., compile=..., measure=...)`` on one storage and one profile per test."""
    stores = []

    def make(
        tasks: list[Task],
        trials: int = 4,
        compile: Callable[..., Any] = planted.compile_ok,
        measure: Callable[..., Any] = planted.measure_ok,
        confirm: Callable[..., Any] = planted.confirm_ok,
        time_limit: float | None = None,
        devices: tuple[Device, ...] = (Device(0, None, "", ""),),
        hardware: Hardware = HARDWARE,
        sampler: str = "tpe",
        related: tuple[Profile, ...] = (),
        rounds: int = EFFORT.rounds,
        seed: int = 0,
        copy: Callable[..., Any] = planted.copy_ok,
    ) -> Pipeline:
        monkeypatch.setattr(pipeline_module, "related_profiles", lambda arch, gpu, sm_count: list(related))
        jobs = {"compile_job": compile, "measure_job": measure, "confirm_job": confirm, "copy_job": copy}
        for name, job in jobs.items():
            monkeypatch.setattr(pipeline_module, name, job)
        log = tmp_path / "workers.log"
        settings = Settings(
            hardware, replace(EFFORT, rounds=rounds), trials, time_limit, seed, jobs=2, command="mhc-tune", log=log, sampler=sampler
        )
        stores.append(Store(open_storage(f"sqlite:///{tmp_path}/study.db"), "sqlite"))
        writer, orders = ProfileWriter(tmp_path / "cpu.yaml", hardware), [settings.order(task) for task in tasks]
        return Pipeline(settings, orders, stores[-1], writer, Display(Console(quiet=True)), devices)

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A database of this test's own on the server at 127.0.0.1:5432, with a password in its URL (trust authentication takes any)."""
    psycopg = pytest.importorskip("psycopg", reason="no PostgreSQL driver")
    try:
        admin = psycopg.connect("postgresql://root@127.0.0.1:5432/test", connect_timeout=3, autocommit=True)
    except psycopg.OperationalError as e:
        pytest.skip(f"no PostgreSQL server at 127.0.0.1:5432: {' '.join(str(e).split())}")
    name = f"mhc_{uuid.uuid4().hex[:12]}"
    with admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            yield f"postgresql://root:{PASSWORD}@127.0.0.1:5432/{name}"
        finally:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each storage in turn, empty."""
    return str(request.getfixturevalue("postgres_url")) if request.param == "postgresql" else f"sqlite:///{tmp_path}/shared.db"


def make_entry(kernel, C=64, tokens=64, **fields):
    spec = KERNELS[kernel]
    measured = {"time_us": 100.0, "time_ci_us": (99.0, 101.0), "gbps": 1.0, "copy_share": 0.5, "default_us": 100.0, "verdict": "default"}
    config = {"config": spec.default(spec.problem(4, C)), "error": {"u": 0.0}, "source_hash": spec.source_hash}
    return Entry(**{"kernel": kernel, "n": 4, "C": C, "dtype": "bfloat16", "tokens": tokens, **measured, **config, **fields})


def outcome(monkeypatch, capsys, *args):
    """Exit code and what was printed of ``mhc-tune *args``, in this process."""
    monkeypatch.setattr(sys, "argv", ["mhc-tune", *map(str, args)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    printed = capsys.readouterr()
    return e.value.code, printed.out + printed.err


@pytest.fixture
def profile_here(tmp_path):
    """A function that writes a profile of these entries, measured here, and gives its path."""
    import tilelang
    import torch

    versions = {"torch": torch.__version__, "tilelang": tilelang.__version__}
    where = Provenance(gpu=cpu_model(), arch="cpu", copy_gbps=30.0, seed=0, trials=1, date="2026-11-22", command="x", **versions)

    def write(*entries, name="mine.yaml", **changes):
        save_profile(Profile(schema_version=1, provenance=where.model_copy(update=changes), entries=list(entries)), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def check_here(monkeypatch, capsys, tmp_path):
    """``check_here(*args, **planted) -> exit code, what was printed``: the command in this process, its measuring processes planted.

    ``real``: they are not; ``surface``: whether what looks at another revision is not either.
    """
    monkeypatch.setattr("tuner.hardware._gpu", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a device lock of its own

    def run(*args, real=False, surface=False, **spec):
        for job in () if real else ("start", "copy", "build", "prepare", "batch"):
            monkeypatch.setattr(latency_runs, f"{job}_job", getattr(planted_latency, f"{job}_planted"))
        monkeypatch.setattr(latency_check, "surface_job", latency_job.surface_job if surface else planted_latency.surface_planted)
        folder = tempfile.mkdtemp(dir=tmp_path)
        monkeypatch.setenv(planted_latency.VARIABLE, json.dumps({"folder": folder, **spec}))
        return outcome(monkeypatch, capsys, "check", *args)

    return run
