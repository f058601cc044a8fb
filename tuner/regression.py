"""When has something become slower? The rule of ``mhc-tune check`` and of the pytest fixture, over medians of whole runs.

A run is one process: its buffers lie elsewhere than the last one's, and that alone moves a kernel by a percent which the samples within a
run never show. So noise is what runs of identical code differ by, and a kernel has regressed when it is slower by more than the tolerance,
by more than an absolute floor, and by more than its own noise. What is faster by as much has improved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tuner.timing import median

#: Robust standard deviations that a band reaches at least: 4 leave one run of 16 000 outside, were noise normal.
SIGMAS = 4.0
#: A median absolute deviation of normal noise, as a standard deviation.
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Rule:
    """``tolerance``: share of the time before. ``floor_us``: microseconds; below it a share says little (a launch is about 3 us)."""

    tolerance: float = 0.05
    floor_us: float = 0.5


@dataclass(frozen=True)
class Change:
    """What became of a kernel. Times in microseconds, medians of runs; ``ratio`` is now / before; ``band`` is the noise as a share.

    ``noise``: past the tolerance and the floor, but runs of identical code differ as much.
    """

    verdict: Literal["regressed", "improved", "noise", "same"]
    now_us: float
    before_us: float
    ratio: float
    band: float


def noise_band(runs: Sequence[float]) -> float:
    """Share by which a run of identical code may differ from the usual one, from the medians of at least two runs: the largest deviation
    seen, or :data:`SIGMAS` robust standard deviations where that is more. Raises ValueError for fewer runs, or a time that is none.
    """
    if len(runs) < 2:
        raise ValueError(f"runs: got {len(runs)}, wanted at least 2 of identical code")
    deviations = _deviations(runs)
    return math.expm1(max(max(deviations), SIGMAS * MAD_TO_SIGMA * median(deviations)))


def pooled_band(groups: Sequence[Sequence[float]]) -> float:
    """The band of kernels that have few runs each, from all of their deviations together; 0 where none has two."""
    # n deviations from a median of n leave n - 1 free
    pooled = [d * math.sqrt(len(runs) / (len(runs) - 1)) for runs in groups if len(runs) > 1 for d in _deviations(runs)]
    return math.expm1(SIGMAS * MAD_TO_SIGMA * median(pooled)) if pooled else 0.0


def judge(now: Sequence[float], before: Sequence[float], band: float, rule: Rule) -> Change:
    """Medians of runs against medians of runs (one of each will do). Raises ValueError for none, or a time that is none."""
    for runs in (now, before):
        _deviations(runs)
    a, b = median(now), median(before)
    ratio = a / b
    size = max(ratio, 1 / ratio) - 1
    if size <= rule.tolerance or abs(a - b) <= rule.floor_us:
        verdict: Literal["regressed", "improved", "noise", "same"] = "same"
    elif size <= band:
        verdict = "noise"
    else:
        verdict = "regressed" if ratio > 1 else "improved"
    return Change(verdict, a, b, ratio, band)


def _deviations(runs: Sequence[float]) -> list[float]:
    """|log| of each run's share of the usual one."""
    if not runs or not all(0 < run < math.inf for run in runs):
        raise ValueError(f"runs: got {list(runs)}, wanted times above 0, in microseconds")
    usual = median(runs)
    return [abs(math.log(run / usual)) for run in runs]
