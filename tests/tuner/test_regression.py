"""The rule: tolerance, floor and noise band, each of which alone keeps a kernel from having regressed."""

import math
import random

import pytest

from tuner.regression import Rule, judge, noise_band, pooled_band

RULE = Rule(tolerance=0.05, floor_us=0.5)


@pytest.mark.parametrize(
    ("now", "before", "band", "verdict"),
    [
        (110.0, 100.0, 0.02, "regressed"),
        (100.0, 110.0, 0.02, "improved"),
        (104.0, 100.0, 0.0, "same"),  # within the tolerance
        (3.4, 3.0, 0.02, "same"),  # 13%, but 0.4 us
        (110.0, 100.0, 0.12, "noise"),
        (90.0, 100.0, 0.12, "noise"),
        (113.0, 100.0, 0.12, "regressed"),
    ],
)
def test_each_condition_must_hold(now, before, band, verdict):
    change = judge([now], [before], band, RULE)
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(now / before)


def test_runs_are_judged_by_their_medians():
    assert judge([100.0, 101.0, 500.0], [99.0, 100.0, 20.0], 0.0, RULE).verdict == "same"


def test_band_holds_every_run_it_was_made_of():
    runs = [100.0, 101.0, 99.0, 100.5, 107.0]
    band = noise_band(runs)
    assert band >= 107.0 / 100.5 - 1
    assert all(judge([run], [100.5], band, Rule(0.0, 0.0)).verdict in ("same", "noise") for run in runs)


def test_band_reaches_past_the_runs_seen():
    assert noise_band([99.0, 100.0, 101.0]) >= 4 * 1.4826 * math.log(101 / 100)


def test_false_alarms_are_rare_and_ten_percent_is_found():
    rng = random.Random(0)
    calibration = [100 * math.exp(rng.gauss(0, 0.01)) for _ in range(50)]
    band = noise_band(calibration)
    rule = Rule(tolerance=0.03, floor_us=0.5)
    fresh = [100 * math.exp(rng.gauss(0, 0.01)) for _ in range(5000)]
    assert sum(judge([run], calibration, band, rule).verdict == "regressed" for run in fresh) <= 5
    assert sum(judge([1.1 * run], calibration, band, rule).verdict == "regressed" for run in fresh) >= 4990


def test_pooled_band_comes_from_all_kernels():
    rng = random.Random(1)
    groups = [[us * math.exp(rng.gauss(0, 0.01)) for _ in range(3)] for us in range(3, 303)]
    assert 0.02 <= pooled_band(groups) <= 0.08
    assert pooled_band([[100.0], [3.0]]) == 0.0


@pytest.mark.parametrize("bad", [[], [0.0], [-1.0], [float("nan")], [float("inf")]])
def test_what_is_no_time_is_refused(bad):
    with pytest.raises(ValueError, match="runs: got"):
        judge(bad, [1.0], 0.0, RULE)
    with pytest.raises(ValueError, match="runs: got"):
        noise_band([1.0, *bad] if bad else bad)
