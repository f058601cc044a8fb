"""The configurations of one kernel at one shape: the knobs' values, what is held, what the kernel's constraints leave."""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from typing import Any

from tl_kernels.spec import Config, Kernel, Problem

#: Spaces up to this size are listed in full, so that a small one can be tried exhaustively.
MAX_LISTED = 50_000


class Space:
    """``knobs``: name -> values to choose from; ``held``: knobs that mean nothing on this target, and the default's value of each."""

    def __init__(self, kernel: Kernel, p: Problem, arch: str) -> None:
        self._kernel, self._p = kernel, p
        self.default: dict[str, Any] = kernel.default(p)
        held = set(kernel.gpu_only) if arch == "cpu" else set()
        self.knobs = {name: tuple(values) for name, values in kernel.space(p).items() if name not in held}
        self.held = {name: value for name, value in self.default.items() if name not in self.knobs}
        #: The kernel's starting points, which are for GPUs.
        self.seeds = [] if held else [dict(seed) for seed in kernel.seeds]

    @property
    def size(self) -> int:
        """Combinations of the knobs' values, feasible or not."""
        return math.prod(len(values) for values in self.knobs.values())

    def __contains__(self, cfg: Config) -> bool:
        same = set(cfg) == set(self.knobs) | set(self.held) and all(cfg[k] == value for k, value in self.held.items())
        return same and all(cfg[k] in values for k, values in self.knobs.items())

    def invalid(self, cfg: Config) -> str | None:
        """Why the kernel's constraints rule a configuration out, or None."""
        return self._kernel.invalid(self._p, cfg)

    def fits(self, cfg: Config) -> bool:
        """Whether a configuration may be tried; the default always may."""
        return cfg == self.default or (cfg in self and self.invalid(cfg) is None)

    def knobs_of(self, cfg: Config) -> dict[str, Any]:
        return {name: cfg[name] for name in self.knobs}

    @cached_property
    def listed(self) -> list[dict[str, Any]] | None:
        """Every feasible configuration, or None where the space is too large to list."""
        return None if self.size > MAX_LISTED else self.feasible()

    def feasible(self) -> list[dict[str, Any]]:
        """Every feasible configuration, however many there are."""
        whole = ({**self.held, **dict(zip(self.knobs, values, strict=True))} for values in itertools.product(*self.knobs.values()))
        return [cfg for cfg in whole if self.invalid(cfg) is None]
