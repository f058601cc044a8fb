"""A benchmark result as a Markdown table and as a bar chart. ``result`` is what tuner.bench writes as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PASSES = ("forward", "forward_backward")
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}


def markdown(result: dict[str, Any]) -> str:
    """Boundary table, notes, and the table of the single kernels."""
    case, graph = result["case"], result["method"] == "cuda"
    shape = f"{case['T']} x {case['n']} x {case['C']}, {case['dtype']}"
    lines = [
        f"# One mHC boundary, identity layer, {shape}",
        "",
        f"{result['hardware']['name']}; copy bandwidth in the same run {result['copy_gbps']:.0f} GB/s; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
        + f"; {result['date']}.",
        "",
        f"Command: `{result['command']}`",
        "",
        "Times in us: median of "
        + f"{result['rounds']} interleaved rounds (95% confidence interval of the median). Share: time of the floor's "
        "bytes at copy bandwidth / time. "
        + f"Floor: forward {case['floor_units']['forward']}u, forward + backward {case['floor_units']['forward_backward']}u, "
        f"u = T C itemsize = {case['unit_bytes'] / 1e6:.3g} MB.",
        "",
    ]
    kinds = [("graph", "graph replay"), ("eager", "eager")] if graph else [("eager", "wall clock")]
    columns = [(p, kind, f"{TITLES[p]}, {text}") for kind, text in kinds for p in PASSES]
    lines += _table(["implementation", *(c for p, k, t in columns for c in (t, "share")), "peak MiB"], _boundary_rows(result, columns))
    lines.append("")
    for row in result["rows"]:
        lines += [f"- {row['label']}: {text}" for text in _notes(row)]
    if result["kernels"]:
        warmth = "one CUDA graph per kernel, inputs not in cache" if graph else "wall clock"
        lines += ["", f"## Our kernels ({warmth})", ""]
        lines += _table(["kernel", "MB", "us", "95% interval", "GB/s", "share of copy", "served by"], _kernel_rows(result))
    return "\n".join(lines) + "\n"


def _boundary_rows(result: dict[str, Any], columns: list[tuple[str, str, str]]) -> list[list[str]]:
    floor = result["case"]["floor_us"]
    rows = [["floor", *(c for p, _, _ in columns for c in (f"{floor[p]:.1f}", "100%")), ""]]
    for row in result["rows"]:
        cells = [row["label"]]
        for p, kind, _ in columns:
            time = row["times"].get(f"{p}_{kind}")
            cells += [f"{time['us']:.1f} ({time['lo']:.1f}..{time['hi']:.1f})", _percent(time["share"])] if time else ["-", "-"]
        rows.append([*cells, "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"])
    return rows


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def _notes(row: dict[str, Any]) -> list[str]:
    notes = [row["note"]] if row["note"] else []
    if row["errors"]:
        worst = max(row["errors"], key=row["errors"].__getitem__)
        verdict = "agrees with" if row["agrees"] else "DIFFERS from"
        notes.append(f"{verdict} float64; largest relative error {row['errors'][worst]:.1e} in {worst}")
    return notes + [f"failed: {e}" for e in row["failures"]]


def _kernel_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for k in result["kernels"]:
        if k["failure"]:
            rows.append([k["kernel"], f"{k['bytes'] / 1e6:.2f}", f"failed: {k['failure']}", "", "", "", ""])
            continue
        rows.append(
            [
                k["kernel"],
                f"{k['bytes'] / 1e6:.2f}",
                f"{k['us']:.1f}",
                f"{k['lo']:.1f}..{k['hi']:.1f}",
                f"{k['gbps']:.0f}",
                _percent(k["share"]),
                f"{k['impl']}, {k['origin']}",
            ]
        )
    return rows


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(head) - 1))}|", *(f"| {' | '.join(r)} |" for r in safe)]


def chart(result: dict[str, Any], path: Path) -> None:
    """Bars of every implementation that ran, fastest method of the run (graph replay on CUDA), with the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind = "graph" if result["method"] == "cuda" else "eager"
    how = "CUDA-graph replay" if kind == "graph" else "wall clock"
    case = result["case"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, p in zip(axes, PASSES, strict=True):
        rows = [(r, r["times"][f"{p}_{kind}"]) for r in result["rows"] if f"{p}_{kind}" in r["times"]]
        for place, (row, time) in enumerate(rows):
            spread = [[time["us"] - time["lo"]], [time["hi"] - time["us"]]]
            axis.barh(place, time["us"], xerr=spread, color="#1f5fbf" if row["rival"] == "ours" else "#b0b7c3", capsize=3)
            axis.annotate(f"{time['us']:.0f}", (time["hi"], place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        floor = case["floor_us"][p]
        axis.axvline(
            floor, color="#c0392b", linestyle="--", linewidth=1.2, label=f"floor {floor:.0f} us ({case['floor_units'][p]}u at copy speed)"
        )
        axis.set_yticks(range(len(rows)), [r["label"] for r, _ in rows])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel(f"us, median, {how}")
        axis.set_title(TITLES[p], fontsize=10)
        axis.legend(fontsize=8, frameon=False, loc="upper right")  # where our short bars leave room
        axis.spines[["top", "right"]].set_visible(False)
    shape = f"T x n x C = {case['T']} x {case['n']} x {case['C']}, {case['dtype']}"
    figure.suptitle(
        f"One mHC boundary, identity layer, {shape}\n{result['hardware']['name']}, copy {result['copy_gbps']:.0f} GB/s", fontsize=11
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
