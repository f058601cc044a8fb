"""The result of step_time.py: its figures from the samples, as a page and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuner.timing import median, median_interval

FILES = ("step_time.json", "step_time.md", "step_time.png")
#: Most extra time a step may take: the paper's figure at n = 4, as a share.
TARGET = 0.067
MODES = {"eager": "eager", "compile": "torch.compile"}


def _figure(samples: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(samples)
    return {"median": median(samples), "lo": low, "hi": high}


def summarize(result: dict[str, Any], rows: list[dict[str, Any]], copies: Sequence[float]) -> dict[str, Any]:
    """``result`` with ``rows``, their medians, and what each takes longer than the plain one of the same mode, round by round."""
    plain = {row["mode"]: row["samples_ms"] for row in rows if row["variant"] == "plain"}
    for row in rows:
        mine, theirs = row["samples_ms"], plain[row["mode"]]
        row["ms"] = _figure(mine) if mine else None
        compared = mine and theirs and row["variant"] != "plain"
        row["extra"] = _figure([a / b - 1 for a, b in zip(mine, theirs, strict=True)]) if compared else None
    return result | {"target": TARGET, "rounds": len(copies), "copy_gbps": median(copies), "rows": rows}


def name(result: dict[str, Any], row: dict[str, Any]) -> str:
    """How a row is called; on CUDA the formulas' connections are compiled in either mode."""
    if row["variant"] == "formulas" and row["mode"] == "eager" and result["hardware"]["arch"] != "cpu":
        return "formulas, eager layers, compiled connections"
    return f"{row['variant']}, {MODES[row['mode']]}"


def markdown(result: dict[str, Any]) -> str:
    """The page: what was timed where, and the table."""
    s, count, hardware, state = result["shape"], result["parameters"], result["hardware"], result["state"]
    where = [f"driver {hardware['driver']}" if hardware["driver"] else "", *(f"{k} {v}" for k, v in result["versions"].items() if v)]
    held = ", ".join(state["reasons"]) or "not held down"
    clock = "" if state["sm_mhz"] is None else f"; SM clock after them {state['sm_mhz']:.0f} MHz ({held})"
    lines = [
        f"# A training step with and without mHC, {hardware['name']}",
        "",
        f"{', '.join(filter(None, where))}; {result['date']}.",
        "",
        f"Command: `{result['command']}`",
        "",
        f"{s['layers']} transformer blocks: C = {s['dim']}, {s['heads']} heads of {s['head_dim']}, SwiGLU {s['ffn']} wide, "
        f"{count['layers'] / 1e6:.4g} M parameters in bfloat16. mHC: n = {s['n']}, two hyper-connections a block, "
        f"{result['hyper_connections']} in all, {count['connections'] / 1e6:.3g} M parameters in float32. "
        f"{s['batch']} x {s['seq']} = {result['tokens']} tokens a step.",
        "",
        "A step is forward and backward. Left out, for every row: the optimizer, embedding, output head, routing and communication. The "
        "same weights and inputs for all, one step of each a round. Median (95% confidence interval of the median); extra: against the "
        "plain step of the same mode and round. Peak: on top of weights and inputs. TFLOP/s: of the layers' matrix products. "
        f"{result['rounds']} rounds; copy bandwidth in them {result['copy_gbps']:.0f} GB/s{clock}.",
        "",
        "| | ms a step | extra | peak MiB | TFLOP/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = [name(result, row)]
        cells.append(f"failed: {row['failure']}".replace("|", "\\|") if row["failure"] else _interval(row["ms"]))
        cells.append(_percent(row["extra"]) if row["extra"] else "")
        cells.append("-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}")
        cells.append(f"{result['flops'] / row['ms']['median'] / 1e9:.3g}" if row["ms"] else "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Target: at most {TARGET:.1%} extra (arXiv 2512.24880 at n = 4, in its own training system)."]
    checked = [row["errors"] for row in result["rows"] if row["errors"]]
    if checked:
        worst = {key: max(errors[key] for errors in checked) for key in result["tolerance"]}
        lines += ["", f"Against the formulas, uncompiled: {', '.join(f'{key} differs by at most {v:.1e}' for key, v in worst.items())}."]
    if not result["complete"]:
        lines += ["", "**Interrupted: fewer rounds than asked for.**"]
    return "\n".join(lines) + "\n"


def _interval(ms: dict[str, float]) -> str:
    return f"{ms['median']:.2f} ({ms['lo']:.2f}..{ms['hi']:.2f})"


def _percent(extra: dict[str, float]) -> str:
    return f"{extra['median']:+.1%} ({extra['lo']:+.1%}..{extra['hi']:+.1%})"


def chart(result: dict[str, Any], path: Path) -> None:
    """A bar for what each takes longer than plain, and the target as a line. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["extra"]]
    figure, axis = plt.subplots(figsize=(9, 1.9 + 0.45 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        low, middle, high = (100 * row["extra"][key] for key in ("lo", "median", "hi"))
        color = "#1f5fbf" if row["variant"] == "mhc" else "#b0b7c3"
        axis.barh(place, middle, xerr=[[middle - low], [high - middle]], color=color, capsize=3)
        text = f"{middle:+.1f}%, {row['ms']['median']:.1f} ms"
        axis.annotate(text, (max(high, 0), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axis.axvline(100 * TARGET, color="#c0392b", linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(rows)), [name(result, row).replace(", ", "\n", 1) for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel(f"extra time of a step against plain, % (dashed: target, {TARGET:.1%})")
    axis.spines[["top", "right"]].set_visible(False)
    s = result["shape"]
    shape = f"{s['layers']} blocks, C = {s['dim']}, n = {s['n']}, {result['tokens']} tokens, bfloat16, forward + backward"
    axis.set_title(f"Training step with mHC: {shape}\n{result['hardware']['name']}", fontsize=10)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(beside, dpi=130, format="png")
        os.replace(beside, path)
    finally:
        plt.close(figure)
        beside.unlink(missing_ok=True)
