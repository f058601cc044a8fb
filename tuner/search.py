"""One study: what to try next for one kernel at one shape, and what was learned, kept in the storage trial by trial.

The storage holds measured trials only. The sampler works on a copy in memory, which also learns from infeasible suggestions without
a database write for each; a killed run therefore leaves no half-finished trial behind.
"""

from __future__ import annotations

import itertools
import json
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tl_kernels import KERNELS
from tl_kernels.spec import Config, Kernel, Problem

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

#: Suggestions in a row that may be infeasible or known before a random unseen configuration is taken instead.
MAX_MISSES = 20
#: Spaces up to this size are listed in full, so that a small one can be tried exhaustively.
MAX_LISTED = 50_000

#: Outcomes that give a time, those that count as a trial without one, and the one that does not count.
TIMED = ("ok", "slow")
FAILED = ("wrong", "compile_error", "crash", "timeout", "run_error")
INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Task:
    """One shape of one kernel to tune. ``covers``: the C of every workload it stands for (several where the program has no C in it)."""

    kernel: str
    p: Problem
    T: int
    arch: str
    profile: str
    covers: tuple[int, ...]

    @property
    def spec(self) -> Kernel:
        return KERNELS[self.kernel]

    @property
    def key(self) -> str:
        """Stable name of the study; a changed kernel source starts a new one."""
        p = self.p
        C = p.C if self.spec.has_channels else "any"
        return "|".join(map(str, (self.kernel, p.n, C, p.dtype, self.T, self.profile, self.spec.source_hash)))

    @property
    def label(self) -> str:
        C = self.p.C if self.spec.has_channels else "any"
        return f"{self.kernel} n={self.p.n} C={C} {self.p.dtype} T={self.T}"


@dataclass(frozen=True)
class Result:
    """What became of one configuration. Times in microseconds; ``error`` per output against float64."""

    outcome: str
    time_us: float | None = None
    time_ci_us: tuple[float, float] | None = None
    error: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    samples: int = 0
    compile_s: float | None = None
    shared_bytes: int | None = None

    @property
    def counts(self) -> bool:
        return self.outcome != INFEASIBLE


def config_key(cfg: Config) -> str:
    """Equal for equal configurations, whatever their order."""
    return json.dumps(dict(sorted(cfg.items())))


