"""tuner/bench_remote.py and bench_worker.py: a real worker process, its environments, and what happens when it dies."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tuner import bench_remote, bench_worker
from tuner.bench_entrant import Spec
from tuner.bench_remote import RemoteEntrant, RivalWorker, WorkerGone, find_env, parse_envs
from tuner.errors import TuneError

TINY = Spec("eager", T=4, n=2, C=16, dtype="float32")


@pytest.fixture(scope="module")
def worker():
    started = RivalWorker("cpu")
    started.start()
    yield started
    started.close()


def test_it_checks_times_and_forgets(worker):
    assert worker.versions["torch"] == torch.__version__
    assert worker.warm([replace(TINY, layers=2)]) is None
    entrant = worker.entrant(TINY)
    assert entrant.row["agrees"], entrant.row["failures"]
    assert entrant.keys == ["forward_eager", "forward_backward_eager"]
    assert all(us > 0 for us in entrant.sample().values())
    assert set(entrant.host()) == {"forward", "record", "forward_backward"}
    entrant.close()
    with pytest.raises(RuntimeError, match="KeyError"):
        worker.call("sample", id=entrant._id)


def test_its_inputs_are_ours(worker):
    ours = TINY.cases(torch.device("cpu"))[0].fingerprint()
    assert worker.entrant(TINY).row["inputs"] == ours


def test_what_it_cannot_make_is_a_failure_in_the_row(worker):
    row = worker.entrant(replace(TINY, layers=2, chained=True)).row
    assert "no way to chain" in row["failures"][0]
    assert "unknown rival" in worker.entrant(replace(TINY, rival="nobody")).row["failures"][0]


def test_autotuners_choose_again(monkeypatch):
    class Autotuner:
        def __init__(self, cache):
            self.cache = cache

    for name in ("triton", "triton.runtime", "triton.runtime.autotuner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["triton.runtime.autotuner"].Autotuner = Autotuner
    chosen, fresh = Autotuner({"shape": "config"}), Autotuner({})
    assert bench_worker.forget_autotuning() == 1
    assert chosen.cache == fresh.cache == {}


def test_what_does_not_autotune_is_not_run_again(worker):
    assert worker.retune([TINY]) == 0


def test_a_rival_that_cannot_be_imported_is_known_from_the_start(worker):
    if importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("liger-kernel is installed here")
    assert "liger_kernel" in worker.warm([replace(TINY, rival="liger")])


def test_an_unknown_request_is_an_error_and_no_end(worker):
    with pytest.raises(RuntimeError, match="no_such_request"):
        worker.call("no_such_request")
    assert worker.call("hello")


def test_a_worker_that_dies_is_a_failure_with_its_last_words(tmp_path):
    script = tmp_path / "activate.sh"
    script.write_text("echo 'this environment is broken' >&2; exit 3\n")
    broken = RivalWorker("cpu", script)
    try:
        with pytest.raises(WorkerGone, match="died: this environment is broken"):
            broken.start()
        entrant = broken.entrant(TINY)
        assert "died" in entrant.row["failures"][0]
        assert entrant.sample() == entrant.host() == {}
        entrant.close()
    finally:
        broken.close()


def test_a_worker_that_hangs_is_killed(tmp_path):
    script = tmp_path / "activate.sh"
    script.write_text("sleep 60\n")
    hanging = RivalWorker("cpu", script)
    try:
        with pytest.raises(WorkerGone, match="gave no answer to 'hello' within"):
            hanging.call("hello", 0.2)
        assert hanging._popen.poll() is not None
    finally:
        hanging.close()


def test_a_worker_killed_between_rounds_keeps_its_row(hostile_folder):
    mortal = RivalWorker("cpu")
    mortal.start()
    entrant = mortal.entrant(TINY)
    mortal.kill()
    assert entrant.sample() == {}
    assert entrant.row["errors"]
    assert "sample: its process died" in entrant.row["failures"][0]
    assert entrant.sample() == {}
    assert len(entrant.row["failures"]) == 1
    mortal.close()


@pytest.mark.parametrize("kind", ["interpreter", "script"])
def test_environments(tmp_path, kind, hostile_folder):
    env = tmp_path / "python"
    env.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    env.chmod(0o755)
    if kind == "script":
        env = tmp_path / "activate-it.sh"
        env.write_text(f"export PATH={tmp_path}:$PATH\n")
    worker = RivalWorker("cpu", env)
    try:
        worker.start()
        assert worker.entrant(TINY).row["agrees"]
    finally:
        worker.close()


def test_a_folder_of_packages_goes_first(tmp_path):
    (tmp_path / "only_here.py").write_text("")
    links = tmp_path / "links"
    links.mkdir()
    command, variables = bench_remote.python_command(tmp_path, ["-m", "tuner.bench_worker", "cpu"], links)
    assert command[0] == sys.executable
    assert variables["PYTHONPATH"].split(":")[0] == str(tmp_path)
    assert (links / "tuner" / "bench_worker.py").is_file()
    assert (links / "tl_kernels" / "reference.py").is_file()


def test_where_a_rivals_environment_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_env("tile_kernels", {}) is None
    (tmp_path / ".rivals").mkdir()
    (tmp_path / ".rivals" / "activate-tile-kernels.sh").write_text("")
    assert find_env("tile_kernels", {}).name == "activate-tile-kernels.sh"
    monkeypatch.setenv("MHC_RIVAL_TILE_KERNELS", "/somewhere/python")
    assert str(find_env("tile_kernels", {})) == "/somewhere/python"
    given = parse_envs([f"tile-kernels={tmp_path}"])
    assert find_env("tile_kernels", given) == tmp_path


@pytest.mark.parametrize("text", ["tile_kernels", "=x", "x="])
def test_bad_environments_are_refused(text):
    with pytest.raises(TuneError, match="wanted NAME=PATH"):
        parse_envs([text])


def test_the_entrant_of_no_process_says_why():
    entrant = RemoteEntrant.failed(TINY, "its process did not start")
    assert entrant.row["failures"] == ["its process did not start"]
    assert entrant.sample() == entrant.launches() == {}
    entrant.close()
