"""tuner/confirm.py: a win is clear of the noise, a tie ships the default."""

import math
import random

import pytest

from tuner.confirm import MARGIN, decide, ratio_interval, rounds_needed
from tuner.timing import median_interval


def around(us, spread=0.002, n=31):
    return [us * (1 + spread * (i / (n - 1) - 0.5)) for i in range(n)]


def rounds_of(dice, factors, n=60, noise=0.01, drift=0.0, spikes=0.0):
    """Samples as a GPU gives them: log-normal noise of each; a clock that drifts over the run and hits a whole round alike; now and then a
    sample that something disturbed.
    """
    phase = dice.uniform(0, 2 * math.pi)
    clock = [100 * (1 + drift * math.sin(phase + 4 * r / n)) for r in range(n)]
    sample = lambda us: us * dice.lognormvariate(0, noise) * (1.2 if dice.random() < spikes else 1)  # noqa: E731
    return [[sample(us * factor) for us in clock] for factor in factors]


def test_a_clear_win_ships_the_best():
    verdict = decide([around(100), around(95), around(90)])
    assert (verdict.verdict, verdict.chosen) == ("win", 2)
    assert verdict.time_us == pytest.approx(90)
    assert verdict.default_us == pytest.approx(100)
    assert verdict.runner_up_us == pytest.approx(95)


def test_every_time_has_the_interval_of_its_own_samples():
    samples = [around(100), around(95), around(90)]
    verdict = decide(samples)
    assert verdict.default_ci_us == median_interval(samples[0])
    assert verdict.runner_up_ci_us == median_interval(samples[1])
    assert verdict.time_ci_us == median_interval(samples[2])
    assert verdict.gain_ci == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("best", [around(99.5), around(95, spread=0.5)], ids=["within the margin", "within the noise"])
def test_a_tie_ships_the_default(best):
    verdict = decide([around(100), best])
    assert (verdict.verdict, verdict.chosen) == ("tie", 0)
    assert verdict.time_us == verdict.default_us
    assert verdict.gain_ci[0] < MARGIN


def test_the_default_may_be_the_best():
    verdict = decide([around(100), around(120)])
    assert (verdict.verdict, verdict.chosen) == ("default", 0)
    assert verdict.gain_ci == pytest.approx((-0.2, -0.2))


def test_where_the_default_does_not_work_the_best_wins_over_all_others():
    verdict = decide([around(95), around(90), around(92)], around(80), default_works=False)
    assert (verdict.verdict, verdict.chosen) == ("win", 1)
    assert (verdict.time_us, verdict.runner_up_us) == (pytest.approx(90), pytest.approx(92))
    assert verdict.default_us is verdict.default_ci_us is verdict.gain_ci is None
    assert verdict.reference_wins
    assert decide([around(95)], default_works=False).verdict == "win"


def test_alone_the_default_is_the_best_and_has_no_runner_up():
    verdict = decide([around(100)])
    assert verdict.runner_up_us is verdict.runner_up_ci_us is verdict.gain_ci is None
    assert verdict.verdict == "default"


def test_the_reference_wins_only_where_clearly_faster_than_what_ships():
    assert decide([around(100), around(80)], around(70)).reference_wins
    assert not decide([around(100), around(80)], around(85)).reference_wins
    assert not decide([around(100), around(80)], around(79.9)).reference_wins


@pytest.mark.parametrize(("rival", "needed"), [(1, 6), (2, 7), (4, 8)])
def test_too_few_rounds_are_a_tie_however_large_the_gain(rival, needed):
    assert rounds_needed(rival) == needed
    others = [around(50 + k) for k in range(rival)]
    assert decide([around(100)[: needed - 1], *(s[: needed - 1] for s in others)]).verdict == "tie"
    assert decide([around(100)[:needed], *(s[:needed] for s in others)]).verdict == "win"


def test_rounds_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="got 30 and 31 rounds"):
        decide([around(100), around(90)[:-1]])


@pytest.mark.parametrize(
    ("n", "error", "rank"),
    [(5, 0.025, None), (6, 0.025, 1), (9, 0.025, 2), (20, 0.025, 6), (60, 0.025, 22)],  # published tables of the sign test
)
def test_the_ranks_are_those_of_the_sign_test(n, error, rank):
    found = ratio_interval([float(i + 1) for i in range(n)], [1.0] * n, error)
    assert found == (None if rank is None else (rank, n + 1 - rank))


NOISE = {
    "log-normal 1% and drift": {"drift": 0.03},
    "noisier, with outliers": {"noise": 0.03, "drift": 0.1, "spikes": 0.1},
    "few rounds": {"n": 9, "drift": 0.03},
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("finalists", [1, 2, 4])
def test_configurations_as_fast_as_the_default_rarely_seem_faster(noise, finalists):
    dice, tries = random.Random(finalists), 1000
    seem = sum(decide(rounds_of(dice, [1.0] * (finalists + 1), **noise)).gain_ci[0] > 0 for _ in range(tries))
    assert seem <= 0.025 * tries
    # just at the margin a win is an error too, and the closest one to make
    wins = sum(decide(rounds_of(dice, [1.0] + [1 - MARGIN] * finalists, **noise)).verdict == "win" for _ in range(tries))
    assert wins <= 0.025 * tries


def test_identical_configurations_never_win_in_the_usual_noise():
    dice = random.Random(0)
    assert all(decide(rounds_of(dice, [1.0, 1.0, 1.0], drift=0.03)).verdict != "win" for _ in range(1000))


def test_a_gain_that_drift_would_hide_in_separate_intervals_is_found():
    dice, tries = random.Random(1), 200
    paired = separate = 0
    for _ in range(tries):
        samples = rounds_of(dice, [1.0, 0.97], drift=0.1)
        paired += decide(samples).verdict == "win"
        separate += median_interval(samples[1])[1] < median_interval(samples[0])[0] * (1 - MARGIN)
    assert paired >= 0.95 * tries
    assert separate <= 0.5 * tries
