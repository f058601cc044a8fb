"""tuner/confirm.py: a win is clear of the noise, a tie ships the default."""

import pytest

from tuner.confirm import decide


def around(us, spread=0.002, n=31):
    return [us * (1 + spread * (i / (n - 1) - 0.5)) for i in range(n)]


def test_a_clear_win_ships_the_best():
    verdict = decide([around(100), around(95), around(90)])
    assert (verdict.verdict, verdict.chosen) == ("win", 2)
    assert verdict.time_us == pytest.approx(90)
    assert verdict.default_us == pytest.approx(100)
    assert verdict.runner_up_us == pytest.approx(95)


@pytest.mark.parametrize("best", [around(99.5), around(95, spread=0.5)], ids=["within the margin", "within the noise"])
def test_a_tie_ships_the_default(best):
    verdict = decide([around(100), best])
    assert (verdict.verdict, verdict.chosen) == ("tie", 0)
    assert verdict.time_us == verdict.default_us


def test_the_default_may_be_the_best():
    verdict = decide([around(100), around(120)])
    assert (verdict.verdict, verdict.chosen) == ("default", 0)


def test_alone_the_default_is_the_best_and_has_no_runner_up():
    assert decide([around(100)]).runner_up_us is None
    assert decide([around(100)]).verdict == "default"


def test_the_reference_wins_only_where_clearly_faster_than_what_ships():
    assert decide([around(100), around(80)], around(70)).reference_wins
    assert not decide([around(100), around(80)], around(85)).reference_wins
    assert not decide([around(100), around(80)], around(79.9)).reference_wins
