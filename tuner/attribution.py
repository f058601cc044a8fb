"""Why an entry moved: what differs between the two measurements, and whether the clocks alone explain it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tuner.regression import Change, Rule, judge

Verdict = Literal["regressed", "improved", "noise", "clocks", "same"]
#: What an entry's move may be due to; ``unexplained``: beyond its noise, and nothing that is recorded differs.
CAUSES = ("noise", "clocks", "code", "configuration", "toolchain", "unexplained")


@dataclass(frozen=True)
class Origin:
    """What one of the two times was measured with; None where it is not known, and then it explains nothing.

    ``source_hash``: of the kernel's sources. ``program``: of the text that TileLang generated. ``config``: knobs, and ``impl``.
    ``toolchain``: releases by name. ``clock_mhz``: SM clock. ``copy_gbps``: copy bandwidth in the same run. ``dirty``: what disturbed it.
    """

    source_hash: str | None = None
    program: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    toolchain: Mapping[str, str | None] = field(default_factory=dict)
    clock_mhz: float | None = None
    copy_gbps: float | None = None
    dirty: str | None = None


@dataclass(frozen=True)
class Attribution:
    """``causes``: of :data:`CAUSES`, the likeliest first, none where nothing moved; ``words``: a line for each."""

    verdict: Verdict
    causes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def attribute(change: Change, before: Origin, now: Origin, rule: Rule, strict: bool = False) -> Attribution:
    """The verdict and its causes. Noise explains what is within the band, then the clocks, then everything else that differs.

    Clocks: after scaling the time by the larger of the changes of SM clock and copy bandwidth the rule finds nothing more in this
    direction, or only the slower side's timing was disturbed. The verdict is ``clocks`` then; ``strict``: a slowdown stays ``regressed``.
    """
    if change.verdict == "same":
        return Attribution("same")
    others = list(_differences(before, now))
    if change.verdict == "noise":
        beside = [("noise", f"noise: runs of identical code differ by up to {change.band:.1%}")]
        return Attribution("noise", *_columns(beside))
    clocks = _clocks(change, before, now, rule)
    if clocks is not None:
        verdict: Verdict = change.verdict if strict and change.verdict == "regressed" else "clocks"
        return Attribution(verdict, *_columns([("clocks", clocks), *others]))
    nothing = ("unexplained", "unexplained: code, configuration, toolchain and clocks are the same as far as they are known")
    return Attribution(change.verdict, *_columns(others or [nothing]))


def _columns(rows: list[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(cause for cause, _ in rows), tuple(words for _, words in rows)


def _differences(before: Origin, now: Origin) -> Iterator[tuple[str, str]]:
    """(cause, words) for what differs."""
    same_config = dict(before.config) == dict(now.config)
    if same_config and before.program is not None and now.program is not None:
        # the generated text knows better than the sources, of which a comment is a part
        if before.program != now.program:
            yield "code", f"code: the generated program differs ({before.program} -> {now.program})"
    elif _differ(before.source_hash, now.source_hash):
        yield "code", f"code: the kernel's sources differ ({before.source_hash} -> {now.source_hash})"
    if not same_config:
        yield "configuration", f"configuration: {', '.join(_knobs(before.config, now.config))}"
    tools = [
        f"{name} {before.toolchain[name]} -> {now.toolchain[name]}"
        for name in before.toolchain
        if _differ(before.toolchain[name], now.toolchain.get(name))
    ]
    if tools:
        yield "toolchain", f"toolchain: {', '.join(tools)}"


def _differ(a: str | None, b: str | None) -> bool:
    return a is not None and b is not None and a != b


def _knobs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in (*before, *(name for name in now if name not in before)):
        if before.get(name) != now.get(name):
            yield f"{name} {before.get(name)} -> {now.get(name)}"


def _clocks(change: Change, before: Origin, now: Origin, rule: Rule) -> str | None:
    """How the clocks explain the change, or None."""
    slower = change.ratio > 1
    pairs = [("SM clock", "MHz", before.clock_mhz, now.clock_mhz), ("copy bandwidth", "GB/s", before.copy_gbps, now.copy_gbps)]
    scales = [(was / here, f"{name} {was:.0f} -> {here:.0f} {unit}") for name, unit, was, here in pairs if was and here]
    # what would make it move the other way explains nothing
    scales = [(scale, words) for scale, words in scales if (scale > 1) == slower and scale != 1]
    if scales:
        scale, words = (max if slower else min)(scales)
        if judge([change.now_us / scale], [change.before_us], change.band, rule).verdict != change.verdict:
            return f"clocks: {words}"
    disturbed, other = (now.dirty, before.dirty) if slower else (before.dirty, now.dirty)
    if disturbed is not None and other is None:
        return f"clocks: {'this' if slower else 'the earlier'} timing was disturbed: {disturbed}"
    return None
