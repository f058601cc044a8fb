"""What is tuned and what comes of it, as plain data: the vocabulary of the search, the storage and the pipeline."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from tl_kernels import KERNELS
from tl_kernels.spec import Config, Kernel, Problem
from tuner.effort import Effort

#: Outcomes that give a time, those that count as a trial without one, and the one that does not count.
TIMED = ("ok", "slow")
FAILED = ("wrong", "compile_error", "crash", "timeout", "run_error")
INFEASIBLE = "infeasible"

#: Rungs of the ladder that refuse a program whatever T is.
STATIC_RUNGS = ("shared", "launch", "spills")


@dataclass(frozen=True)
class Task:
    """One shape of one kernel to tune. ``covers``: the C of every workload it stands for (several where the program has no C in it).

    ``device``: the device's full name; two devices that share a profile's name do not share a ranking.
    """

    kernel: str
    p: Problem
    T: int
    arch: str
    profile: str
    covers: tuple[int, ...]
    device: str = ""

    @property
    def spec(self) -> Kernel:
        return KERNELS[self.kernel]

    @property
    def program(self) -> str:
        """Equal for tasks that compile the same programs, for any T."""
        p = self.p
        C = p.C if self.spec.has_channels else "any"
        return "|".join(map(str, (self.kernel, p.n, C, p.dtype, *self._unusual, self.profile, self._device, self.spec.source_hash)))

    @property
    def _unusual(self) -> list[str]:
        """Options are part of the program, but only unusual ones need saying."""
        return [f"{name}={value}" for name, value in self.p.options if self.spec.options.get(name) != value]

    @property
    def _device(self) -> str:
        return (self.device or self.profile).replace("|", "/")

    @property
    def key(self) -> str:
        """Stable name of the study, for readers too (the dashboard lists it); a changed kernel source starts a new one."""
        return "|".join((" ".join((self.label, *self._unusual)), self.profile, self._device, self.spec.source_hash))

    @property
    def label(self) -> str:
        C = self.p.C if self.spec.has_channels else "any"
        return f"{self.kernel} n={self.p.n} C={C} {self.p.dtype} T={self.T}"


@dataclass(frozen=True)
class Order:
    """All that a worker elsewhere needs to work on a study: the task, how many trials, found by which sampler, measured how hard."""

    task: Task
    trials: int
    effort: Effort
    seed: int = 0
    sampler: str = "tpe"

    def as_attr(self) -> dict[str, Any]:
        """For the study's user attributes."""
        return {**asdict(self), "source_hash": self.task.spec.source_hash}

    @staticmethod
    def from_attr(stored: dict[str, Any]) -> Order:
        """Raises KeyError or TypeError for what another version of the tuner wrote."""
        task = dict(stored["task"])
        p = dict(task["p"])
        p["options"] = tuple((name, value) for name, value in p["options"])
        task["p"], task["covers"] = Problem(**p), tuple(task["covers"])
        return Order(Task(**task), stored["trials"], Effort(**stored["effort"]), stored["seed"], stored["sampler"])


@dataclass(frozen=True)
class Result:
    """What became of one configuration. Times in microseconds; ``error`` per output against float64.

    ``stage``: "compile" or "run", where it failed. ``rung``: what refused an infeasible one. ``stack``: bytes a thread. ``dropped``:
    samples thrown away because the device was not at rest, and ``dirty`` says what was still wrong with those kept. ``gate_s`` and
    ``timing_s``: seconds spent on checking and on timing it.
    """

    outcome: str
    time_us: float | None = None
    time_ci_us: tuple[float, float] | None = None
    error: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    samples: int = 0
    compile_s: float | None = None
    shared_bytes: int | None = None
    stage: str | None = None
    rung: str | None = None
    registers: int | None = None
    stack: int | None = None
    clock_mhz: float | None = None
    dropped: int = 0
    dirty: str | None = None
    gate_s: float | None = None
    timing_s: float | None = None

    @property
    def counts(self) -> bool:
        return self.outcome != INFEASIBLE

    @property
    def never_compiles(self) -> bool:
        """Whether the same program need not be compiled again for another T."""
        if self.outcome == INFEASIBLE:
            return self.rung in STATIC_RUNGS
        return self.outcome in FAILED and self.stage == "compile"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Result:
        """Fields that this version does not know are left out."""
        stored = {k: v for k, v in json.loads(text).items() if k in Result.__dataclass_fields__}
        if stored.get("time_ci_us") is not None:
            stored["time_ci_us"] = tuple(stored["time_ci_us"])
        return Result(**stored)


def config_key(cfg: Config) -> str:
    """Equal for equal configurations, whatever their order."""
    return json.dumps(dict(sorted(cfg.items())))
