"""A benchmark result as Markdown and as a bar chart. ``result`` is what tuner.bench writes as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mhc.files import read_text
from tuner.bench_case import PASSES
from tuner.errors import TuneError, one_line

TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
#: Lines of a launch table.
MOST_KERNELS = 30


def markdown(result: dict[str, Any]) -> str:
    """Per shape: the rivals, their notes, the launches of ours, small token counts, and our kernels."""
    graph = result["method"] == "cuda"
    lines = [
        f"# mHC boundaries, identity layer, {result['dtype']}, {result['hardware']['name']}",
        "",
        ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v) + f"; {result['date']}.",
        "",
        f"Command: `{result['command']}`",
        "",
        "Times in us a boundary: median over interleaved rounds (95% confidence interval of the median). Share: time of the floor's bytes "
        "at the copy bandwidth of the same rounds / time. u = T C itemsize. A stack is several boundaries in a row, each with its own "
        "parameters; in a chain the end of one and the beginning of the next are one operator. "
        + (
            "Graph: CUDA-graph replay; eager: calls in a row, launches included. L2 holds other, clean data before every sample."
            if graph
            else "Wall clock."
        ),
    ]
    if not result["complete"]:
        lines += ["", "**Interrupted: not everything was measured.**"]
    if result["missing"]:
        lines += ["", f"Not installed, so not measured: {', '.join(result['missing'])}."]
    for entry in result["shapes"]:
        lines += ["", f"## T x n x C = {entry['T']} x {entry['n']} x {entry['C']}", ""]
        lines += [_shape_line(entry), ""]
        lines += _boundaries(entry, graph)
        lines += ["", *(f"- {_name(row)}: {text}" for row in entry["rows"] for text in [row["note"], *remarks(row)] if text)]
        lines += _launches(entry) + _decode(entry, graph) + _kernels(entry, graph)
    return "\n".join(lines) + "\n"


def _shape_line(entry: dict[str, Any]) -> str:
    units = entry["floor_units"]
    return (
        f"Copy bandwidth {entry['copy_gbps']:.0f} GB/s; u = {entry['unit_bytes'] / 1e6:.3g} MB; floor: forward {units['forward']}u, "
        f"forward + backward {units['forward_backward']}u; {entry['rounds']} rounds."
    )


def _name(row: dict[str, Any]) -> str:
    if row["layers"] == 1:
        return row["label"]
    return f"{row['label']}, {'chain' if row['chained'] else 'stack'} of {row['layers']}"


def _columns(graph: bool) -> list[tuple[str, str, str]]:
    """(pass, kind, title)"""
    kinds = [("graph", "graph"), ("eager", "eager")] if graph else [("eager", "wall clock")]
    return [(p, kind, f"{TITLES[p]}, {text}") for kind, text in kinds for p in PASSES]


def _boundaries(entry: dict[str, Any], graph: bool) -> list[str]:
    columns, floor = _columns(graph), entry["floor_us"]
    head = ["implementation", *(c for _, kind, title in columns for c in ((title, "share") if kind == _main(graph) else (title,)))]
    extra = ["eager / graph", "peak MiB", "launches (PyTorch's)"] if graph else []
    rows = [["floor", *(c for p, kind, _ in columns for c in ((f"{floor[p]:.1f}", "100%") if kind == _main(graph) else ("",)))]]
    rows[0] += [""] * len(extra)
    for row in entry["rows"]:
        cells = [_name(row)]
        for p, kind, _ in columns:
            time = row["times"].get(f"{p}_{kind}")
            cells.append(_interval(time) if time else "-")
            if kind == _main(graph):
                cells.append(share_text(time["share"]) if time else "-")
        if graph:
            both = [row["times"].get(f"forward_backward_{kind}") for kind in ("eager", "graph")]
            cells.append(f"{both[0]['us'] / both[1]['us']:.2f}" if both[0] and both[1] else "-")
            cells.append("-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}")
            cells.append(_launch_cell(row))
        rows.append(cells)
    return _table([*head, *extra], rows)


def _main(graph: bool) -> str:
    return "graph" if graph else "eager"


def _launch_cell(row: dict[str, Any]) -> str:
    """Forward and forward + backward of a boundary, in brackets PyTorch's own kernels among them."""
    counts = row.get("launches") or {}
    cells = []
    for p in PASSES:
        found = counts.get(p)
        cells.append(f"{_per(found['launches'], row)} ({_per(found['torch_launches'], row)})" if found else "-")
    return " / ".join(cells)


def _per(count: int, row: dict[str, Any]) -> str:
    return f"{count / row['layers']:.3g}"


