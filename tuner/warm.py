"""What one study learns from others: configurations to try early, and programs that are known not to compile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mhc.schema import Entry
from tl_kernels import KERNELS
from tuner.claims import Claims
from tuner.search import Search
from tuner.store import Store
from tuner.task import Order, Result, Task, config_key

Config = dict[str, Any]

#: Configurations taken from a study of another program of the same kernel, best first.
BEST_OF_OTHERS = 2


class Warm:
    """``searches`` of this run (it may grow), studies that only stand in the storage, and ``entries`` of the profile so far and of other
    GPUs' profiles, those to be preferred first.
    """

    def __init__(self, store: Store, searches: Sequence[Search], entries: Iterable[Entry] = ()) -> None:
        self._store, self._searches = store, searches
        self._entries = [e for e in entries if e.kernel in KERNELS and e.source_hash == KERNELS[e.kernel].source_hash]
        self._names: list[tuple[str, Order]] | None = None
        self._archive: dict[str, dict[str, tuple[Config, Result]]] = {}

    def priors(self, task: Task) -> list[Config]:
        """What profiles say of this very program, for the nearest T each: worth trying before anything but the default."""
        spec = task.spec
        same = [
            e
            for e in self._entries
            if (e.kernel, e.n) == (task.kernel, task.p.n)
            and (e.C == task.p.C or not spec.has_channels)
            and (e.dtype == task.p.dtype or not spec.has_streams)
        ]
        nearest = sorted(same, key=lambda e: abs(math.log(e.tokens / task.T)))[:BEST_OF_OTHERS]
        return [dict(e.config) for e in nearest]

    def hints(self, task: Task) -> list[Config]:
        """Configurations for ``task``, most promising first: of the same program at other T (already compiled), then of other shapes."""
        found: list[tuple[tuple[float, ...], int, list[Config]]] = []
        for search in self._searches:
            other = search.task
            if other.kernel == task.kernel and other.key != task.key:
                configs = search.proposed if other.program == task.program else [cfg for cfg, _ in search.ranking[:BEST_OF_OTHERS]]
                found.append((_distance(task, other.p.n, other.p.C, other.p.dtype, other.T), 0, configs))
        for name, order in self._stored():
            other = order.task
            if other.kernel == task.kernel:
                limit = None if other.program == task.program else BEST_OF_OTHERS
                found.append((_distance(task, other.p.n, other.p.C, other.p.dtype, other.T), 1, self._ranking(name)[:limit]))
        same = [e for e in self._entries if e.kernel == task.kernel]
        found += [(_distance(task, e.n, e.C, e.dtype, e.tokens), 2, [dict(e.config)]) for e in same]
        unique: dict[str, Config] = {}
        for _, _, configs in sorted(found, key=lambda item: item[:2]):
            for cfg in configs:
                unique.setdefault(config_key(cfg), cfg)
        return list(unique.values())

    def known(self, task: Task, key: str) -> Result | None:
        """Why the program of this configuration does not compile, where a study at another T has found out."""
        for search in self._searches:
            if search.task.program == task.program and search.task.key != task.key and key in search.results:
                result = search.results[key][1]
                if result.never_compiles:
                    return result
        for name, order in self._stored():
            if order.task.program == task.program:
                known = self._results(name).get(key)
                if known is not None and known[1].never_compiles:
                    return known[1]
        return None

    def _stored(self) -> Iterator[tuple[str, Order]]:
        """Studies in the storage that are not of this run, but of its kernels and devices, as they were when first asked for."""
        if self._names is None:
            devices = {(s.task.kernel, s.task.device, s.task.spec.source_hash) for s in self._searches}
            self._names = [(n, o) for n, o in orders(self._store) if (o.task.kernel, o.task.device, n.rsplit("|", 1)[-1]) in devices]
        mine = {search.task.key for search in self._searches}
        yield from ((name, order) for name, order in self._names if name not in mine)

    def _results(self, name: str) -> dict[str, tuple[Config, Result]]:
        if name not in self._archive:
            rows = Claims(self._store, name).read()
            self._archive[name] = {row.key: (row.cfg, row.result) for row in rows if row.result is not None}
        return self._archive[name]

    def _ranking(self, name: str) -> list[Config]:
        timed = [(r.time_us, i, cfg) for i, (cfg, r) in enumerate(self._results(name).values()) if r.outcome == "ok" and r.time_us]
        return [cfg for _, _, cfg in sorted(timed, key=lambda item: item[:2])]


#: User attribute of a study that holds its :class:`~tuner.task.Order`.
ORDER = "order"


def orders(store: Store) -> list[tuple[str, Order]]:
    """Every study in the storage that says what it is: its name and its order."""
    found = []
    for study in store.call(store.storage.get_all_studies):
        stored = study.user_attrs.get(ORDER)
        if stored is None:
            continue
        try:
            found.append((study.study_name, Order.from_attr(stored)))
        except (KeyError, TypeError, ValueError):
            continue  # of another version of the tuner
    return found


def _distance(task: Task, n: int, C: int, dtype: str, T: int) -> tuple[float, ...]:
    """Small for shapes whose best configurations are likely to be good here too."""
    spec = task.spec
    channels = abs(math.log(C / task.p.C)) if spec.has_channels else 0.0
    return (float(dtype != task.p.dtype and spec.has_streams), abs(n - task.p.n), channels, abs(math.log(T / task.T)))
