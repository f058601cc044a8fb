"""The time of a run, and each study's share of it."""

from __future__ import annotations

import time

#: Of a study's share: the rest is for its confirmation.
SEARCHING = 0.93


class Deadline:
    """``limit`` in seconds, None for none. The clock starts here. ``ahead``: studies that are worked on at once."""

    def __init__(self, limit: float | None, studies: int, ahead: int) -> None:
        self.limit = limit
        self._studies, self._ahead = studies, ahead
        self._start = time.monotonic()
        self._end: float | None = None

    def stop(self) -> None:
        """The run is over."""
        self._end = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began, until it ended."""
        return (self._end or time.monotonic()) - self._start

    @property
    def up(self) -> bool:
        return self.limit is not None and self.seconds > self.limit

    def late(self, position: int) -> bool:
        """Each study must be through by its share of the time; what early ones leave, later ones have."""
        if self.limit is None:
            return False
        return self.seconds > SEARCHING * self.limit * (position + 1 + self._ahead) / (self._studies + self._ahead)

    def left_s(self, done: int, still: int) -> float | None:
        """An estimate: the limit's rest at most, else what the ``done`` studies took each for those that are ``still`` open."""
        rest = None if self.limit is None else self.limit - self.seconds
        if done == 0:
            return rest
        guess = self.seconds / done * still
        return guess if rest is None else min(guess, rest)
