"""Draw the losses.json of train_lm.py again: ``python examples/plot_losses.py FOLDER/losses.json [PICTURE.png]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOOK = {
    "plain": ("plain residual", "#555555"),
    "hc": ("HC, unconstrained", "#d1691e"),
    "mhc": ("mHC, this project", "#1f5fbf"),
}


def smooth(values: list[float]) -> list[float]:
    """Mean over a window centred on each step, 5% of the run wide and narrower at its ends."""
    reach = len(values) // 40
    windows = (values[max(0, k - r) : k + r + 1] for k in range(len(values)) for r in (min(reach, k, len(values) - 1 - k),))
    return [sum(w) / len(w) for w in windows]


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss of every run, its distance to the plain residual's where there is one, and the gradient norm, over the same steps.

    ``result``: what train_lm.py writes as JSON.
    """
    runs = result["runs"]
    plain = next((run["loss"] for run in runs if run["residual"] == "plain"), None)
    compared = plain is not None and len(runs) > 1
    ratios = (3, 1, 1) if compared else (3, 1)
    figure, panels = plt.subplots(
        len(ratios), 1, figsize=(8, 2 + 1.6 * sum(ratios)), sharex=True, height_ratios=ratios, layout="constrained"
    )
    top, bottom = panels[0], panels[-1]
    for run in runs:
        label, color = LOOK[run["residual"]]
        steps = range(1, len(run["loss"]) + 1)
        val = f", validation {run['val'][-1][1]:.3f}" if run["val"] else ""
        top.plot(steps, run["loss"], color=color, alpha=0.2, linewidth=0.8)
        # the last windows are too narrow to smooth: the line stops before them
        whole = len(steps) - len(steps) // 40
        text = f"{label}{val}, {run['median_step_ms']:.1f} ms/step"
        top.plot(steps[:whole], smooth(run["loss"])[:whole], color=color, linewidth=1.8, label=text)
        if run["val"]:
            top.plot(*zip(*run["val"], strict=True), linestyle="none", marker="o", markersize=4, markerfacecolor="white", color=color)
        if compared:
            # the same batches in the same order: what is left after the subtraction is the residual connection's doing
            gap = [mine - theirs for mine, theirs in zip(run["loss"], plain, strict=False)]
            panels[1].plot(steps[: len(gap)], gap, color=color, alpha=0.2, linewidth=0.8)
            panels[1].plot(steps[: len(gap)][:whole], smooth(gap)[:whole], color=color, linewidth=1.6)
        bottom.plot(steps, run["grad_norm"], color=color, linewidth=1.0)
    options = result["options"]
    shape = f"{options['layers']} layers, C = {options['dim']}, n = {options['n']}, {options['batch']} x {options['seq']} bytes a step"
    where = f"{result['hardware']}, {result['stream_dtype']} streams"
    top.set_title(f"Byte-level GPT on Python's standard library\n{where}, {shape}", fontsize=10)
    top.set_ylabel("cross-entropy (nats per byte)")
    top.legend(title="line: training, smoothed (raw: faint); circles: validation", title_fontsize=8, fontsize=9, frameon=False)
    if compared:
        panels[1].set_ylabel("loss minus plain\n(nats per byte)")
    bottom.set_ylabel("gradient norm\nbefore clipping")
    bottom.set_yscale("log")
    bottom.set_xlabel("step")
    for axis in panels:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> int:
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(argv[0])
    target = Path(argv[1]) if len(argv) > 1 else source.with_suffix(".png")
    plot(json.loads(source.read_text()), target)
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
