"""One study: what to try next for one kernel at one shape, and what was learned.

The stored study is the truth, shared with every other worker: a configuration that is being tried is a RUNNING trial there, a finished one
holds its result. The sampler works on a copy in memory, which also learns from infeasible suggestions without a database write for each.
"""

from __future__ import annotations

import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tl_kernels.spec import Config
from tuner.claims import CONFIG, CONFIRM, Claims, Row
from tuner.errors import TuneError
from tuner.samplers import DEFAULT_SAMPLER, make_sampler
from tuner.space import MAX_LISTED, Space
from tuner.store import Store
from tuner.task import INFEASIBLE, STATIC_RUNGS, TIMED, Result, Task, config_key

#: What can become of a configuration, in the order of the ladder.
FUNNEL = ("space", "constraint", *STATIC_RUNGS, "roofline", "compile_error", "timeout", "crash", "wrong", "run_error", "slow", "ok")

#: Suggestions in a row that may be infeasible or known before a random unseen configuration is taken instead.
MAX_MISSES = 20
#: Seconds after which what other workers stored is read again: before a suggestion, and while waiting for them.
FRESH_S, SYNC_S = 0.2, 1.0
#: Seconds between two looks for dead workers, at most.
REAP_S = 5.0


class Search:
    """Suggestions and results of one task. ``trials`` is what the study should have in the end, stored ones included; with the sampler
    ``brute-force`` it is the whole space. ``priors``: what to try after the default, before the kernel's seeds; ``hints``: after those.
    ``known``: a result that is known from elsewhere. ``rounds``: those that its confirmation should have.
    """

    def __init__(
        self,
        task: Task,
        storage: optuna.storages.BaseStorage | Store,
        trials: int,
        seed: int,
        hints: Callable[[], Iterable[dict[str, Any]]] = lambda: (),
        sampler: str = DEFAULT_SAMPLER,
        known: Callable[[str], Result | None] = lambda key: None,
        priors: Iterable[dict[str, Any]] = (),
        rounds: int = 0,
    ) -> None:
        self.task = task
        self.space = Space(task.spec, task.p, task.arch)
        self.trials = self._everything() if sampler == "brute-force" else trials
        self.sampler = sampler
        self._rounds = rounds
        self.results: dict[str, tuple[dict[str, Any], Result]] = {}
        self.inflight: dict[str, dict[str, Any]] = {}
        #: What other workers are trying, and whether one of them confirms.
        self.elsewhere: dict[str, dict[str, Any]] = {}
        self.confirmed_elsewhere = False
        self.measured_now = 0
        self.exhausted = False
        self._hints, self._known = hints, known
        self._distributions = {name: CategoricalDistribution(values) for name, values in self.space.knobs.items()}
        self._random = random.Random(f"{seed}|{task.key}")
        self._brain = optuna.create_study(sampler=make_sampler(sampler, seed, self.trials, self.space.listed))
        self._asked: dict[str, optuna.Trial] = {}
        self._first: deque[dict[str, Any]] = deque([*({**cfg, **self.space.held} for cfg in priors), *self.space.seeds])
        self._again: deque[dict[str, Any]] = deque()
        self._aside: set[str] = set()
        self._hinted = False
        self._seen: set[int] = set()
        self._claims = Claims(storage if isinstance(storage, Store) else Store(storage), task.key)
        self._held_trials: dict[str, int] = {}
        self._confirming: tuple[int, int] | None = None
        #: As last read or stored; there also when the storage is gone.
        self.last_confirmation: dict[str, Any] | None = None
        self._synced = self._reaped = time.monotonic()
        self.sync()

    @property
    def default(self) -> dict[str, Any]:
        return self.space.default

    def _everything(self) -> int:
        listed = self.space.listed
        if listed is None:
            raise TuneError(f"--sampler brute-force: {self.task.label} has {self.space.size} configurations, wanted at most {MAX_LISTED}")
        return len(listed) + (self.default not in listed)

    # -- what is known ------------------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Trials that count, finished ones only."""
        return sum(result.counts for _, result in self.results.values())

    @property
    def left(self) -> int:
        """Trials still to be proposed."""
        if self.exhausted:
            return 0
        # one of ours stands in elsewhere too while another worker, who came second, has not withdrawn it yet
        room = self.trials - self.count - len(self.inflight.keys() | self.elsewhere.keys())
        # everything is compared with the default: where it was given up and others took its place, it is tried all the same
        return max(room, int(self._new(self.default)), 0)

    @property
    def ranking(self) -> list[tuple[dict[str, Any], Result]]:
        """Correct configurations, fastest first."""
        timed = [(cfg, r) for cfg, r in self.results.values() if r.outcome == "ok" and r.time_us is not None]
        return sorted(timed, key=lambda item: item[1].time_us or 0.0)

    @property
    def default_result(self) -> Result | None:
        """What became of the default, with which everything is compared; None as long as nobody knows."""
        return self.results.get(config_key(self.default), (None, None))[1]

    @property
    def best_us(self) -> float | None:
        return self.ranking[0][1].time_us if self.ranking else None

    @property
    def proposed(self) -> list[dict[str, Any]]:
        """What a study of the same program at another T should try early: best first, then what is under way."""
        return [cfg for cfg, _ in self.ranking] + list(self.inflight.values())

    def funnel(self) -> dict[str, int]:
        """How many configurations each rung of the ladder ended, from all combinations down to those that were timed."""
        listed = self.space.listed
        counts = dict.fromkeys(FUNNEL, 0)
        counts["space"] = self.space.size
        counts["constraint"] = 0 if listed is None else self.space.size - len(listed)
        for _, result in self.results.values():
            counts[(result.rung or "shared") if result.outcome == INFEASIBLE else result.outcome] += 1
        return counts

    # -- the storage --------------------------------------------------------------------------------------------------------------

    def sync(self) -> list[Row]:
        """Learn what other workers did since the last time."""
        rows = self._claims.read()
        self._synced = time.monotonic()
        running: dict[str, dict[str, Any]] = {}
        confirming = False
        ours = {*self._held_trials.values(), self._confirming[0] if self._confirming else None}
        for row in rows:
            if row.trial_id in ours:
                continue
            if row.kind == CONFIRM:
                confirming |= row.running
            elif row.running:
                running[row.key] = row.cfg
            elif row.number not in self._seen:
                self._seen.add(row.number)
                self._learn(row)
        self.confirmed_elsewhere = confirming
        for key in self.elsewhere.keys() - running.keys():
            # ended without a result, else _learn has told it
            self._tell_brain(key, None)
        for key, cfg in running.items():
            if key not in self.elsewhere and key not in self.results and cfg in self.space:
                # the sampler counts what is under way elsewhere as it does our own
                self._ask_brain(cfg)
        self.elsewhere = running
        return rows

    def _learn(self, row: Row) -> None:
        if row.result is None:
            # given up: its worker died, or withdrew it. Whoever comes first tries it again, however often: configurations run in
            # processes of their own, and what ends a worker (a preemption, a lack of memory) says nothing of what it held
            self._again.append(row.cfg)
            self.exhausted = False
        elif row.key not in self.results:
            self.results[row.key] = (row.cfg, row.result)
            if row.key in self._asked:
                self._tell_brain(row.key, row.result)
            else:
                self._teach_brain(row.cfg, row.result)

    def refresh(self) -> None:
        """While waiting for other workers: now and then read what they did, and take back what the dead among them held."""
        now = time.monotonic()
        # a clock of its own: a suggestion reads too, and must not put this off
        if (self.elsewhere or self.confirmed_elsewhere) and now - self._reaped > min(REAP_S, self._claims.store.grace_s / 3):
            self._reaped = now
            self._claims.reap()
            self.sync()
        elif now - self._synced > SYNC_S:
            self.sync()

    def _template(self, cfg: Config, state: TrialState, value: float | None = None) -> FrozenTrial:
        inside = cfg in self.space
        return create_trial(
            state=state,
            value=value,
            params=self.space.knobs_of(cfg) if inside else {},
            distributions=self._distributions if inside else {},
            user_attrs={"kind": CONFIG, "config": json.dumps(dict(cfg)), "worker": self._claims.store.me},
        )

    def _frozen(self, cfg: Config, result: Result) -> FrozenTrial:
        timed = result.outcome in TIMED
        return self._template(cfg, TrialState.COMPLETE if timed else TrialState.PRUNED, result.time_us if timed else None)

    def _claim(self, cfg: dict[str, Any]) -> bool:
        """Make it ours in the storage. False where another worker was first, or the others have filled the budget."""
        key = config_key(cfg)
        trial_id = self._claims.create(self._template(cfg, TrialState.RUNNING))
        self._held_trials[key] = trial_id
        earlier = self._claims.before(trial_id, self.sync())
        taken = any(row.key == key for row in earlier)
        # by configuration: of two trials of one the second will be withdrawn
        if not taken and (cfg == self.default or len({row.key for row in earlier if row.counts}) < self.trials):
            return True
        del self._held_trials[key]
        self._claims.withdraw(trial_id, "another worker has it" if taken else "the budget is used up")
        self._tell_brain(key, None)
        return False

    # -- what to try next ---------------------------------------------------------------------------------------------------------

    def _new(self, cfg: Config) -> bool:
        key = config_key(cfg)
        return not any(key in known for known in (self.results, self.inflight, self.elsewhere, self._aside))

    def propose(self) -> dict[str, Any] | None:
        """The next configuration to try, feasible, not seen before and now ours; None where there is none (for now, if other workers
        are trying some).
        """
        if time.monotonic() - self._synced > FRESH_S:
            self.sync()
        while self.left > 0:
            cfg = self._next()
            if cfg is None:
                self.exhausted = True
                return None
            if not self._claim(cfg):
                continue
            key = config_key(cfg)
            self.inflight[key] = cfg
            settled = self._known(key)
            if settled is None:
                return cfg
            self.tell(cfg, settled)
        return None

    def _next(self) -> dict[str, Any] | None:
        cfg = self._next_listed()
        if cfg is None:
            if not self._hinted:
                self._hinted = True
                # at another shape the knobs that are held here may be held elsewhere
                hints = [cfg for cfg in ({**cfg, **self.space.held} for cfg in self._hints()) if self.space.fits(cfg)]
                self._first.extend(hints[: self.trials // 2])
                listed = self.space.listed
                if listed is not None:
                    unseen = [c for c in listed if self._new(c)]
                    if len(unseen) <= self.left:
                        self._random.shuffle(unseen)  # workers with seeds of their own get less often in each other's way
                        self._first.extend(unseen)
                cfg = self._next_listed()
            cfg = cfg or self._suggest() or self._unseen()
        return cfg

    def _next_listed(self) -> dict[str, Any] | None:
        if self._new(self.default):
            self._again.appendleft(self.default)
        while self._again or self._first:
            cfg = (self._again or self._first).popleft()
            if self.space.fits(cfg) and self._new(cfg):
                if cfg in self.space:
                    self._ask_brain(cfg)
                return cfg
        return None

    def _suggest(self) -> dict[str, Any] | None:
        if not self.space.knobs:
            return None
        for _ in range(MAX_MISSES):
            trial = self._brain.ask(self._distributions)
            cfg = {**self.space.held, **trial.params}
            if self.space.invalid(cfg) is not None:
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
        listed = self.space.listed
        if listed is None:
            return None
        unseen = [cfg for cfg in listed if self._new(cfg)]
        return self._random.choice(unseen) if unseen else None

    def _ask_brain(self, cfg: Config) -> None:
        self._brain.enqueue_trial(self.space.knobs_of(cfg))
        self._asked[config_key(cfg)] = self._brain.ask(self._distributions)

    def _teach_brain(self, cfg: Config, result: Result) -> None:
        """A result that the sampler did not ask for. One without its knobs (a default outside the space) would leave it none in common."""
        if cfg in self.space:
            self._brain.add_trial(self._frozen(cfg, result))

    def _tell_brain(self, key: str, result: Result | None) -> None:
        """The end of a configuration that the sampler knows to be under way; None: it came to nothing."""
        trial = self._asked.pop(key, None)
        if trial is None:
            return
        if result is not None and result.outcome in TIMED:
            self._brain.tell(trial, result.time_us)
        else:
            self._brain.tell(trial, state=TrialState.FAIL if result is None else TrialState.PRUNED)

    # -- what came of it ----------------------------------------------------------------------------------------------------------

    def tell(self, cfg: Config, result: Result) -> None:
        """Store what became of a proposed configuration; nothing of it where it was taken from us meanwhile (this process slept)."""
        key = config_key(cfg)
        self.inflight.pop(key, None)
        trial_id = self._held_trials.pop(key)
        timed = result.outcome in TIMED and result.time_us is not None
        state = TrialState.COMPLETE if timed else TrialState.PRUNED
        kept = self._claims.store.finish(trial_id, state, [result.time_us or 0.0] if timed else None, result=result.to_json())
        if not kept:
            self._tell_brain(key, None)
            self.sync()
            return
        self.results[key] = (dict(cfg), result)
        self.measured_now += result.counts
        if key in self._asked:
            self._tell_brain(key, result)
        else:
            self._teach_brain(cfg, result)

    def withdraw(self, cfg: Config, why: str = "out of time") -> None:
        """Give back a proposed configuration that was not tried."""
        key = config_key(cfg)
        self.inflight.pop(key, None)
        self._tell_brain(key, None)
        trial_id = self._held_trials.pop(key, None)
        if trial_id is not None:
            self._claims.withdraw(trial_id, why)

    def give_back(self, cfg: Config, again: bool) -> None:
        """Withdraw a configuration of which the machine's trouble let nothing be learned; ``again``: this process may try it once more."""
        if not again:
            self._aside.add(config_key(cfg))
        self.withdraw(cfg, "trouble with the machine")
        self.sync()

    def release(self) -> None:
        """Give back everything: this process ends."""
        for cfg in list(self.inflight.values()):
            self.withdraw(cfg, "its run ended")
        self.give_up_confirmation()

    # -- the confirmation ---------------------------------------------------------------------------------------------------------

    @property
    def confirmation(self) -> dict[str, Any] | None:
        """The stored confirmation, where it is still good."""
        self.last_confirmation = self._claims.confirmation(self.count, self._rounds)
        return self.last_confirmation

    def claim_confirmation(self) -> bool:
        """Whether it is ours to confirm: nobody has, and nobody else is at it."""
        self.sync()
        if self.confirmed_elsewhere or self.confirmation is not None:
            return False
        attrs = {"kind": CONFIRM, "worker": self._claims.store.me}
        trial_id = self._claims.create(create_trial(state=TrialState.RUNNING, user_attrs=attrs))
        self._confirming = (trial_id, self.count)
        earlier = self._claims.before(trial_id, self.sync(), CONFIRM)
        if any(row.running for row in earlier) or self.confirmation is not None:
            self.give_up_confirmation()
            return False
        return True

    def confirm(self, verdict: dict[str, Any]) -> bool:
        """Store the outcome of the confirmation. False where it had been taken from us: another worker confirms it, or has."""
        trial_id, count = self._confirming or (None, self.count)
        self._confirming = None
        if trial_id is not None and self._claims.taken(trial_id):
            self._claims.store.release(trial_id)
            return False
        self.last_confirmation = {**verdict, "count": count, "rounds": self._rounds}
        self._claims.set_attr("confirmation", self.last_confirmation)
        if trial_id is not None:
            self._claims.store.finish(trial_id, TrialState.PRUNED)
        return True

    def give_up_confirmation(self) -> None:
        """Give back the confirmation, where we hold it."""
        if self._confirming is not None:
            self._claims.withdraw(self._confirming[0], "given up")
            self._confirming = None

    def set_attr(self, name: str, value: Any) -> None:
        """A user attribute of the stored study."""
        self._claims.set_attr(name, value)
