"""The verdict: does the best configuration beat the default by more than the noise?

The default and the finalists were timed in interleaved rounds, one sample of each a round. What is judged is the ratio of two samples of
the same round: what moves the clock or the memory for longer than a round moves both and cancels, where in two separate intervals it
stays. The interval of the median ratio is distribution-free (the sign test, exact binomial ranks), so that outliers and skew do no harm.
The best was chosen among several by the same samples: each is therefore held to its share of the error (Bonferroni), and of configurations
that are no faster than the margin together at most 2.5% win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.timing import median, median_interval, median_rank

#: The best's ratio must lie below 1 by more than this share: samples of one run do not show what differs between two (where buffers lie).
MARGIN = 0.01
#: Chance, on either side, that an interval misses; that of all comparisons of one verdict together.
ERROR = 0.025


@dataclass(frozen=True)
class Verdict:
    """``chosen`` is an index into the confirmed configurations, whose first is the default; where the default does not work it is not
    among them and has no time. Times in microseconds; the intervals of times are 95% ones of their medians.

    ``gain_ci``: how much less time than the default the best takes, ``1 - time / default``, as an interval; None for the default alone, or
    after too few rounds. It is the best's, also where a tie ships the default.
    """

    verdict: str
    chosen: int
    time_us: float
    time_ci_us: tuple[float, float]
    default_us: float | None
    default_ci_us: tuple[float, float] | None
    runner_up_us: float | None
    runner_up_ci_us: tuple[float, float] | None = None
    gain_ci: tuple[float, float] | None = None
    reference_us: float | None = None
    reference_wins: bool = False


def rounds_needed(comparisons: int = 1) -> int:
    """The fewest rounds after which a win is possible at all."""
    return next(n for n in range(1, 100) if median_rank(n, ERROR / comparisons) > 0)


def ratio_interval(samples: Sequence[float], base: Sequence[float], error: float = ERROR) -> tuple[float, float] | None:
    """Interval of the median of ``samples[i] / base[i]``, round by round, each end missed with at most ``error``; None where the rounds
    are too few for one. Raises ValueError for unequal numbers of rounds.
    """
    ratios = sorted(_ratios(samples, base))
    rank = median_rank(len(ratios), error)
    return None if rank == 0 else (ratios[rank - 1], ratios[-rank])


def _ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    if len(samples) != len(base):
        raise ValueError(f"samples: got {len(samples)} and {len(base)} rounds, wanted one sample of each configuration in every round")
    return [a / b for a, b in zip(samples, base, strict=True)]


def decide(samples: Sequence[Sequence[float]], reference: Sequence[float] | None = None, default_works: bool = True) -> Verdict:
    """``samples[0]`` is the default's where that works, the others' order is free; one sample of each a round, in the order of the rounds.
    A tie ships the default; the best wins where there is none. The reference wins only where it is clearly faster than what would ship.
    Raises ValueError for unequal numbers of rounds.
    """
    medians = [median(s) for s in samples]
    intervals = [median_interval(s) for s in samples]
    middle = [median(_ratios(s, samples[0])) for s in samples]
    best = min(range(1, len(samples)), key=middle.__getitem__, default=0)
    ratio = ratio_interval(samples[best], samples[0], ERROR / (len(samples) - 1)) if best else None
    if not default_works:
        verdict, chosen, ratio = "win", min(range(len(samples)), key=medians.__getitem__), None
    elif best == 0 or middle[best] >= 1:
        verdict, chosen = "default", 0
    elif ratio is not None and ratio[1] < 1 - MARGIN:
        verdict, chosen = "win", best
    else:
        verdict, chosen = "tie", 0
    others = [i for i in range(len(samples)) if i != chosen]
    second = min(others, key=medians.__getitem__, default=None)
    against = None if reference is None else ratio_interval(reference, samples[chosen])
    return Verdict(
        verdict=verdict,
        chosen=chosen,
        time_us=medians[chosen],
        time_ci_us=intervals[chosen],
        default_us=medians[0] if default_works else None,
        default_ci_us=intervals[0] if default_works else None,
        runner_up_us=None if second is None else medians[second],
        runner_up_ci_us=None if second is None else intervals[second],
        gain_ci=None if ratio is None else (1 - ratio[1], 1 - ratio[0]),
        reference_us=None if reference is None else median(reference),
        reference_wins=against is not None and against[1] < 1 - MARGIN,
    )