def _interval(time: dict[str, Any]) -> str:
    return f"{time['us']:.1f} ({time['lo']:.1f}..{time['hi']:.1f})"


def share_text(share: float) -> str:
    """``76%``, ``6.4%``."""
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def remarks(row: dict[str, Any], only_bad: bool = False) -> list[str]:
    """How near a row's answer is to float64, and what failed. ``only_bad``: nothing of an answer that agrees."""
    found = []
    if row["errors"] and not (only_bad and row["agrees"]):
        worst = max(row["errors"], key=row["errors"].__getitem__)
        verdict = "agrees with" if row["agrees"] else "DIFFERS from"
        found.append(f"{verdict} float64; largest relative error {row['errors'][worst]:.1e} in {worst}")
    return found + [f"failed: {e}" for e in row["failures"]]


def _launches(entry: dict[str, Any]) -> list[str]:
    """Ours by kernel: what one forward + backward launches."""
    lines: list[str] = []
    for row in entry["rows"]:
        found = (row.get("launches") or {}).get("forward_backward")
        if row["rival"] != "ours" or not found:
            continue
        lines += ["", f"### Launches of {_name(row)}, forward + backward", ""]
        lines.append(
            f"{found['launches']} launches, {found['us']:.0f} us; PyTorch's own {found['torch_launches']}, {found['torch_us']:.1f} us. "
            "By the profiler, caches warm."
        )
        kernels = found["kernels"][:MOST_KERNELS]
        cells = [[f"`{k['name']}`", str(k["launches"]), f"{k['us']:.1f}", "PyTorch" if k["torch"] else ""] for k in kernels]
        lines += ["", *_table(["kernel", "launches", "us", "whose"], cells)]
    return lines


def by_name(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of small token counts, by implementation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["label"] + (", chained" if row["chained"] else ""), []).append(row)
    return found


def small_tokens(rows: Sequence[dict[str, Any]], graph: bool, nothing: str = "-") -> tuple[list[str], list[list[str]], list[str]]:
    """Head and lines of a table, us of a forward by implementation and T; and what is wrong with its rows. ``nothing``: for no time."""
    tokens = sorted({row["T"] for row in rows})
    kinds = ("graph", "eager") if graph else ("eager",)
    lines, wrong = [], []
    for name, mine in by_name(rows).items():
        by_T = {row["T"]: row for row in mine}
        cells = [name]
        for T in tokens:
            times = by_T[T]["times"] if T in by_T else {}
            cells.append(" / ".join(f"{times[k]['us']:.1f}" if (k := f"forward_{kind}") in times else nothing for kind in kinds))
        host: dict[str, float] = next((row["host_us"] for row in mine if row.get("host_us")), {})
        cells.append(" / ".join(f"{host[k]:.0f}" if k in host else nothing for k in ("forward", "record", "forward_backward")))
        lines.append(cells)
        at: dict[str, list[str]] = {}
        for row in mine:
            for text in remarks(row, only_bad=True):
                at.setdefault(text, []).append(str(row["T"]))
        wrong += [f"{name}, T = {', '.join(every)}: {text}" for text, every in at.items()]
    host_T = next((f", T = {row['T']}" for row in rows if row.get("host_us")), "")
    return ["implementation", *(f"T = {T}" for T in tokens), f"host{host_T}"], lines, wrong


def _decode(entry: dict[str, Any], graph: bool) -> list[str]:
    if not entry["decode"]:
        return []
    head, rows, wrong = small_tokens(entry["decode"], graph)
    depth = max(row["layers"] for row in entry["decode"])
    how = "graph replay / eager" if graph else "wall clock"
    lines = ["", f"### Small token counts: forward, us a boundary in a stack of {depth}, {how}", "", *_table(head, rows)]
    lines += ["", "Host: us of Python a boundary, nothing waited for: forward without autograd / with / forward + backward."]
    return lines + (["", *(f"- {text}" for text in wrong)] if wrong else [])


