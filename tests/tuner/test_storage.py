"""tuner/storage.py and tuner/store.py: what a URL opens, what is never shown of it, and a storage that goes away."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial
from sqlalchemy import event, text

from tuner import identity
from tuner import store as store_module
from tuner.errors import TuneError
from tuner.identity import is_dead, this_process
from tuner.storage import open_storage, redact_text, redacted, sqlite_file
from tuner.store import StorageLost, Store


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://root@host/db", "postgresql://root@host/db"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        ("postgresql://u:hush@host:5432/db", "postgresql://u:***@host:5432/db"),
        ("postgresql://u:hu%40s/h@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:hu@sh hush@host/db", "postgresql://u:***@host/db"),
        ("postgresql+psycopg2://:hush@host/db", "postgresql+psycopg2://:***@host/db"),
        ("postgresql://u@host/db?sslmode=require&password=hush&x=1", "postgresql://u@host/db?sslmode=require&password=***&x=1"),
        ("postgresql://u@host/db?PASSWORD=hush", "postgresql://u@host/db?PASSWORD=***"),
        ("postgresql://u@host/db?sslpassword=hush", "postgresql://u@host/db?sslpassword=***"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "said",
    [
        "mhc-tune --storage postgresql://u:hush@host/db --trials 3",
        "mhc-tune '--storage=postgresql://u:hush@host/db?x=1'",
        "could not connect: 'postgresql://u@host/db?password=hush'",
        "host=x password=hush user=u",
        "two of them: mysql://a:hush@b/c and redis://d:hush@e",
    ],
)
def test_text_is_shown_without_passwords(said):
    assert "hush" not in redact_text(said)
    assert redact_text(redact_text(said)) == redact_text(said)


def test_text_without_a_password_stays_as_it_is():
    for said in ("mhc-tune --tokens=64 --storage sqlite:///x.db", "see https://host/a@b", "at 12:30, mail me@host"):
        assert redact_text(said) == said


@pytest.mark.parametrize(
    "url", ["postgresql://u:hush@127.0.0.1:1/db", "postgresql://u:hush@h:po%20rt/db", "postgresql://u:hu{sh}hush@[::1/db"]
)
def test_an_error_while_opening_names_the_url_without_its_password(url):
    with pytest.raises(TuneError, match="cannot be opened") as e:
        open_storage(url)
    assert "hush" not in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("url", ["mysql://root@localhost/tuning", "oracle://somebody@there/x", "nothing"])
def test_another_kind_of_database_is_told_which_are_wanted(url):
    with pytest.raises(TuneError, match=r"cannot be opened: .*; wanted postgresql://user@host/database or sqlite:///file$"):
        open_storage(url)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///a/b.db", "a/b.db"),
        (" sqlite:////tmp/x.db?timeout=3", "/tmp/x.db"),
        ("sqlite+pysqlite:///x.db", "x.db"),
        ("sqlite://", None),
        ("sqlite+pysqlite://", None),
        ("sqlitefoo", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:x?mode=memory&uri=true", None),
        ("postgresql://h/sqlite:///x", None),
    ],
)
def test_the_file_of_a_url(url, file):
    assert sqlite_file(url) == (file and Path(file))


def test_without_a_driver_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("psycopg") else find(name))
    with pytest.raises(TuneError, match=r"pip install 'psycopg\[binary\]'"):
        open_storage("postgresql://root@127.0.0.1/test")


def test_postgresql_opens_with_a_password_that_needs_quotes(postgres_url):
    store = Store(open_storage(postgres_url), postgres_url)
    study = store.study("x")
    assert store.call(store.storage.get_study_id_from_name, "x") == study._study_id
    store.close()


def test_two_processes_may_create_the_same_storage_at_once(storage_url):
    code = f"from tuner.storage import open_storage; open_storage({storage_url!r})"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(store_module, "PATIENCE_S", (0.01, 0.01))


def test_a_removed_file_ends_the_run_in_one_line(tmp_path, impatient):
    store = Store(open_storage(f"sqlite:///{tmp_path}/x.db"), f"sqlite:///{tmp_path}/x.db")
    store.study("x")
    (tmp_path / "x.db").unlink()
    with pytest.raises(StorageLost, match=r"lost in mid-run: .*x\.db was removed"):
        store.study("y")


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, impatient):
    storage = open_storage(f"sqlite:///{tmp_path}/x.db")
    event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count=1"))
    storage.engine.dispose()
    store = Store(storage, "sqlite:///x.db")
    study = store.study("x")
    with pytest.raises(StorageLost, match="full"):
        store.call(study.set_user_attr, "a lot", "x" * 100_000)


def test_a_short_absence_is_waited_for(tmp_path, impatient):
    store, calls = Store(open_storage(f"sqlite:///{tmp_path}/x.db")), []

    def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise OSError("away")
        return "back"

    assert store.call(flaky) == "back"


def test_a_server_that_is_gone_ends_the_run_in_one_line_without_the_password(postgres_url, impatient):
    psycopg = pytest.importorskip("psycopg")
    store = Store(open_storage(postgres_url), postgres_url)
    store.study("x")
    name = postgres_url.rsplit("/", 1)[1]
    with psycopg.connect("postgresql://root@127.0.0.1:5432/test", autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        with pytest.raises(StorageLost, match="does not exist") as e:
            store.study("y")
        assert "s3cr3t" not in str(e.value)


def test_a_lost_connection_is_made_again(postgres_url, impatient):
    psycopg = pytest.importorskip("psycopg")
    store = Store(open_storage(postgres_url), postgres_url)
    store.study("x")
    with psycopg.connect("postgresql://root@127.0.0.1:5432/test", autocommit=True) as admin:
        name = postgres_url.rsplit("/", 1)[1]
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
    store.study("y")
    store.close()


def test_heartbeats_keep_a_trial_and_silence_ends_it(storage_url, monkeypatch):
    monkeypatch.setattr(identity, "_machine", lambda: None)
    mine, yours = (Store(open_storage(storage_url, heartbeat_s=1, grace_s=2), storage_url) for _ in range(2))
    study = mine.study("x")
    held, silent = (mine.create(study._study_id, create_trial(state=TrialState.RUNNING)) for _ in range(2))
    mine.release(silent)
    deadline = time.monotonic() + 20
    while yours.storage.get_trial(silent).state == TrialState.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        yours.reap(yours.study("x"), study._study_id)
    assert yours.storage.get_trial(silent).state == TrialState.FAIL
    assert yours.storage.get_trial(held).state == TrialState.RUNNING
    assert mine.finish(held, TrialState.PRUNED, result="r")
    assert not mine.finish(silent, TrialState.COMPLETE, [1.0]), "too late"
    assert yours.storage.get_trial(silent).state == TrialState.FAIL
    mine.close()
    yours.close()


def test_a_process_of_this_machine_is_known_to_be_dead_once_it_is():
    me = this_process()
    assert not is_dead(me)
    code = "import json; from tuner.identity import this_process; print(json.dumps(this_process()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gone = json.loads(done.stdout)
    assert is_dead(gone)
    assert is_dead({**gone, "pid": os.getpid()}), "a process id that is used again"
    assert not is_dead({**gone, "machine": "another"})
    assert not is_dead({**gone, "machine": None})
    assert not is_dead("of an older tuner")


def test_a_worker_stopped_in_a_transaction_does_not_hold_up_the_others(postgres_url):
    asleep, awake = (Store(open_storage(postgres_url, heartbeat_s=1, grace_s=1), postgres_url) for _ in range(2))
    study = asleep.study("x")
    with asleep._backend.engine.connect() as connection:
        connection.execute(text("SELECT * FROM studies FOR UPDATE"))
        start = time.monotonic()
        awake.create(study._study_id, create_trial(state=TrialState.RUNNING))
        assert 0.3 < time.monotonic() - start < 20
        connection.invalidate()
    awake.close()
    asleep.close()
