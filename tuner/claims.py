"""The trials of one stored study as every worker reads them, and the rule that decides between two of them.

A trial's number is given out in one transaction under a lock on its study, and whoever has a number sees every lower one. So each worker
makes its trial first and looks afterwards: where an earlier trial stands against it, it withdraws its own. No two workers can both stay.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tuner.store import Store
from tuner.task import Result, config_key

#: User attribute ``kind`` of a trial: a configuration, or somebody's work on the confirmation (which counts as no trial).
CONFIG, CONFIRM = "config", "confirm"


@dataclass(frozen=True)
class Row:
    """One stored trial."""

    number: int
    trial_id: int
    kind: str
    state: TrialState
    cfg: dict[str, Any]
    key: str
    result: Result | None

    @property
    def running(self) -> bool:
        return self.state in (TrialState.RUNNING, TrialState.WAITING)

    @property
    def counts(self) -> bool:
        """Whether it uses the budget: finished and not infeasible, or not finished yet."""
        return self.running or (self.result is not None and self.result.counts)


def _row(trial: FrozenTrial) -> Row | None:
    attrs = trial.user_attrs
    kind = attrs.get("kind", CONFIG)
    if kind != CONFIRM and "config" not in attrs:
        return None  # not of this tuner
    cfg = json.loads(attrs["config"]) if "config" in attrs else {}
    finished = trial.state.is_finished() and trial.state != TrialState.FAIL and "result" in attrs
    return Row(
        number=trial.number,
        trial_id=trial._trial_id,
        kind=kind,
        state=trial.state,
        cfg=cfg,
        key=config_key(cfg),
        result=Result.from_json(attrs["result"]) if finished else None,
    )


class Claims:
    """The trials of the study called ``name``."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self._study = store.study(name)
        self._id: int = store.call(store.storage.get_study_id_from_name, name)
        self._rows: dict[int, Row | None] = {}

    def read(self) -> list[Row]:
        """Every trial, by number; those of dead processes of this machine are ended on the way."""
        trials = self.store.call(self.store.storage.get_all_trials, self._id, deepcopy=False)
        rows = []
        for trial in trials:
            row = self._rows.get(trial.number)
            if row is None or row.state != trial.state:
                row = self._rows[trial.number] = _row(trial)
            if row is not None and row.running and self.store.bury(trial):
                return self.read()
            if row is not None:
                rows.append(row)
        return rows

    def before(self, trial_id: int, rows: Sequence[Row], kind: str = CONFIG) -> list[Row]:
        """The trials of this kind that stand and came before ``trial_id``."""
        number = next(row.number for row in rows if row.trial_id == trial_id)
        return [row for row in rows if row.number < number and row.kind == kind and row.state != TrialState.FAIL]

    def create(self, template: FrozenTrial) -> int:
        return self.store.create(self._id, template)

    def withdraw(self, trial_id: int, why: str) -> None:
        """End a trial of ours without a result; ``why`` is for people who look at the study."""
        self.store.finish(trial_id, TrialState.FAIL, withdrawn=why)

    def taken(self, trial_id: int) -> bool:
        """Whether a trial that we hold was ended by another worker."""
        return self.store.call(self.store.storage.get_trial, trial_id).state.is_finished()

    def reap(self) -> None:
        self.store.reap(self._study, self._id)

    def attr(self, name: str) -> Any:
        return self.store.call(self.store.storage.get_study_user_attrs, self._id).get(name)

    def confirmation(self, count: int, rounds: int) -> dict[str, Any] | None:
        """The stored confirmation, where no trial was added after it and it was to have at least so many rounds."""
        stored = self.attr("confirmation")
        good = stored is not None and stored["count"] == count and stored.get("rounds", 0) >= rounds
        return stored if good else None

    def set_attr(self, name: str, value: Any) -> None:
        self.store.call(self.store.storage.set_study_user_attr, self._id, name, value)
