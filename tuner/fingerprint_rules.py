"""When another fingerprint is a regression. Pure functions of two fingerprints of one program: the same kernel, problem and configuration.

The same source and the same compiler give the same image, bit for bit: there is no noise, and the tolerances only say which changes are too
small to matter or say nothing of speed. Counts are of text, and a static gate cannot time: it fails what costs in every case we know of
(spills, narrower accesses, more traffic, other matrix instructions, less room on a multiprocessor) and mentions the rest. Who means a
change commits it with ``--update``, where a reviewer sees the numbers move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tuner.cubin import occupancy
from tuner.fingerprint import Fingerprint
from tuner.sass import BULK

#: Share by which bytes read may outgrow bytes written before it is a doubled read. The results of a program are given, so what it stores is
#: the measure of what it loads, also when its loop is unrolled more or less. The kernels run at the memory's speed: 5% more bytes are up to
#: 5% more time, while a few coefficients more are 1% or less; to read the smallest stream tensor again (f beside x, n = 4) is 10% and more.
TRAFFIC = 0.05
#: Share by which the text may grow unmentioned: it stays in the instruction cache (128 KiB, the largest program has a third of that).
CODE = 0.1
#: Bytes of one access, wider than the narrowest.
WIDTHS = (32, 16, 8, 4, 2)
#: Shared memory is given out in units of so many bytes.
SHARED_UNIT = 128

Level = Literal["regressed", "better", "noted"]
_GLOBAL = {"reads of global memory": ("loads", "copies"), "writes to global memory": ("stores",)}
_SHARED = {"reads of shared memory": ("shared_loads",), "writes to shared memory": ("shared_stores",)}


@dataclass(frozen=True)
class Finding:
    """One thing that changed, in words with both numbers."""

    level: Level
    text: str


def compare(was: Fingerprint, now: Fingerprint, arch: str) -> list[Finding]:
    """What changed, regressions first; [] where nothing worth a word did."""
    found = [*_spills(was, now), *_widths(was, now), *_traffic(was, now), *_matrix(was, now), *_room(was, now, arch), *_rest(was, now)]
    order: list[Level] = ["regressed", "better", "noted"]
    return sorted(found, key=lambda f: order.index(f.level))


def _moved(what: str, was: int, now: int, unit: str = "") -> list[Finding]:
    """A number of which more is worse."""
    if was == now:
        return []
    return [Finding("regressed" if now > was else "better", f"{what} {was} -> {now}{unit}")]


def _spills(was: Fingerprint, now: Fingerprint) -> list[Finding]:
    # a spill is written and read again in every round of its loop; no amount of it is free
    found = _moved("stack", was.stack, now.stack, " bytes a thread")
    return found + _moved("local-memory accesses", was.local_loads + was.local_stores, now.local_loads + now.local_stores)


def _sum(f: Fingerprint, fields: tuple[str, ...]) -> dict[str, int]:
    total: dict[str, int] = {}
    for field in fields:
        for width, times in getattr(f, field).items():
            total[width] = total.get(width, 0) + times
    return total


def _bytes(widths: Mapping[str, int], least: int = 0, below: int = 1 << 30) -> int:
    return sum(int(w) * times for w, times in widths.items() if w != BULK and least <= int(w) < below)


def _show(widths: Mapping[str, int]) -> str:
    sized = [f"{widths[w]} of {w} bytes" for w in sorted(widths.keys() - {BULK}, key=int, reverse=True)]
    return ", ".join(sized + ([f"{widths[BULK]} in bulk"] if BULK in widths else [])) or "none"


def _widths(was: Fingerprint, now: Fingerprint) -> list[Finding]:
    """Accesses that became narrower: fewer bytes at a width or above it, more below it. Each byte then takes more instructions and a warp
    asks for fewer bytes at a time; no narrow access is as good, so one is enough.
    """
    found = []
    for what, fields in (_GLOBAL | _SHARED).items():
        old, new = _sum(was, fields), _sum(now, fields)
        text = f"{what}: {_show(old)} -> {_show(new)}"
        if old.get(BULK) != new.get(BULK):
            # what moved to the copy engine, or from it, has no width to compare
            found.append(Finding("noted", text) if BULK in new else Finding("regressed", f"without the copy engine, {text}"))
        elif any(_bytes(new, w) < _bytes(old, w) and _bytes(new, 0, w) > _bytes(old, 0, w) for w in WIDTHS):
            found.append(Finding("regressed", f"narrower {text}"))
        elif any(_bytes(new, w) > _bytes(old, w) and _bytes(new, 0, w) < _bytes(old, 0, w) for w in WIDTHS):
            found.append(Finding("better", f"wider {text}"))
    return found


def _growth(was: int, now: int) -> float:
    return now / was if was else (1.0 if now == 0 else float("inf"))


def _traffic(was: Fingerprint, now: Fingerprint) -> list[Finding]:
    """Reads that outgrew writes, or the reverse; bytes and bulk copies each by themselves."""
    found = _moved("global atomics", was.atomics, now.atomics)
    reads, writes = (tuple(_sum(f, fields) for f in (was, now)) for fields in _GLOBAL.values())
    if reads[0].get(BULK) != reads[1].get(BULK) and 0 in (reads[0].get(BULK, 0), reads[1].get(BULK, 0)):
        return found  # moved to the copy engine, or from it: noted above
    written = _growth(_bytes(writes[0]), _bytes(writes[1]))
    for what, old, new in (
        ("bytes", _bytes(reads[0]), _bytes(reads[1])),
        ("bulk copies", reads[0].get(BULK, 0), reads[1].get(BULK, 0)),
    ):
        read = _growth(old, new)
        text = f"global {what} read in the text {old} -> {new}, bytes written {_bytes(writes[0])} -> {_bytes(writes[1])}"
        if read > (1 + TRAFFIC) * written:
            found.append(Finding("regressed", f"more reads: {text}"))
        elif what == "bytes" and written > (1 + TRAFFIC) * read:
            # in a loop half as long, that is what the end of a doubled read looks like
            found.append(Finding("noted", f"more writes: {text}") if written > 1 + TRAFFIC else Finding("better", f"fewer reads: {text}"))
    return found


def _matrix(was: Fingerprint, now: Fingerprint) -> list[Finding]:
    # wgmma, mma.sync and their shapes differ by factors in rate; which way a change goes only a clock can say
    if set(was.mma) != set(now.mma):
        return [Finding("regressed", f"matrix instructions {_kinds(was)} -> {_kinds(now)}")]
    counts = [Finding("noted", f"{kind} {was.mma[kind]} -> {now.mma[kind]}") for kind in was.mma if was.mma[kind] != now.mma[kind]]
    if sum(was.mma.values()) * now.mma_waits > sum(now.mma.values()) * was.mma_waits:
        of = " of {} -> {}".format(*(sum(f.mma.values()) for f in (was, now)))
        return [Finding("regressed", f"matrix instructions waited for {was.mma_waits} -> {now.mma_waits}{of}"), *counts]
    return counts


def _kinds(f: Fingerprint) -> str:
    return ", ".join(sorted(f.mma)) or "none"


def _room(was: Fingerprint, now: Fingerprint, arch: str) -> list[Finding]:
    """Registers cost nothing until fewer warps fit; shared memory is taken from the L1 cache at once. That more warps fit may be had at
    the price of loads in flight, which registers hold: it is only noted.
    """
    found = []
    old, new = (occupancy(arch, f.registers, f.threads, f.shared) for f in (was, now))
    if old is not None and new is not None and old != new:
        why = f"{was.registers} -> {now.registers} registers, {was.shared} -> {now.shared} bytes of shared memory"
        found.append(Finding("regressed" if new < old else "noted", f"occupancy {old:.1%} -> {new:.1%} ({why}, {now.threads} threads)"))
    units = [-(-f.shared // SHARED_UNIT) for f in (was, now)]
    if units[0] != units[1]:
        found += _moved("shared memory", was.shared, now.shared, " bytes a block")
    if was.registers != now.registers and old == new:
        found.append(Finding("noted", f"registers {was.registers} -> {now.registers}, as many blocks fit"))
    if was.threads != now.threads:
        found.append(Finding("noted", f"threads {was.threads} -> {now.threads}"))
    return found


def _rest(was: Fingerprint, now: Fingerprint) -> list[Finding]:
    found = []
    if abs(_growth(was.code, now.code) - 1) > CODE:
        found.append(Finding("noted", f"code {was.code} -> {now.code} bytes"))
    if was.barriers != now.barriers:
        found.append(Finding("noted", f"barriers {was.barriers} -> {now.barriers}"))
    return found
