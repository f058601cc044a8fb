"""The rivals of a benchmark: which take part at a shape, in whose process, compiled and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from tuner.bench_entrant import Entrant, Spec, release
from tuner.bench_plan import BenchRequest, Plan
from tuner.bench_remote import RemoteEntrant, RivalWorker, WorkerGone, find_env
from tuner.bench_rivals import rival
from tuner.errors import one_line
from tuner.timing import Clock

#: Depth of the stacks whose latency is a decode latency: a graph of one tiny boundary would measure the start of a graph.
DECODE_LAYERS = 8


class Team:
    """The rivals' processes. A costly rival has one process a shape."""

    def __init__(self, plan: Plan, request: BenchRequest, clock: Clock) -> None:
        self.plan, self.request, self.clock = plan, request, clock
        self.missing: dict[str, str] = {}
        self._failed: dict[tuple[str, int], str] = {}
        self._workers: dict[tuple[str, int], RivalWorker] = {}
        self._stopped = False
        self.busy: list[str] = []  # who compiles now

    def is_remote(self, name: str) -> bool:
        return not self.request.in_process and (rival(name).isolated or find_env(name, self.plan.envs) is not None)

    def _key(self, name: str, place: int) -> tuple[str, int]:
        return name, place if rival(name).costly else -1

    def at(self, place: int) -> list[str]:
        """The rivals of one shape; those known to be missing only where the user named them."""
        only = self.plan.shapes[place].only
        asked = [name for name in self.plan.rivals if only is None or name in [o.replace("-", "_") for o in only]]
        return [name for name in asked if self.plan.named or name not in self.missing]

    def specs(self, place: int) -> list[Spec]:
        """The boundary entrants of a shape: each rival alone, and in stacks where it can."""
        shape, found = self.plan.shapes[place], []
        for name in self.at(place):
            spec = Spec(name, shape.T, shape.n, shape.C, self.request.dtype, self.request.seed)
            for layers in self.plan.layers:
                if layers == 1 or rival(name).stacks:
                    found.append(replace(spec, layers=layers))
                if layers > 1 and rival(name).chain is not None:
                    found.append(replace(spec, layers=layers, chained=True))
        return found

    def decode_specs(self, place: int) -> list[Spec]:
        """The decode entrants of a shape. Costly rivals take part at the first shape only."""
        shape, found = self.plan.shapes[place], []
        for name in self.at(place):
            if rival(name).costly and place > 0:
                continue
            for T in self.plan.tokens:
                spec = Spec(name, T, shape.n, shape.C, self.request.dtype, self.request.seed, DECODE_LAYERS, decode=True)
                found.append(spec)
                if rival(name).chain is not None:
                    found.append(replace(spec, chained=True))
        return found

    def _jobs(self, place: int) -> dict[tuple[str, int], list[Spec]]:
        """What the processes are to compile for a shape."""
        jobs: dict[tuple[str, int], list[Spec]] = {}
        for spec in [*self.specs(place), *self.decode_specs(place)]:
            at = self._key(spec.rival, place)
            if self.is_remote(spec.rival) and spec.rival not in self.missing and at not in self._failed:
                jobs.setdefault(at, []).append(spec)
        return jobs

    def start(self, place: int, tick: Callable[[str], None]) -> None:
        """Compile what a shape needs, each rival in its process (started where it has none yet), all beside each other."""
        jobs = self._jobs(place)

        def one(job: tuple[tuple[str, int], list[Spec]]) -> None:
            at, specs = job
            name = at[0]
            self.busy.append(name)
            try:
                worker = self._workers.get(at)
                if worker is None:
                    worker = self._workers[at] = RivalWorker(str(self.plan.device), find_env(name, self.plan.envs))
                    if self._stopped:  # meanwhile
                        worker.kill()
                    worker.start()
                missing = worker.warm(specs)
                if missing:
                    self.missing[name] = missing
            except (WorkerGone, RuntimeError, OSError) as error:
                self._failed[at] = one_line(error)
            self.busy.remove(name)
            tick(name)

        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            list(pool.map(one, jobs.items()))

    def retune(self, place: int) -> None:
        """What autotunes when first called did so among others: again, one process at a time, at the shape that is compared."""
        for at, specs in self._jobs(place).items():
            try:
                self._workers[at].retune([s for s in specs if s.layers == 1 and not s.decode])
            except (WorkerGone, RuntimeError) as error:
                self._failed[at] = one_line(error)

    def processes(self, place: int) -> int:
        """How many processes compile for a shape."""
        return len(self._jobs(place))

    def open(self, specs: Sequence[Spec], place: int, tick: Callable[[str], None]) -> list[Entrant | RemoteEntrant]:
        """Entrants, checked and ready, in the order of ``specs``; the processes work beside each other."""
        found: dict[int, Entrant | RemoteEntrant] = {}
        queues: dict[tuple[str, int], list[int]] = {}
        for i, spec in enumerate(specs):
            queues.setdefault(self._key(spec.rival, place) if self.is_remote(spec.rival) else ("", -1), []).append(i)

        def drain(key: tuple[str, int]) -> None:
            for i in queues[key]:
                found[i] = self._entrant(key, specs[i])
                tick(f"{specs[i].rival} checked")

        remote = [key for key in queues if key[0]]
        with ThreadPoolExecutor(max(1, len(remote))) as pool:
            waiting = [pool.submit(drain, key) for key in remote]
            try:
                if ("", -1) in queues:
                    drain(("", -1))
                for future in waiting:
                    future.result()
            except BaseException:
                self.kill()  # so that nobody waits for them
                raise
        release(everything=False)
        entrants = [found[i] for i in range(len(specs))]
        for entrant in entrants:
            if entrant.row["missing"] and entrant.spec.rival not in self.missing:
                self.missing[entrant.spec.rival] = entrant.row["missing"]
        return entrants

    def _entrant(self, key: tuple[str, int], spec: Spec) -> Entrant | RemoteEntrant:
        if spec.rival in self.missing:
            absent = RemoteEntrant.failed(spec)
            absent.row |= {"label": rival(spec.rival).label, "missing": self.missing[spec.rival]}
            return absent
        if not key[0]:
            return Entrant(spec, self.clock)
        worker = self._workers.get(key)
        entrant = worker.entrant(spec) if worker is not None and key not in self._failed else None
        if entrant is None:
            entrant = RemoteEntrant.failed(spec, self._failed.get(key, "its process did not start"))
        entrant.row["label"] = rival(spec.rival).label
        return entrant

    def versions(self) -> dict[str, Any]:
        """Python and torch of the rivals that have an environment of their own."""
        return {name: w.versions for (name, _), w in self._workers.items() if find_env(name, self.plan.envs) is not None and w.versions}

    def kill(self) -> None:
        self._stopped = True
        for worker in list(self._workers.values()):
            worker.kill()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
