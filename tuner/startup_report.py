"""The figures of starts (tuner/startup.py), for its Markdown and for the page of ``mhc-tune report``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.timing import median

FIGURES = ("torch imported", "ready", "first step ended", "beyond torch", "second step")


def markdown(result: dict[str, Any]) -> str:
    """The table, one line a way to start."""
    missing = unfinished(result)
    on_cpu = result["hardware"].get("arch") == "cpu" and any(row["setup"] == "bundle" for row in result["rows"])
    served = "Cold and cached every kernel is a program; with a bundle PyTorch serves what it has not. " if on_cpu else ""
    lines = [
        f"# From the start of a script to the end of its first step, {result['hardware']['name']}",
        "",
        ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + f"; {result['date']}.",
        "",
        f"Command: `{result['command']}`",
        "",
        f"One boundary, identity layer, forward + backward, T x n x C = {result['T']} x {result['n']} x {result['C']}, {result['dtype']}. "
        "Seconds since the process was started, medians (least to most). Cold: every compiler's cache is empty; cached: filled by the cold "
        "start; warm_up: empty caches, and mhc.warm_up first, so that ready counts compiling; "
        "bundle: empty caches, programs compiled elsewhere, no compiler on PATH. "
        f"{served}Beyond torch: first step less the import of torch.",
        "",
        *([f"**{missing}.**", ""] if missing else []),
        f"| implementation | start | {' | '.join(FIGURES)} | starts |",
        f"| --- | --- |{' ---: |' * (len(FIGURES) + 1)}",
    ]
    for row in result["rows"]:
        texts = [row["label"], row["setup"], *cells(row["samples"]), str(len(row["samples"]))]
        lines.append(f"| {' | '.join(texts)} |")
    lines += [f"\n- {row['label']}, {row['setup']}: {row['failure']}" for row in result["rows"] if row["failure"]]
    return "\n".join(lines) + "\n"


def unfinished(result: Mapping[str, Any]) -> str | None:
    """What a run that ended early lacks, a sentence; of an older file, which does not say so, whether a rival of its command has no row."""
    if result.get("complete") is not None:
        return None if result["complete"] else "Interrupted: not everything was measured"
    asked = re.search(r"--rivals[ =]([\w,-]+)", result["command"])
    there = {row["rival"] for row in result["rows"]}
    missing = [name for name in asked[1].split(",") if name.replace("-", "_") not in there] if asked else []
    return f"Not all of what the command asked for: no start of {', '.join(missing)}" if missing else None


def cells(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """The texts under :data:`FIGURES`: seconds but for the last, medians of the starts, of the first step the range too."""
    if not samples:
        return ["-"] * len(FIGURES)
    first = [s["first"] for s in samples]
    return [
        f"{median([s['torch'] for s in samples]):.2f}",
        f"{median([s['ready'] for s in samples]):.2f}",
        f"{median(first):.2f} ({min(first):.2f} to {max(first):.2f})",
        f"{median([s['first'] - s['torch'] for s in samples]):.2f}",
        f"{1e3 * median([s['second'] - s['first'] for s in samples]):.1f} ms",
    ]
