"""A ledger: every configuration of a study measured once, as ``mhc-tune --raw FILE`` writes it. Replays read it (tuner/replay.py).

What the ladder refused (``infeasible``) is in it too, so that a replay can answer for all that a search may propose. The space is the
ledger's own: a replay of a committed ledger stays the same after the kernel has changed.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mhc.files import read_text
from mhc.schema import Knob, Positive, Text
from tl_kernels import KERNELS, NAMES
from tl_kernels.spec import MAX_N
from tuner.errors import TuneError, one_line
from tuner.space import Space
from tuner.task import FAILED, INFEASIBLE, TIMED, Result, config_key

Config = dict[str, Knob]


class _Read(BaseModel):
    # a raw file holds more than a replay needs, and later versions add to it
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Trial(_Read):
    """One configuration and what became of it; ``time_us`` where it was timed."""

    config: Config
    outcome: str
    time_us: Positive | None = None

    @model_validator(mode="after")
    def _timed(self) -> Trial:
        known = (*TIMED, *FAILED, INFEASIBLE)
        if self.outcome not in known:
            raise ValueError(f"outcome: got {self.outcome!r}, wanted one of {', '.join(known)}")
        if (self.outcome in TIMED) != (self.time_us is not None):
            raise ValueError(
                f"time_us: got {self.time_us}, wanted {'a time' if self.outcome in TIMED else 'none'} with outcome {self.outcome!r}"
            )
        return self

    @property
    def result(self) -> Result:
        interval = None if self.time_us is None else (self.time_us, self.time_us)
        return Result(self.outcome, time_us=self.time_us, time_ci_us=interval)


class Study(_Read):
    """The whole space of one kernel at one shape. ``default`` is what a search tries first."""

    kernel: str
    n: Annotated[int, Field(ge=1, le=MAX_N)]
    C: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    dtype: Text
    tokens: Annotated[int, Field(ge=1)]
    study: Text
    default: Config
    trials: Annotated[list[Trial], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_space(self) -> Study:
        if self.kernel not in NAMES:
            raise ValueError(f"kernel: got {self.kernel!r}, wanted one of {', '.join(NAMES)}")
        seen: set[str] = set()
        for i, trial in enumerate(self.trials):
            if set(trial.config) != set(self.default):
                raise ValueError(
                    f"trials[{i}].config: got the knobs {', '.join(trial.config)}, wanted the default's: {', '.join(self.default)}"
                )
            key = config_key(trial.config)
            if key in seen:
                raise ValueError(f"trials[{i}] repeats an earlier configuration: {key}")
            seen.add(key)
        if config_key(self.default) not in seen:
            raise ValueError(f"default: {config_key(self.default)} was not measured")
        if not any(trial.outcome == "ok" for trial in self.trials):
            raise ValueError("trials: none has outcome 'ok', wanted at least one")
        return self

    @cached_property
    def results(self) -> dict[str, Result]:
        """What became of each configuration, by :func:`tuner.search.config_key`."""
        return {config_key(trial.config): trial.result for trial in self.trials}

    @property
    def best(self) -> Trial:
        """The fastest correct configuration."""
        return min((t for t in self.trials if t.outcome == "ok"), key=lambda t: t.time_us or 0.0)

    @property
    def size(self) -> int:
        """Configurations that reach the device."""
        return sum(result.counts for result in self.results.values())

    def near_best(self, within: float) -> set[str]:
        """Keys of the correct configurations whose time is at most ``1 + within`` of the best."""
        limit = (self.best.time_us or 0.0) * (1 + within)
        return {config_key(t.config) for t in self.trials if t.outcome == "ok" and (t.time_us or 0.0) <= limit}

    @property
    def label(self) -> str:
        C = self.C[0] if KERNELS[self.kernel].has_channels else "any"
        return f"{self.kernel} n={self.n} C={C} {self.dtype} T={self.tokens}"

    def missing(self, arch: str) -> int | None:
        """Feasible configurations of the kernel that the ledger lacks; None where the kernel has changed since."""
        kernel = KERNELS[self.kernel]
        if self.study.rsplit("|", 1)[-1] != kernel.source_hash:
            return None
        every = Space(kernel, kernel.problem(self.n, self.C[0], self.dtype), arch).feasible()
        return sum(config_key(cfg) not in self.results for cfg in every)


class Hardware(_Read):
    name: Text
    arch: Text
    profile: Text


class Ledger(_Read):
    """A raw file: its device and its studies."""

    schema_version: Literal[1]
    hardware: Hardware
    studies: Annotated[list[Study], Field(min_length=1)]


def read_ledger(path: Path) -> Ledger:
    """The ledger at ``path``, checked. Raises :class:`TuneError` in one line that names the field."""
    try:
        text = read_text(path, 256 << 20)
    except (OSError, UnicodeDecodeError) as e:
        raise TuneError(f"ledger {path}: cannot be read: {getattr(e, 'strerror', None) or one_line(e)}") from None
    try:
        return Ledger.model_validate(json.loads(text))
    except ValidationError as e:
        first = e.errors()[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        more = f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
        raise TuneError(f"ledger {path}: {where or 'file'}: {first['msg'].removeprefix('Value error, ')}{more}") from None
    except (ValueError, RecursionError) as e:
        raise TuneError(f"ledger {path}: is not JSON: {one_line(e)}") from None
