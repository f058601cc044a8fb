"""One process's hands on the shared storage: retries, heartbeats of what it holds, and taking back what dead workers held."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import LOST, TuneError
from tuner.identity import is_dead, this_process
from tuner.storage import redact_error, redacted

optuna.logging.set_verbosity(optuna.logging.ERROR)

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds to wait after each failure in a row before the storage is given up: a server that restarts is back by then.
PATIENCE_S = (0.2, 1.0, 3.0, 8.0)
_TROUBLE = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError, KeyError)


class StorageLost(TuneError):
    """The storage stopped answering in the middle of a run."""

    code = LOST


class Store:
    """The storage behind ``url`` (for messages only). Every access goes through :meth:`call`; ``seconds`` is what they took together."""

    def __init__(self, storage: optuna.storages.BaseStorage, url: str = "") -> None:
        self.storage = optuna.storages.get_storage(storage)  # with a cache of finished trials
        self.seconds = 0.0
        self.me = this_process()
        self._url = url
        self._backend = storage
        self._file = _database_file(storage)
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_beat = time.monotonic()
        self._gone = False
        self._beats = isinstance(storage, optuna.storages.RDBStorage) and storage.get_heartbeat_interval() is not None

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``function(...)``, again after a pause where the storage fails; raises :class:`StorageLost` when it stays away.

        UpdateFinishedTrialError comes through: somebody else ended that trial.
        """
        start = time.monotonic()
        try:
            # once it is gone, the last writes of an ending run do not wait for it again
            for pause in (None,) if self._gone else (*PATIENCE_S, None):
                self._check_file()
                try:
                    return function(*args, **kwargs)
                except UpdateFinishedTrialError:
                    raise
                except _TROUBLE as e:
                    if pause is None:
                        raise self._lost(redact_error(e, self._url)) from None
                    time.sleep(pause)
            raise AssertionError("unreachable")
        finally:
            self.seconds += time.monotonic() - start

    def _lost(self, why: str) -> StorageLost:
        self._gone = True
        return StorageLost(f"--storage {redacted(self._url)}: lost in mid-run: {why}")

    def _check_file(self) -> None:
        """SQLite goes on writing to a file that was removed, and nobody would ever see it."""
        if self._file is not None and _inode(self._file[0]) != self._file[1]:
            raise self._lost(f"{self._file[0]} was removed or replaced")

    def study(self, name: str) -> optuna.Study:
        """The study of that name, made where there is none."""
        study = self.call(optuna.create_study, study_name=name, storage=self.storage, load_if_exists=True)
        if self.call(lambda: study.metric_names) is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.call(study.set_metric_names, ["time_us"])  # what the dashboard calls its axis
        return study

    def create(self, study_id: int, template: FrozenTrial) -> int:
        """A new trial, as one transaction; its id. A RUNNING one is held, and lives, until :meth:`release`."""
        trial_id = self.call(self.storage.create_new_trial, study_id, template)
        if self._beats and not template.state.is_finished():
            with self._lock:
                self._held.add(trial_id)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
                    self._thread.start()
        return trial_id

    def release(self, trial_id: int) -> None:
        """It is ours no longer: no more heartbeats."""
        with self._lock:
            self._held.discard(trial_id)

    def finish(self, trial_id: int, state: TrialState, values: list[float] | None = None, **attrs: Any) -> bool:
        """Set a held trial's attributes, then its final state. False where it had been taken from us: nothing of it is kept then."""
        try:
            for name, value in attrs.items():
                self.call(self.storage.set_trial_user_attr, trial_id, name, value)
            self.call(self.storage.set_trial_state_values, trial_id, state, values)
        except UpdateFinishedTrialError:
            # a write that was sent twice because its first answer got lost has nevertheless been written
            return self.call(self.storage.get_trial, trial_id).state == state != TrialState.FAIL
        finally:
            self.release(trial_id)
        return True

    # -- signs of life ------------------------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        assert isinstance(self._backend, optuna.storages.RDBStorage)
        interval = self._backend.get_heartbeat_interval()
        while not self._stop.wait(interval):
            self._beat()
        self._backend.remove_session()  # of this thread

    def _beat(self) -> None:
        assert isinstance(self._backend, optuna.storages.RDBStorage)
        with self._lock:
            held = sorted(self._held)
        for trial_id in held:
            try:
                self._backend.record_heartbeat(trial_id)
            except Exception:  # the main thread meets the same trouble, and says so
                return
        self._last_beat = time.monotonic()

    def reap(self, study: optuna.Study, study_id: int) -> None:
        """End the trials of ``study`` whose workers died; they count as FAIL, and their configurations may be tried again."""
        if not self._beats:
            return
        assert isinstance(self._backend, optuna.storages.RDBStorage)
        if time.monotonic() - self._last_beat > self.grace_s / 2:
            self._beat()  # this process slept: it is not dead
        self.call(self._start_clocks, study_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # what Optuna calls its heartbeats
            self.call(optuna.storages.fail_stale_trials, study)

    def _start_clocks(self, study_id: int) -> None:
        """Optuna never ends a trial without any heartbeat, such as that of a worker killed right after it made one."""
        assert isinstance(self._backend, optuna.storages.RDBStorage)
        query = sqlalchemy.text(
            "SELECT t.trial_id FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
            "WHERE t.study_id = :study AND t.state = 'RUNNING' AND h.trial_id IS NULL"
        )
        with self._backend.engine.connect() as connection:
            silent = [row[0] for row in connection.execute(query, {"study": study_id})]
        for trial_id in silent:
            self._backend.record_heartbeat(trial_id)

    def bury(self, trial: FrozenTrial) -> bool:
        """End a RUNNING trial at once where its worker was a process of this machine that is gone."""
        if not is_dead(trial.user_attrs.get("worker")):
            return False
        with contextlib.suppress(UpdateFinishedTrialError):
            self.call(self.storage.set_trial_state_values, trial._trial_id, TrialState.FAIL)
        return True

    @property
    def grace_s(self) -> float:
        """Silence after which a worker counts as dead."""
        return float(getattr(self._backend, "grace_period", None) or 1.0)

    def close(self) -> None:
        """Stop the heartbeats and close the connections."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        if isinstance(self._backend, optuna.storages.RDBStorage):
            self._backend.remove_session()
            self._backend.engine.dispose()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _database_file(storage: optuna.storages.BaseStorage) -> tuple[str, tuple[int, int] | None] | None:
    if not isinstance(storage, optuna.storages.RDBStorage) or storage.engine.name != "sqlite":
        return None
    name = storage.engine.url.database
    return None if name in (None, "", ":memory:") else (os.path.abspath(name), _inode(name))
