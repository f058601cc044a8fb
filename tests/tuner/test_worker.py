"""``mhc-tune worker`` and ``--storage`` on the command line, over planted jobs: joining, leaving alone, and no password anywhere."""

import io
import sys
from dataclasses import replace

import pytest

from mhc.profile import load_profile, read_profile, reset
from tests.tuner import planted
from tests.tuner.conftest import PASSWORD, make_task
from tuner import cli
from tuner import pipeline as pipeline_module
from tuner import store as store_module
from tuner.effort import Effort
from tuner.errors import TuneError
from tuner.hardware import cpu_model
from tuner.storage import open_storage
from tuner.store import StorageLost, Store
from tuner.task import Order
from tuner.warm import ORDER, orders
from tuner.worker import WorkerRequest, open_orders, work

SHAPE = ("--kernels", "pre_bwd", "--workloads", "mhc-3b", "--tokens", "64")


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """``command("--gpu", ...)``: exit code and output of mhc-tune in this process, in an empty folder, with planted jobs."""
    jobs = {"compile_job": planted.compile_ok, "measure_job": planted.measure_ok, "confirm_job": planted.confirm_ok}
    for name, job in {**jobs, "copy_job": planted.copy_ok}.items():
        monkeypatch.setattr(pipeline_module, name, job)
    monkeypatch.setattr("tuner.run.find_compiler", lambda hardware: "g++")
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mhc-tune", *args])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capfd.readouterr()
        return exit.value.code, out + err

    return run


def task_here(C=1280):
    return replace(make_task(C=C), device=cpu_model())


def test_a_worker_finishes_what_an_interrupted_run_began(command, storage_url, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module.Pipeline, "_measured", interrupt)
        code, said = command("--gpu", "cpu", *SHAPE, "--trials", "4", "--storage", storage_url)
    assert code == 130, said
    code, said = command("worker", "--gpu", "cpu", "--storage", storage_url)
    assert code == 0, said
    assert "done: 1 of 1 studies, 4 configurations measured" in said
    assert "where the time went" in said
    assert not list(tmp_path.glob("configs/*.yaml")), "a worker writes no profile"
    code, said = command("--gpu", "cpu", *SHAPE, "--trials", "4", "--storage", storage_url)
    assert code == 0, said
    assert "0 configurations measured" in said
    assert read_profile(tmp_path / "configs" / "cpu.yaml").entries[0].trials == 4
    code, said = command("worker", "--gpu", "cpu", "--storage", storage_url)
    assert (code, "no open study" in said) == (0, True), said


