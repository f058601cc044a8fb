"""A search and where it stands: what is compiling, what waits for the device, what was confirmed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

from tuner.search import Search
from tuner.task import INFEASIBLE, Order, Result, Task, config_key
from tuner.workers import WorkerCrash, WorkerError, WorkerTimeout

Config = dict[str, Any]


class Study:
    """``state``: searching -> confirming -> confirmation under way -> done; or failed, and then ``why``."""

    def __init__(self, order: Order, search: Search, position: int) -> None:
        self.order, self.search, self.position = order, search, position
        self.ready: deque[Config] = deque()
        self.compiling: dict[Future[Any], Config] = {}
        self.closed = False
        self.state = "searching"
        self.why = ""
        self._compiled: dict[str, dict[str, Any]] = {}

    @property
    def task(self) -> Task:
        return self.search.task

    @property
    def open(self) -> bool:
        return self.state in ("searching", "confirming", "confirmation under way")

    @property
    def idle(self) -> bool:
        """Nothing of it is under way in this process."""
        return not self.compiling and not self.ready and not self.search.inflight

    def is_default(self, cfg: Config) -> bool:
        return config_key(cfg) == config_key(self.search.default)

    def compiled(self, cfg: Config, future: Future[Any]) -> None:
        """Queue a compiled configuration for the device, or store why it will not get there."""
        try:
            info = future.result()
        except WorkerError as e:
            self.search.tell(cfg, Result(failure(e, "compile_error"), reason=str(e), stage="compile"))
            return
        if info["infeasible"]:
            self.search.tell(cfg, Result(INFEASIBLE, reason=info["infeasible"], stage="compile", **_about(info)))
            return
        self._compiled[config_key(cfg)] = info
        self.ready.appendleft(cfg) if self.is_default(cfg) else self.ready.append(cfg)

    def refuse(self, cfg: Config, why: str) -> None:
        """Store that a configuration cannot beat the best, whatever the device does."""
        self.search.tell(cfg, Result(INFEASIBLE, reason=why, rung="roofline"))

    def measured(self, cfg: Config, future: Future[Any]) -> Result:
        """Store what the device said of it."""
        about = _about(self._compiled.pop(config_key(cfg), {}))
        about.pop("rung", None)
        try:
            # clock_mhz and what else comes along has its field
            result = Result(**{**about, **future.result()})
        except WorkerError as e:
            result = Result(failure(e, "run_error"), reason=str(e), stage="run", **about)
        self.search.tell(cfg, result)
        return result

    def finalists(self) -> list[Config]:
        """The default, where it works, and the best others."""
        correct = {config_key(cfg): cfg for cfg, _ in self.search.ranking}
        default = correct.pop(config_key(self.search.default), None)
        return ([default] if default is not None else []) + list(correct.values())[: self.order.effort.finalists]

    def give_up(self, time_up: bool) -> None:
        """It ends without an entry."""
        self.state = "failed"
        reasons = [r.reason for _, r in self.search.results.values() if r.reason]
        if self.search.ranking:
            self.why = "the default was not measured" + ("; time was up" if time_up else "")
        elif reasons:
            self.why = f"no configuration worked; {reasons[0]}"
        else:
            self.why = "time was up before its turn" if time_up else "nothing to try"


def failure(error: WorkerError, otherwise: str) -> str:
    """The outcome for what became of a job."""
    return "timeout" if isinstance(error, WorkerTimeout) else "crash" if isinstance(error, WorkerCrash) else otherwise


def _about(info: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Result that a compile job answers."""
    names = {"seconds": "compile_s", "shared_bytes": "shared_bytes", "registers": "registers", "stack": "stack", "rung": "rung"}
    return {field: info[name] for name, field in names.items() if info.get(name) is not None}