def _kernels(entry: dict[str, Any], graph: bool) -> list[str]:
    if not entry["kernels"]:
        return []
    head = ["kernel", "program", "MB", "us", "GB/s", "of copy"]
    if graph:
        head += ["registers", "stack B", "shared KiB", "threads", "blocks/SM", "occupancy"]
    rows = []
    for k in entry["kernels"]:
        program = f"{k.get('impl', '')}, {k.get('origin', k['program'])}" if k["program"] == "profile" else k["program"]
        if k["program"] == "default" and k.get("impl") == "reference":  # a default that PyTorch serves
            program = "PyTorch"
        cells = [k["kernel"], program, f"{k['bytes'] / 1e6:.2f}"]
        if k["failure"]:
            rows.append([*cells, f"failed: {k['failure']}", *[""] * (len(head) - 4)])
            continue
        cells += [_interval(k), f"{k['gbps']:.0f}", share_text(k["share"])]
        if graph:
            shared, filled = k.get("shared"), k.get("occupancy")
            cells += [str(k.get(name, "-")) for name in ("registers", "stack")]
            cells += ["-" if shared is None else f"{shared / 1024:.3g}", str(k.get("threads", "-")), str(k.get("blocks_per_sm", "-"))]
            cells.append("-" if filled is None else f"{filled:.0%}")
        rows.append(cells)
    how = "several launches on inputs of their own in one CUDA graph" if graph else "wall clock"
    return ["", f"### Our kernels ({how})", "", *_table(head, rows)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(head) - 1))}|", *(f"| {' | '.join(r)} |" for r in safe)]


def read_result(path: Path) -> dict[str, Any]:
    """A bench.json. Raises :class:`TuneError` for a file that is none."""
    try:
        result = json.loads(read_text(path, 64 << 20))
    except OSError as error:
        raise TuneError(f"--readme {path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise TuneError(f"--readme {path}: is no JSON: {one_line(error)}") from None
    if not isinstance(result, dict) or not result.get("shapes"):
        raise TuneError(f"--readme {path}: holds no shapes, wanted a bench.json of mhc-tune bench")
    return result


def readme_table(result: dict[str, Any]) -> str:
    """A small table for a README: the first shape, one line an implementation, ours in bold."""
    entry, kind = result["shapes"][0], _main(result["method"] == "cuda")
    floor = entry["floor_us"]
    first = [f"floor: bytes that must move, at the copy bandwidth of the run ({entry['copy_gbps']:.0f} GB/s)"]
    rows = [first + [c for p in PASSES for c in (f"{floor[p]:.0f}", "100%")] + [""]]
    for row in entry["rows"]:
        times = [row["times"].get(f"{p}_{kind}") for p in PASSES]
        if not any(times):
            continue
        bold = "**" if row["rival"] == "ours" else ""
        cells = [f"{bold}{_name(row)}{bold}"]
        cells += [c for t in times for c in ((f"{bold}{t['us']:.0f}{bold}", share_text(t["share"])) if t else ("-", "-"))]
        rows.append([*cells, "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"])
    head = [f"T x n x C = {entry['T']} x {entry['n']} x {entry['C']}"]
    for p in PASSES:
        head += [f"{TITLES[p]}, us", "of the floor's speed"]
    return "\n".join(_table([*head, "peak MiB"], rows)) + "\n"


def chart(result: dict[str, Any], path: Path) -> None:
    """A row of bars a shape: every implementation that ran, fastest method of the run (graph replay on CUDA), the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind = _main(result["method"] == "cuda")
    how = "CUDA-graph replay" if kind == "graph" else "wall clock"
    entries = result["shapes"]
    bars = max((len(e["rows"]) for e in entries), default=1)
    figure, grid = plt.subplots(
        len(entries), 2, figsize=(11, (1.4 + 0.34 * bars) * len(entries) + 0.6), layout="constrained", squeeze=False
    )
    for axes, entry in zip(grid, entries, strict=True):
        for axis, p in zip(axes, PASSES, strict=True):
            _bars(axis, entry, p, kind)
            axis.set_xlabel(f"us a boundary, median, {how}")
            shape = f"{entry['T']} x {entry['n']} x {entry['C']}"
            floor = f"dashed: floor, {entry['floor_us'][p]:.0f} us ({entry['floor_units'][p]}u, copy {entry['copy_gbps']:.0f} GB/s)"
            axis.set_title(f"{TITLES[p]}, {shape}\n{floor}", fontsize=10)
    figure.suptitle(f"mHC boundaries (T x n x C), identity layer, {result['dtype']}\n{result['hardware']['name']}", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, entry: dict[str, Any], p: str, kind: str) -> None:
    rows = [(r, r["times"][f"{p}_{kind}"]) for r in entry["rows"] if f"{p}_{kind}" in r["times"]]
    for place, (row, time) in enumerate(rows):
        spread = [[time["us"] - time["lo"]], [time["hi"] - time["us"]]]
        axis.barh(place, time["us"], xerr=spread, color="#1f5fbf" if row["rival"] == "ours" else "#b0b7c3", capsize=3)
        axis.annotate(f"{time['us']:.0f}", (time["hi"], place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.axvline(entry["floor_us"][p], color="#c0392b", linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(rows)), [_name(r) for r, _ in rows])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
