"""tuner/deadline.py and tuner/phases.py: shares of the time, and where it went."""

import pytest

from tuner import deadline
from tuner.deadline import Deadline
from tuner.phases import Phases


@pytest.fixture
def at(monkeypatch):
    """``at(seconds)``: the time since the deadline was made."""
    now = [100.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] = 100.0 + seconds

    return move


def test_early_studies_must_be_through_early(at):
    clock = Deadline(100.0, studies=10, ahead=2)
    at(30.0)
    assert [clock.late(position) for position in (0, 1, 9)] == [True, False, False]
    at(94.0)
    assert clock.late(9)
    assert not clock.up
    at(100.5)
    assert clock.up


def test_without_a_limit_nothing_is_late(at):
    clock = Deadline(None, studies=1, ahead=1)
    at(1e6)
    assert not clock.late(0)
    assert not clock.up
    assert clock.left_s(0, 5) is None
    assert clock.left_s(2, 5) == pytest.approx(1e6 / 2 * 5)


def test_what_is_left_is_at_most_the_limits_rest(at):
    clock = Deadline(100.0, studies=4, ahead=2)
    at(40.0)
    assert clock.left_s(0, 4) == 60.0
    assert clock.left_s(1, 3) == 60.0
    assert clock.left_s(4, 2) == 20.0
    clock.stop()
    at(90.0)
    assert clock.seconds == 40.0


def test_phases_are_told_largest_first_with_their_share_of_all_devices_time():
    phases = Phases()
    phases.add("gate", 20.0)
    phases.add("timing", 50.0)
    phases.add("timing", 50.0)
    phases.add("compile", -1.0)
    first, second = phases.lines(100.0, devices=2, storage_s=1.25)
    told = "timing 100 s (50%), correctness gate 20 s (10%), starting, stopping and the rest 80 s (40%)"
    assert first == f"where the time went (100 s on 2 devices): {told}"
    assert second == "storage: 1.2 s, beside the above"
