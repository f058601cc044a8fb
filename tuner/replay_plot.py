"""The chart of a replay: how many seeds were near the best after which share of the space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: The share of a space at most that the default sampler may need (issue 4); a line in the chart.
QUARTER = 0.25
COLORS = {"tpe": "#1f5fbf", "gp": "#d9822b", "random": "#8a929e", "brute-force": "#2e8b57"}
STARTS = {"cold": "without hand-written starting points", "seeded": "with the kernel's starting points, as shipped"}


def steps(runs: list[dict[str, Any]], size: int) -> tuple[list[float], list[float]]:
    """Corners of the line: share of the space measured, share of the seeds that were near the best by then."""
    there = sorted(run["trials"] for run in runs if run["trials"] is not None)
    x, y = [0.0], [0.0]
    for i, trials in enumerate(there, 1):
        x.append(trials / size)
        y.append(i / len(runs))
    return [*x, 1.0], [*y, y[-1]]


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel a study and start; one line a sampler; a quarter of the space as a vertical line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    studies = result["studies"]
    starts = [start for start in STARTS if any(row["start"] == start for study in studies for row in study["rows"])]
    figure, grid = plt.subplots(
        len(starts), len(studies), figsize=(5.6 * len(studies), 3.6 * len(starts) + 0.7), layout="constrained", squeeze=False
    )
    for axes, start in zip(grid, starts, strict=True):
        for axis, study in zip(axes, studies, strict=True):
            rows = [row for row in study["rows"] if row["start"] == start]
            if rows:
                _panel(axis, study, rows, start)
            else:
                axis.set_visible(False)
    seeds = max((row["seeds"] for study in studies for row in study["rows"]), default=0)
    title = f"Share of {seeds} seeds that measured a configuration within {result['within']:.0%} of the best"
    figure.suptitle(f"{title}\n{result['hardware']}, {result['batch']} under way at a time", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, study: dict[str, Any], rows: list[dict[str, Any]], start: str) -> None:
    for i, row in enumerate(rows):
        median = "never" if row["median_trials"] is None else f"median {row['median_trials']}"
        label = f"{row['sampler']} ({median})"
        # thinner and thinner, so that lines on top of each other are all seen
        axis.step(
            *steps(row["runs"], study["measured"]), where="post", label=label, color=COLORS.get(row["sampler"]), linewidth=3.4 - 0.7 * i
        )
    axis.axvline(QUARTER, color="#c0392b", linestyle="--", linewidth=1)
    axis.annotate("a quarter", (QUARTER, 0.02), xytext=(4, 0), textcoords="offset points", color="#c0392b", fontsize=8)
    axis.set_title(f"{study['label']}\n{STARTS[start]}", fontsize=10)
    axis.set_xlabel(f"share of the space measured ({study['measured']} configurations, {study['near_best']} near the best)", fontsize=9)
    axis.set_ylabel("share of seeds", fontsize=9)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.legend(loc="lower right", fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
