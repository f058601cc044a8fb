"""Optuna's Gaussian process over a list of configurations instead of the product of their knobs' values.

Half of a kernel's product of knobs is ruled out by its spec. Optuna's own search of the acquisition function does not know that, and the
process learns nothing from a refused suggestion, so it would suggest the same again, at a tenth of a second each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler
from optuna.study import Study
from optuna.trial import FrozenTrial


def _logged(trial: FrozenTrial) -> FrozenTrial:
    """The trial with the logarithm of its time: what is twice as fast counts alike at 100 us and at 1000."""
    logged = copy.copy(trial)
    logged.values = [math.log(value) for value in trial.values]
    return logged


class ListedGP(GPSampler):
    """``candidates``: every configuration that may be suggested. Those that any trial of the study had are not suggested again."""

    def __init__(self, candidates: Sequence[Mapping[str, Any]], **options: Any) -> None:
        super().__init__(**options)
        self._candidates = candidates
        self._rows: np.ndarray | None = None

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        from optuna._gp.search_space import SearchSpace

        # a knob with one value is not in the search space
        seen = {tuple(t.params.get(name) for name in search_space) for t in study.get_trials(deepcopy=False)}
        fresh = [c for c in self._candidates if tuple(c[name] for name in search_space) not in seen]
        self._rows = SearchSpace(search_space).get_normalized_params([trial] * len(fresh), [dict(c) for c in fresh]) if fresh else None
        return super().sample_relative(study, trial, search_space)

    def _sample_relative_impl(
        self, study: Study, completed: list[FrozenTrial], running: list[FrozenTrial], search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super()._sample_relative_impl(study, [_logged(t) for t in completed], running, search_space)

    def _optimize_acqf(self, acqf: Any, best_params: np.ndarray | None) -> np.ndarray:
        if self._rows is None:
            return super()._optimize_acqf(acqf, best_params)
        return self._rows[int(np.argmax(acqf.eval_acqf_no_grad(self._rows)))]
