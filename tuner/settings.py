"""What the command line decided about a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuner.effort import Effort
from tuner.hardware import Hardware
from tuner.samplers import DEFAULT_SAMPLER
from tuner.task import Order, Task


@dataclass(frozen=True)
class Settings:
    """Times in seconds. ``search_seed``: of the sampler, None for ``seed``; two workers with the same one would suggest the same."""

    hardware: Hardware
    effort: Effort
    trials: int
    time_limit: float | None
    seed: int
    jobs: int
    command: str
    log: Path | None = None
    sampler: str = DEFAULT_SAMPLER
    search_seed: int | None = None

    def order(self, task: Task) -> Order:
        """What these settings ask for, for one task."""
        return Order(task, self.trials, self.effort, self.seed, self.sampler)
