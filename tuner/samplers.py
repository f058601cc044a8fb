"""Optuna's samplers by the names the command line has for them, set up for this tuner.

A search asks for several configurations before it tells the first result (they compile in parallel), tells times, and tells suggestions
that cannot be tried as pruned. Spaces are small (tens to a thousand configurations) and a trial costs a second.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import TuneError, unknown

#: Every configuration that may be suggested, or None where the space is too large to list.
Candidates = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Choice:
    """``about``: a sentence for ``--help``. ``make(seed, trials, candidates)``. ``needs``: packages beyond Optuna's own."""

    about: str
    make: Callable[[int, int, Candidates], BaseSampler]
    needs: tuple[str, ...] = ()


#: A Gaussian process is of use from the first times on.
GP_STARTUP = 4


def startup_trials(trials: int) -> int:
    """Random trials before TPE has seen enough fast and slow ones to tell them apart: a third of the budget, 4 to 10."""
    return max(4, min(10, trials // 3))


def _tpe(seed: int, trials: int, candidates: Candidates) -> BaseSampler:
    # constant_liar: what is under way counts as slow, so that a batch is not one configuration and its neighbours
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup_trials(trials), multivariate=True, constant_liar=True)


def _gp(seed: int, trials: int, candidates: Candidates) -> BaseSampler:
    from tuner.listed_gp import ListedGP

    return ListedGP(candidates or (), seed=seed, n_startup_trials=GP_STARTUP, warn_independent_sampling=False)


def _random(seed: int, trials: int, candidates: Candidates) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


class _BruteForce(optuna.samplers.BruteForceSampler):
    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Optuna's stops ``Study.optimize`` after the last one, which is an error where trials are asked for and told, as here."""


def _brute_force(seed: int, trials: int, candidates: Candidates) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _BruteForce(seed=seed)


SAMPLERS = {
    "gp": Choice("models the times by a Gaussian process; a tenth of a second a suggestion", _gp, ("scipy", "torch")),
    "tpe": Choice("learns which values fast configurations share (tree-structured Parzen estimator); milliseconds a suggestion", _tpe),
    "random": Choice("learns nothing: the yardstick", _random),
    "brute-force": Choice("tries everything, in random order: for small spaces and for ledgers", _brute_force),
}
#: On the ledger of an H100 (results/h100/replay.json) it is never behind the others, and well ahead within a short run's trials.
DEFAULT_SAMPLER = "gp"


def sampler_help() -> str:
    """All of them in one text for ``--help``."""
    return "; ".join(f"{name}: {choice.about}" for name, choice in SAMPLERS.items())


def check_sampler(name: str) -> str:
    """The name, if there is such a sampler and its packages are installed; else :class:`TuneError`."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    missing = [package for package in SAMPLERS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        raise TuneError(f"sampler {name}: wanted {' and '.join(missing)}, not installed here; pip install {' '.join(missing)}")
    return name


def make_sampler(name: str, seed: int, trials: int, candidates: Candidates = None) -> BaseSampler:
    """A sampler for a study of ``trials`` trials. Raises :class:`TuneError` for an unknown name or a missing package.

    ``candidates`` keep ``gp`` from suggesting what cannot be tried; the others find out by being refused, which costs them little.
    """
    return SAMPLERS[check_sampler(name)].make(seed, trials, candidates)


def pick_samplers(text: str | None) -> tuple[str, ...]:
    """``"tpe, gp"`` -> ``("tpe", "gp")``, each checked; None: all. Raises :class:`TuneError`."""
    names = list(SAMPLERS) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise TuneError("--samplers: got no name, wanted at least one")
    return tuple(check_sampler(name) for name in dict.fromkeys(names))