class Search:
    """Suggestions and results of one task. ``trials`` is what the study should have in the end, stored ones included."""

    def __init__(
        self,
        task: Task,
        storage: optuna.storages.BaseStorage,
        trials: int,
        seed: int,
        hints: Callable[[], Iterable[dict[str, Any]]] = lambda: (),
    ) -> None:
        kernel, p = task.spec, task.p
        self.task, self.trials = task, trials
        self.default: dict[str, Any] = kernel.default(p)
        held = set(kernel.gpu_only) if task.arch == "cpu" else set()
        self.space = {name: tuple(values) for name, values in kernel.space(p).items() if name not in held}
        self.held = {name: value for name, value in self.default.items() if name not in self.space}
        self.results: dict[str, tuple[dict[str, Any], Result]] = {}
        self.inflight: dict[str, dict[str, Any]] = {}
        self.measured_now = 0
        self.exhausted = False
        self._hints = hints
        self._distributions = {name: CategoricalDistribution(values) for name, values in self.space.items()}
        self._random = random.Random(f"{seed}|{task.key}")
        self._study = optuna.create_study(study_name=task.key, storage=storage, load_if_exists=True)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=max(4, min(10, trials // 3)))
        self._brain = optuna.create_study(sampler=sampler)
        self._asked: dict[str, optuna.Trial] = {}
        self._first: deque[dict[str, Any]] = deque([self.default, *(dict(seed) for seed in kernel.seeds if not held)])
        self._hinted = False
        for trial in self._study.get_trials(deepcopy=False):
            self._restore(trial)

    def _restore(self, trial: FrozenTrial) -> None:
        if "config" not in trial.user_attrs:
            return
        cfg, stored = json.loads(trial.user_attrs["config"]), json.loads(trial.user_attrs["result"])
        if stored["time_ci_us"] is not None:
            stored["time_ci_us"] = tuple(stored["time_ci_us"])
        self.results[config_key(cfg)] = (cfg, Result(**stored))
        self._brain.add_trial(self._frozen(cfg, self.results[config_key(cfg)][1]))

    def _in_space(self, cfg: Config) -> bool:
        return set(cfg) == set(self.space) | set(self.held) and all(cfg[k] in values for k, values in self.space.items())

    def _frozen(self, cfg: Config, result: Result) -> FrozenTrial:
        inside = self._in_space(cfg)
        timed = result.outcome in TIMED
        return create_trial(
            state=TrialState.COMPLETE if timed else TrialState.PRUNED,
            value=result.time_us if timed else None,
            params={name: cfg[name] for name in self.space} if inside else {},
            distributions=self._distributions if inside else {},
            user_attrs={"config": json.dumps(dict(cfg)), "outcome": result.outcome, "result": json.dumps(vars(result))},
        )

    @property
    def count(self) -> int:
        """Trials that count, finished ones only."""
        return sum(result.counts for _, result in self.results.values())

    @property
    def left(self) -> int:
        """Trials still to be proposed."""
        return 0 if self.exhausted else max(0, self.trials - self.count - len(self.inflight))

    @property
    def ranking(self) -> list[tuple[dict[str, Any], Result]]:
        """Correct configurations, fastest first."""
        timed = [(cfg, r) for cfg, r in self.results.values() if r.outcome == "ok" and r.time_us is not None]
        return sorted(timed, key=lambda item: item[1].time_us or 0.0)

    @property
    def best_us(self) -> float | None:
        return self.ranking[0][1].time_us if self.ranking else None

    @property
    def proposed(self) -> list[dict[str, Any]]:
        """What a study of the same program at another T should try early: best first, then what is under way."""
        return [cfg for cfg, _ in self.ranking] + list(self.inflight.values())

    def _new(self, cfg: Config) -> bool:
        key = config_key(cfg)
        return key not in self.results and key not in self.inflight

    def _listed(self) -> list[dict[str, Any]] | None:
        """Every feasible configuration, or None where the space is too large to list."""
        size = 1
        for values in self.space.values():
            size *= len(values)
        if size > MAX_LISTED:
            return None
        kernel, p = self.task.spec, self.task.p
        whole = ({**self.held, **dict(zip(self.space, values, strict=True))} for values in itertools.product(*self.space.values()))
        return [cfg for cfg in whole if kernel.invalid(p, cfg) is None]

    def propose(self) -> dict[str, Any] | None:
        """The next configuration to try, feasible and not seen before; None where the budget or the space is used up."""
        if self.left == 0:
            return None
        cfg = self._next_listed()
        if cfg is None:
            if not self._hinted:
                self._hinted = True
                self._first.extend(list(self._hints())[: self.trials // 2])
                listed = self._listed()
                if listed is not None:
                    unseen = [c for c in listed if self._new(c)]
                    if len(unseen) <= self.left:
                        self._first.extend(unseen)
                cfg = self._next_listed()
            cfg = cfg or self._suggest() or self._unseen()
        if cfg is None:
            self.exhausted = True
            return None
        self.inflight[config_key(cfg)] = cfg
        return cfg

    def _next_listed(self) -> dict[str, Any] | None:
        while self._first:
            cfg = self._first.popleft()
            feasible = cfg == self.default or (self._in_space(cfg) and self.task.spec.invalid(self.task.p, cfg) is None)
            if feasible and self._new(cfg):
                if self._in_space(cfg):
                    self._brain.enqueue_trial({name: cfg[name] for name in self.space})
                    self._asked[config_key(cfg)] = self._brain.ask(self._distributions)
                return cfg
        return None

    def _suggest(self) -> dict[str, Any] | None:
        if not self.space:
            return None
        for _ in range(MAX_MISSES):
            trial = self._brain.ask(self._distributions)
            cfg = {**self.held, **trial.params}
            if self.task.spec.invalid(self.task.p, cfg) is not None:
                self._brain.tell(trial, state=TrialState.PRUNED)
            elif self._new(cfg):
                self._asked[config_key(cfg)] = trial
                return cfg
            else:
                known = self.results.get(config_key(cfg))
                if known is not None and known[1].time_us is not None:
                    self._brain.tell(trial, known[1].time_us)
                else:
                    self._brain.tell(trial, state=TrialState.PRUNED)
        return None

    def _unseen(self) -> dict[str, Any] | None:
        listed = self._listed()
        if listed is None:
            return None
        unseen = [cfg for cfg in listed if self._new(cfg)]
        return self._random.choice(unseen) if unseen else None

    def tell(self, cfg: Config, result: Result) -> None:
        """Store what became of a proposed configuration."""
        key = config_key(cfg)
        self.inflight.pop(key, None)
        self.results[key] = (dict(cfg), result)
        self.measured_now += result.counts
        self._study.add_trial(self._frozen(cfg, result))
        trial = self._asked.pop(key, None)
        if trial is None:
            self._brain.add_trial(self._frozen(cfg, result))
        elif result.outcome in TIMED:
            self._brain.tell(trial, result.time_us)
        else:
            self._brain.tell(trial, state=TrialState.PRUNED)

    def withdraw(self, cfg: Config) -> None:
        """Forget a proposed configuration that will not be tried (out of time)."""
        self.inflight.pop(config_key(cfg), None)
        trial = self._asked.pop(config_key(cfg), None)
        if trial is not None:
            self._brain.tell(trial, state=TrialState.FAIL)

    @property
    def confirmation(self) -> dict[str, Any] | None:
        """The stored confirmation, where no trial was added after it."""
        stored = self._study.user_attrs.get("confirmation")
        return stored if stored is not None and stored["count"] == self.count else None

    def confirm(self, verdict: dict[str, Any]) -> None:
        """Store the outcome of the confirmation."""
        self._study.set_user_attr("confirmation", {**verdict, "count": self.count})


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage behind a URL; SQLite waits for another process's writes instead of failing."""
    kwargs = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=kwargs)
