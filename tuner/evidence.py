"""What speaks for an entry of a profile, in words: the verdict and how sure it is, what was tried, and how old all that is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from mhc.schema import Entry, Provenance
from tl_kernels.spec import Kernel
from tuner.confirm import MARGIN
from tuner.display import funnel_line, percent
from tuner.hardware import nvidia_smi
from tuner.writer import git_commit


def evidence(entry: Entry) -> Iterator[tuple[str, str]]:
    """(label, text): what speaks for the entry."""
    yield "verdict", verdict_text(entry)
    yield "error", ", ".join(f"{name} {value:.2g}" for name, value in entry.error.items()) + " (relative, against float64)"
    known = [
        (entry.registers, "{} registers a thread"),
        (entry.stack, "{} bytes of stack a thread (spills, local arrays)"),
        (entry.shared_bytes, "{} bytes of shared memory a block"),
    ]
    yield "resources", ", ".join(text.format(value) for value, text in known if value is not None) or "not kept in this entry"
    tried = [f"{entry.trials} tried" if entry.trials is not None else "", f"by {entry.sampler}" if entry.sampler else ""]
    funnel = funnel_line(entry.funnel) if entry.funnel else ""
    yield "search", "; ".join(filter(None, (" ".join(filter(None, tried)), funnel))) or "not kept in this entry"
    clock = [] if entry.clock_mhz is None else [f"multiprocessors at {entry.clock_mhz:.0f} MHz"]
    dirty = [f"DISTURBED: {entry.dirty}"] if entry.dirty else ["not disturbed"] if clock else []
    yield "timing", ", ".join(clock + dirty) or "not kept in this entry"


def verdict_text(entry: Entry) -> str:
    """The verdict in words, and how sure it is."""
    if entry.default_us is None:
        what = "PyTorch serves" if entry.impl == "reference" else "win: the fastest that works ships"
        return f"{what}; the default configuration does not work here"
    gain = 1 - entry.time_us / entry.default_us
    if entry.impl == "reference":
        return f"PyTorch serves: it takes {percent(gain)} less time than the default configuration"
    if entry.gain_ci is None:
        interval, more = None, None
    else:
        low, high = entry.gain_ci
        interval, more = f"{percent(low)} to {percent(high)}", f"{percent(-high)} to {percent(-low)}"
    if entry.verdict == "win":
        sure = f"95% sure: {interval}" if interval else "its interval was not kept, but it was clear of the default's"
        return f"win: it takes {percent(gain)} less time than the default ({sure})"
    if entry.verdict == "tie":
        sure = (
            f"takes {interval} less time than the default (95% sure)"
            if interval
            else "was faster than the default (its interval was not kept)"
        )
        return f"tie: the best other configuration {sure}, not clearly more than the {MARGIN:.0%} that counts; so the default ships"
    return "default: nothing that was tried is faster" + (f"; the best other takes {more} more time (95% sure)" if more else "")


def age(entry: Entry, where: Provenance, kernel: Kernel) -> Iterator[tuple[str, str]]:
    """(label, text): from when and with what the entry is, and what stands here."""
    fresh = entry.source_hash == kernel.source_hash
    yield "kernel", f"source {entry.source_hash}, " + ("as in this checkout" if fresh else f"in this checkout {kernel.source_hash}")
    tilelang, here = entry.tilelang or where.tilelang, _installed("tilelang")
    yield "TileLang", f"{tilelang}, " + ("as here" if tilelang == here else f"here {here}: the times may no longer hold")
    driver, mine = entry.driver or where.driver, _driver()
    if driver:
        yield "driver", driver + (", as here" if mine == driver else f", here {mine}" if mine else "; no GPU here")
    when = f"{entry.date or where.date}{_ago(entry.date or where.date)}"
    commit, now = entry.commit or where.commit, git_commit()
    at = f", commit {commit}" + (f" (here {now})" if now else "") if commit else ""
    yield "date", when + at + ("" if entry.date else "; date and commit are the profile's, this entry may be older")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str | None:
    found = nvidia_smi("driver_version")
    return found[0] if found else None


def _ago(date: str) -> str:
    """`` (12 days ago)``, or nothing for what is no date."""
    try:
        then = datetime.fromisoformat(date.removesuffix("Z"))
    except ValueError:
        return ""
    then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
    days = (datetime.now(timezone.utc) - then).days
    return "" if days < 0 else " (today)" if days == 0 else " (1 day ago)" if days == 1 else f" ({days} days ago)"