def test_a_worker_writes_the_profile_it_is_told_to(command, tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    store = Store(open_storage(url), url)
    order = Order(task_here(), 3, Effort(3, 3, 1.0, 1, 9, 1.0), 0, "random")
    store.study(order.task.key).set_user_attr(ORDER, order.as_attr())
    store.close()
    code, said = command("worker", "--gpu", "cpu", "--storage", url, "--output", "mine.yaml")
    assert code == 0, said
    assert read_profile(tmp_path / "mine.yaml").entries[0].sampler == "random"


def test_a_worker_leaves_other_sources_and_other_devices_alone(command, tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    store = Store(open_storage(url), url)
    effort = Effort(3, 3, 1.0, 1, 9, 1.0)
    other_device = Order(replace(task_here(), device="Another CPU"), 3, effort)
    store.study(other_device.task.key).set_user_attr(ORDER, other_device.as_attr())
    changed = task_here().key.rsplit("|", 1)[0] + "|0123456789abcdef"
    store.study(changed).set_user_attr(ORDER, Order(task_here(), 3, effort).as_attr())
    store.study("somebody else's").set_user_attr(ORDER, {"from": "another version"})
    code, said = command("worker", "--gpu", "cpu", "--storage", url)
    assert code == 0
    assert f"left alone: {changed}: its kernel's source is not this checkout's" in said
    assert "Another CPU" not in said
    assert not store.study(changed).get_trials()
    assert not store.study(other_device.task.key).get_trials()
    store.close()


def test_a_file_that_is_not_there_is_not_made(command, tmp_path):
    for url in (f"sqlite:///{tmp_path}/mistyped.db", f"sqlite+pysqlite:///{tmp_path}/mistyped.db?timeout=5&password=hush"):
        with pytest.raises(TuneError, match=r"^--storage sqlite.*mistyped\.db.*: no such file, wanted what mhc-tune was given") as raised:
            work(WorkerRequest(url, "cpu", None, None, None, None, False, "mhc-tune worker"))
        assert "hush" not in str(raised.value)
    assert not list(tmp_path.glob("mistyped*"))


def test_a_run_announces_its_studies_and_keeps_what_others_asked(make_pipeline, tmp_path):
    make_pipeline([replace(make_task(), covers=(1280, 2560))], trials=7, rounds=50)
    run = make_pipeline([replace(make_task(), covers=(1280, 4096))], trials=5)
    ((name, order),) = orders(run.store)
    assert (name, order.trials, order.effort.rounds, order.task.covers) == (make_task().key, 7, 50, (1280, 2560, 4096))
    found, stale = open_orders(run.store, run.settings.hardware, ["pre_bwd"])
    assert (found, stale) == ([order], [])
    assert open_orders(run.store, run.settings.hardware, ["pre"]) == ([], [])


def lose(*args):
    raise StorageLost("--storage x: lost in mid-run: it is gone")


@pytest.mark.parametrize("where", ["tuner.worker.open_orders", "tuner.worker.Pipeline", "tuner.pipeline.Pipeline"])
def test_a_storage_lost_between_studies_is_exit_code_3_too(command, tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, lambda *args, **more: lose())
    url = f"sqlite:///{tmp_path}/x.db"
    (tmp_path / "x.db").touch()
    if where == "tuner.worker.Pipeline":
        monkeypatch.setattr("tuner.worker.open_orders", lambda *args: ([Order(task_here(), 3, Effort(3, 3, 1.0, 1, 9, 1.0))], []))
    args = ("--gpu", "cpu", *SHAPE) if where == "tuner.pipeline.Pipeline" else ("worker", "--gpu", "cpu")
    code, said = command(*args, "--storage", url)
    assert code == 3, said
    assert said.splitlines()[-1] == "mhc-tune: --storage x: lost in mid-run: it is gone"


def test_a_worker_interrupted_while_it_waits_says_that_nothing_was_measured(command, tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("tuner.worker.time.sleep", interrupt)
    code, said = command("worker", "--gpu", "cpu", "--wait", "--storage", f"sqlite:///{tmp_path}/x.db")
    assert code == 130, said
    assert said.endswith("mhc-tune: interrupted before anything was measured\n")


@pytest.mark.parametrize("found", [False, True])
def test_the_last_line_says_how_to_use_a_profile_that_mhc_does_not_find(command, tmp_path, monkeypatch, found):
    if found:
        monkeypatch.setattr("tuner.run.packaged_dir", lambda: tmp_path / "configs")
    code, said = command("--gpu", "cpu", *SHAPE, "--trials", "1")
    assert code == 0, said
    path = tmp_path / "configs" / "cpu.yaml"
    last = f"`import mhc` does not look there; to use it: MHC_PROFILE={path}, or mhc.load_profile('{path}')"
    assert (said.splitlines()[-1] == last) != found, said
    assert load_profile(path).entries
    reset()


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_run(command, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    code, said = command("--gpu", "cpu", *SHAPE, "--trials", "1", "--output", "\u00e9.yaml")
    assert code == 0, said
    assert read_profile(tmp_path / "\u00e9.yaml").entries
    assert b"entries of this run are in \\xe9.yaml" in out.buffer.getvalue()


@pytest.mark.parametrize(("url", "joins"), [("sqlite:///x.db", True), ("sqlite:///:memory:", False), ("foo", None)])
def test_only_a_storage_that_is_open_and_shared_is_said_to_be_joined(command, url, joins):
    code, said = command("--gpu", "cpu", *SHAPE, "--trials", "1", "--storage", url)
    assert code == (2 if joins is None else 0), said
    assert ("; mhc-tune worker joins in" in said) == (joins is True)
    assert ("; nobody can join in" in said) == (joins is False)


def test_no_password_lands_anywhere(command, postgres_url, tmp_path):
    psycopg = pytest.importorskip("psycopg")
    args = ("--gpu", "cpu", *SHAPE, "--trials", "2", "--raw", "raw.json", "--storage")
    code, said = command(*args, postgres_url)
    assert code == 0, said
    code, again = command(*args, f"{postgres_url}?password={PASSWORD}")
    assert code == 0, again
    assert "storage postgresql://root:***@127.0.0.1" in said
    assert "postgresql://root:***@" in read_profile(tmp_path / "configs" / "cpu.yaml").provenance.command
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert b"s3cr3t" not in path.read_bytes(), path
    assert "s3cr3t" not in said + again
    with psycopg.connect(postgres_url) as connection:
        tables = connection.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'").fetchall()
        for (table,) in tables:
            assert "s3cr3t" not in str(connection.execute(f'SELECT * FROM "{table}"').fetchall()), table


def test_children_are_not_given_the_url(command, postgres_url, tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_TUNE_STORAGE", postgres_url)
    monkeypatch.setattr(pipeline_module, "copy_job", planted.copy_unless_url_is_known)
    code, said = command("--gpu", "cpu", *SHAPE, "--trials", "1")
    assert code == 0, said
    assert "storage postgresql://root:***@" in said, "the variable names the storage"


def test_a_storage_that_is_gone_stops_the_run_with_exit_code_3(command, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "PATIENCE_S", (0.01,))
    monkeypatch.setattr(pipeline_module, "measure_job", planted.measure_then_remove_storages)
    code, said = command("--gpu", "cpu", *SHAPE, "--trials", "3", "--storage", f"sqlite:///{tmp_path}/x.db")
    assert code == 3, said
    assert "lost in mid-run" in said
    assert "stopped: 0 of 1 studies" in said
    assert "Traceback" not in said
