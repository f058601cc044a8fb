"""The verdict: does the best configuration beat the default by more than the noise?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.timing import median, median_interval

#: The best's interval must lie below the default's by more than this share.
MARGIN = 0.01


@dataclass(frozen=True)
class Verdict:
    """``chosen`` is an index into the confirmed configurations, whose first is the default. Times in microseconds."""

    verdict: str
    chosen: int
    time_us: float
    time_ci_us: tuple[float, float]
    default_us: float
    runner_up_us: float | None
    reference_us: float | None = None
    reference_wins: bool = False


def decide(samples: Sequence[Sequence[float]], reference: Sequence[float] | None = None) -> Verdict:
    """``samples[0]`` is the default's, the others' order is free. A tie ships the default; the reference wins only where it is clearly
    faster than what would ship.
    """
    medians = [median(s) for s in samples]
    intervals = [median_interval(s) for s in samples]
    best = min(range(len(samples)), key=medians.__getitem__)
    if best == 0:
        verdict, chosen = "default", 0
    elif intervals[best][1] < intervals[0][0] * (1 - MARGIN):
        verdict, chosen = "win", best
    else:
        verdict, chosen = "tie", 0
    others = [m for i, m in enumerate(medians) if i != chosen]
    wins = reference is not None and median_interval(reference)[1] < intervals[chosen][0] * (1 - MARGIN)
    return Verdict(
        verdict=verdict,
        chosen=chosen,
        time_us=medians[chosen],
        time_ci_us=intervals[chosen],
        default_us=medians[0],
        runner_up_us=min(others) if others else None,
        reference_us=median(reference) if reference is not None else None,
        reference_wins=wins,
    )
