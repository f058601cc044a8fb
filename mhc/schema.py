"""What a profile holds: for every kernel and shape the configuration that won, and how it earned its place.

Written by ``mhc-tune``, read by :mod:`mhc.profile`. Times are microseconds, rates GB/s (1e9 bytes), shares are of copy bandwidth.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tl_kernels.spec import MAX_N, STREAM_DTYPES

SCHEMA_VERSION: Literal[1] = 1


def _dtype(value: str) -> str:
    if value not in STREAM_DTYPES:
        raise ValueError(f"wanted one of {', '.join(STREAM_DTYPES)}")
    return value


#: Name of a dtype that streams may have.
Dtype = Annotated[str, AfterValidator(_dtype)]


def _knob(value: Any) -> int | str | bool:
    # Before the union sees it: a union's error names three types, and its path grows by one of them.
    if not isinstance(value, int | str | bool):
        raise ValueError("wanted an integer, a string or a boolean")  # pydantic collects ValueError, not TypeError
    return value


def _pair(value: Any, least: float, wanted: str) -> tuple[float, float]:
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != 2 or not least <= value[0] <= value[1] < float("inf"):
        raise ValueError(f"wanted [low, high] {wanted}, low <= high")
    return (float(value[0]), float(value[1]))


def _interval(value: Any) -> tuple[float, float]:
    return _pair(value, 0.0, "in microseconds")


def _gain(value: Any) -> tuple[float, float]:
    pair = _pair(value, -sys.float_info.max, "as shares of the default's time")
    if pair[1] >= 1:
        raise ValueError("wanted [low, high] as shares of the default's time, below 1")
    return pair


def _optional(check: Callable[[Any], Any]) -> BeforeValidator:
    """``check``, where there is a value."""
    return BeforeValidator(lambda value: None if value is None else check(value))


def _date(value: Any) -> str:
    try:
        datetime.fromisoformat(value.removesuffix("Z"))
    except (AttributeError, TypeError, ValueError):
        raise ValueError("wanted an ISO date such as 2026-11-22T06:50:26+00:00") from None
    return str(value)


def _funnel(value: Any) -> dict[str, int]:
    good = isinstance(value, dict) and all(
        isinstance(rung, str) and re.fullmatch(r"[a-z][a-z_]*", rung) and type(count) is int and count >= 0 for rung, count in value.items()
    )
    if not good:
        raise ValueError("wanted how many configurations ended at each rung, such as {shared: 3, ok: 12}")
    return dict(value)


#: An ISO 8601 date.
Date = Annotated[str, BeforeValidator(_date)]
Interval = Annotated[tuple[float, float] | None, _optional(_interval)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Knob = Annotated[int | str | bool, BeforeValidator(_knob)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A file that only this project writes: no field more, no value converted, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Entry(Strict):
    """One kernel at one shape. What has a default of None is left out by older tuners, and where it is not known."""

    kernel: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", description="name in tl_kernels.KERNELS")]
    n: Annotated[int, Field(ge=1, le=MAX_N, description="streams")]
    C: Annotated[int, Field(ge=1, description="channels")]
    dtype: Annotated[Dtype, Field(description="of the streams, a torch dtype name")]
    tokens: Annotated[int, Field(ge=1, description="T of the bucket this was tuned at")]
    impl: Annotated[Literal["tilelang", "reference"], Field(description="'reference': PyTorch was faster (CPU target)")] = "tilelang"
    config: Annotated[dict[str, Knob], Field(description="knobs of the kernel's search space")]
    time_us: Positive
    time_ci_us: Annotated[tuple[float, float], BeforeValidator(_interval), Field(description="confidence interval of time_us")]
    gbps: Annotated[NotNegative, Field(description="the kernel's floor bytes / time_us")]
    copy_share: Annotated[NotNegative, Field(description="gbps / the copy bandwidth of its own run")]
    default_us: Annotated[Positive | None, Field(description="time of the kernel's default, same run; none: it does not work here")] = None
    runner_up_us: Positive | None = None
    verdict: Annotated[Literal["win", "tie", "default"], Field(description="a tie ships the default")]
    error: Annotated[dict[str, NotNegative], Field(description="relative error of each output against the fp64 reference")]
    source_hash: Annotated[Text, Field(description="Kernel.source_hash when this was tuned")]
    default_ci_us: Annotated[Interval, Field(description="confidence interval of default_us")] = None
    default_config: Annotated[dict[str, Knob] | None, Field(description="the default of default_us; the kernel's may have changed")] = None
    runner_up_ci_us: Annotated[Interval, Field(description="confidence interval of runner_up_us")] = None
    gain_ci: Annotated[
        tuple[float, float] | None,
        _optional(_gain),
        Field(description="confidence interval of 1 - best / default, round by round; where a tie ships the default too"),
    ] = None
    trials: Annotated[int, Field(ge=0, description="configurations tried")] | None = None
    funnel: Annotated[dict[str, int] | None, _optional(_funnel), Field(description="how many configurations ended at each rung")] = None
    sampler: Text | None = None
    registers: Annotated[int, Field(ge=0, description="a thread")] | None = None
    stack: Annotated[int, Field(ge=0, description="bytes a thread: spilled registers and local arrays")] | None = None
    shared_bytes: Annotated[int, Field(ge=0, description="a block")] | None = None
    clock_mhz: Annotated[Positive, Field(description="of the multiprocessors, median while it was timed")] | None = None
    dirty: Annotated[Text, Field(description="what disturbed the timing all the same")] | None = None
    date: Annotated[str | None, _optional(_date), Field(description="when this entry was tuned, ISO 8601")] = None
    tilelang: Text | None = None
    driver: Text | None = None
    commit: Text | None = None

    @field_validator("verdict")
    @classmethod
    def _against_the_default(cls, verdict: str, others: ValidationInfo) -> str:
        if verdict != "win" and others.data.get("default_us", 1.0) is None:
            raise ValueError("wanted 'win' where there is no default_us")
        return verdict

    @property
    def key(self) -> tuple[str, int, int, str, int]:
        """What an entry is looked up by; unique in a profile."""
        return (self.kernel, self.n, self.C, self.dtype, self.tokens)


class Provenance(Strict):
    """Where, with what and when a profile was tuned."""

    gpu: Annotated[Text, Field(description="device name, or the CPU's model name")]
    arch: Annotated[str, Field(pattern=r"^(cpu|sm_\d+[a-z]?)$", description="'cpu' or a CUDA architecture, 'sm_90a'")]
    sm_count: Annotated[int, Field(ge=1)] | None = None
    power_limit_w: Positive | None = None
    driver: str | None = None
    cuda: str | None = None
    torch: Text
    tilelang: Text
    copy_gbps: Annotated[Positive, Field(description="copy bandwidth measured in the same run")]
    seed: int
    trials: Annotated[int, Field(ge=0)]
    date: Text
    commit: str | None = None
    command: Text


class Profile(Strict):
    """Everything tuned on one kind of device."""

    schema_version: Literal[1]
    provenance: Provenance
    entries: list[Entry] = Field(repr=False)  # hundreds: what a prompt shows of a profile is where it is from

    @model_validator(mode="after")
    def _keys_are_unique(self) -> Profile:
        seen: dict[tuple[str, int, int, str, int], int] = {}
        for i, entry in enumerate(self.entries):
            if entry.key in seen:
                raise ValueError(f"entries[{i}] repeats entries[{seen[entry.key]}], wanted one entry per kernel, n, C, dtype and tokens")
            seen[entry.key] = i
        return self
