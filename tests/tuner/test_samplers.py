"""tuner/samplers.py: each name gives its sampler, batches do not repeat themselves, and what is wrong is one line."""

import importlib.util
import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from tuner import samplers
from tuner.errors import TuneError
from tuner.listed_gp import ListedGP
from tuner.samplers import SAMPLERS, check_sampler, make_sampler, pick_samplers, sampler_help, startup_trials

VALUES = (1, 2, 4, 8, 16, 32)
SPACE = {"a": CategoricalDistribution(VALUES), "b": CategoricalDistribution(VALUES), "fixed": CategoricalDistribution((True,))}


def time_us(params):
    """Best at a = b = 8, where nothing else comes within 10%."""
    return 100 * (1 + 0.2 * abs(math.log2(params["a"] / 8)) + 0.2 * abs(math.log2(params["b"] / 8)))


def suggestions(sampler, count, batch=1):
    """``count`` suggestions with ``batch`` under way at a time, told their time."""
    study = optuna.create_study(sampler=sampler)
    underway, params = [], []
    for _ in range(count):
        underway.append(study.ask(SPACE))
        params.append(underway[-1].params)
        if len(underway) == batch:
            trial = underway.pop(0)
            study.tell(trial, time_us(trial.params))
    return params


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tpe", optuna.samplers.TPESampler),
        ("gp", optuna.samplers.GPSampler),
        ("random", optuna.samplers.RandomSampler),
        ("brute-force", optuna.samplers.BruteForceSampler),
    ],
)
def test_a_name_gives_optunas_sampler_and_its_seed_decides(name, kind):
    assert isinstance(make_sampler(name, 0, 16), kind)
    candidates = [{"a": a, "b": b, "fixed": True} for a in VALUES for b in VALUES]
    runs = [suggestions(make_sampler(name, seed, 12, candidates), 9, batch=3) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_every_sampler_has_its_sentence_in_the_help():
    for name, choice in SAMPLERS.items():
        assert f"{name}: {choice.about}" in sampler_help()


@pytest.mark.parametrize(
    ("got", "said"), [("tpee", "did you mean 'tpe'"), ("brute_force", "did you mean 'brute-force'"), ("", "unknown sampler ''")]
)
def test_an_unknown_name_is_one_line_with_a_close_match(got, said):
    with pytest.raises(TuneError) as error:
        make_sampler(got, 0, 16)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["scipy", "torch"])
def test_gp_without_its_packages_is_one_line(monkeypatch, package):
    there = importlib.util.find_spec
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None if name == package else there(name))
    with pytest.raises(TuneError, match=f"^sampler gp: wanted {package}, not installed here; pip install {package}$"):
        make_sampler("gp", 0, 16)
    check_sampler("tpe")


def test_lists_of_names():
    assert pick_samplers(None) == ("gp", "tpe", "random", "brute-force")
    assert pick_samplers("gp, tpe,gp") == ("gp", "tpe")
    for text, said in ((" ,", "--samplers: got no name"), ("tpe,gpp", "did you mean 'gp'")):
        with pytest.raises(TuneError, match=said):
            pick_samplers(text)


def test_the_model_is_asked_after_a_third_of_the_budget():
    assert [startup_trials(trials) for trials in (1, 12, 16, 24, 64, 1000)] == [4, 4, 5, 8, 10, 10]


def test_brute_force_takes_everything_once():
    tried = suggestions(make_sampler("brute-force", 0, 36), 36)
    assert len({(p["a"], p["b"]) for p in tried}) == 36


@pytest.mark.parametrize(("name", "seeds", "count"), [("tpe", 15, 36), ("gp", 3, 16)])
def test_a_sampler_that_learns_finds_a_narrow_best_sooner_than_chance(name, seeds, count):
    candidates = [{"a": a, "b": b, "fixed": True} for a in VALUES for b in VALUES]
    tries = []
    for seed in range(seeds):
        tried = dict.fromkeys(
            time_us(p) == 100 or (p["a"], p["b"]) for p in suggestions(make_sampler(name, seed, 12, candidates), count, 3)
        )
        tries.append(list(tried).index(True) + 1 if True in tried else 36)
    # by chance half of the seeds need 18 of the 36
    assert sorted(tries)[seeds // 2] <= 14, tries


def test_gp_suggests_only_candidates_and_none_twice():
    """What the spec rules out is never suggested once the model is asked, and what was refused or is under way not again."""
    candidates = [{"a": a, "b": b, "fixed": True} for a in VALUES for b in VALUES if a * b <= 64]
    study = optuna.create_study(sampler=ListedGP(candidates, seed=0, n_startup_trials=2))
    for a, b in ((1, 1), (32, 1)):
        study.enqueue_trial({"a": a, "b": b, "fixed": True})
        trial = study.ask(SPACE)
        study.tell(trial, time_us(trial.params))
    seen = {(1, 1), (32, 1)}
    underway = []
    for i in range(len(candidates) - 2):
        trial = study.ask(SPACE)
        place = (trial.params["a"], trial.params["b"])
        assert place not in seen
        assert place[0] * place[1] <= 64
        seen.add(place)
        underway.append(trial)
        if i % 3 == 2:
            study.tell(underway.pop(0), state=TrialState.PRUNED)
            first = underway.pop(0)
            study.tell(first, time_us(first.params))
    assert len(seen) == len(candidates)
    # used up: Optuna's own search goes on
    assert set(study.ask(SPACE).params) == set(SPACE)
