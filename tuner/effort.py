"""How hard to look, as one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """``trials`` per (kernel, shape), ``samples`` per trial within ``sample_ms``; ``finalists`` are confirmed beside the default over
    ``rounds`` interleaved rounds within ``confirm_ms``. ``time_limit_s`` is the default of ``--time-limit``.
    """

    trials: int
    samples: int
    sample_ms: float
    finalists: int
    rounds: int
    confirm_ms: float
    time_limit_s: float | None = None


EFFORTS = {
    ("gpu", "quick"): Effort(trials=16, samples=20, sample_ms=60.0, finalists=2, rounds=60, confirm_ms=300.0),
    ("gpu", "full"): Effort(trials=64, samples=40, sample_ms=200.0, finalists=4, rounds=200, confirm_ms=1500.0),
    ("cpu", "quick"): Effort(trials=3, samples=7, sample_ms=150.0, finalists=1, rounds=9, confirm_ms=400.0, time_limit_s=280.0),
    ("cpu", "full"): Effort(trials=12, samples=15, sample_ms=600.0, finalists=3, rounds=25, confirm_ms=3000.0),
}


def effort_of(target: str, name: str) -> Effort:
    """The row for a target (``"cpu"`` or an architecture) and an effort name."""
    return EFFORTS["cpu" if target == "cpu" else "gpu", name]
