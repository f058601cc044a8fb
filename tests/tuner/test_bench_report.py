"""tuner/bench_report.py: tables of a GPU result made by hand, the README's table, the chart."""

from __future__ import annotations

import copy
import json

import pytest

from tuner.bench_report import chart, markdown, read_result, readme_table
from tuner.errors import TuneError


def times(us: float, share: float) -> dict:
    return {"us": us, "lo": us - 1, "hi": us + 1, "samples": 30, "share": share}


def row(rival: str, label: str, us: float, **change) -> dict:
    found = {
        "rival": rival,
        "label": label,
        "note": "",
        "T": 8192,
        "layers": 1,
        "chained": False,
        "agrees": True,
        "errors": {"y": 2e-3, "x": 3e-3},
        "times": {f"{p}_{k}": times(us * (3 if "b" in p else 1), 0.5) for p in ("forward", "forward_backward") for k in ("graph", "eager")},
        "peak_mib": 500.0,
        "failures": [],
    }
    return {**found, **change}


KERNEL = {"kernel": "pre", "program": "profile", "impl": "tilelang", "origin": "exact", "bytes": 2_000_000, "us": 70.0, "lo": 69.0}
KERNEL |= {"hi": 71.0, "gbps": 3000.0, "share": 0.99, "failure": None, "registers": 32, "stack": 0, "shared": 2048, "threads": 80}
KERNEL |= {"blocks_per_sm": 10, "occupancy": 0.47}
LAUNCHES = {"launches": 12, "us": 1000.0, "torch_launches": 2, "torch_us": 44.4}
LAUNCHES |= {
    "kernels": [{"name": "a|b", "launches": 10, "us": 955.6, "torch": False}, {"name": "add", "launches": 2, "us": 44.4, "torch": True}]
}
RESULT = {
    "complete": True,
    "hardware": {"name": "NVIDIA H100 80GB HBM3"},
    "versions": {"torch": "2.11.0", "liger-kernel": None},
    "date": "2026-11-22 00:00 UTC",
    "command": "mhc-tune bench",
    "dtype": "bfloat16",
    "method": "cuda",
    "missing": {},
    "shapes": [
        {
            "T": 8192,
            "n": 4,
            "C": 2560,
            "copy_gbps": 3000.0,
            "unit_bytes": 41_943_040,
            "floor_units": {"forward": 10, "forward_backward": 33},
            "floor_us": {"forward": 139.8, "forward_backward": 461.4},
            "rounds": 30,
            "rows": [
                row("ours", "mhc", 200.0, launches={"forward": {**LAUNCHES, "launches": 4}, "forward_backward": LAUNCHES}),
                row("ours", "mhc", 180.0, layers=4, chained=True, launches={"forward": None}),
                row("liger", "Liger", 900.0, note="rows first", agrees=False),
                row("flashinfer", "FlashInfer", 250.0, failures=["RuntimeError: boom"], times={"forward_graph": times(250.0, 0.56)}),
            ],
            "decode": [
                row("ours", "mhc", 9.0, T=1, layers=8, times={"forward_graph": times(9.0, 0), "forward_eager": times(40.0, 0)}),
                row("ours", "mhc", 9.0, T=16, layers=8, host_us={"forward": 41.0, "record": 55.0, "forward_backward": 120.0}),
                row("liger", "Liger", 9.0, T=1, layers=8, times={}, failures=["ValueError: no"], errors={}, agrees=False),
            ],
            "kernels": [KERNEL, {"kernel": "project", "program": "default", "bytes": 1, "failure": "RuntimeError: x"}],
        }
    ],
}


def cells(text: str, first: str) -> list[str]:
    """The first line of the text's tables that begins with ``first``."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_of_the_boundary_table():
    assert cells(markdown(RESULT), "mhc") == [
        "mhc",
        "200.0 (199.0..201.0)",
        "50%",
        "600.0 (599.0..601.0)",
        "50%",
        "200.0 (199.0..201.0)",
        "600.0 (599.0..601.0)",
        "1.00",
        "500",
        "4 (2) / 12 (2)",
    ]


def test_what_did_not_run_is_a_dash_and_says_why():
    text = markdown(RESULT)
    assert cells(text, "FlashInfer")[1:5] == ["250.0 (249.0..251.0)", "56%", "-", "-"]
    assert "- FlashInfer: failed: RuntimeError: boom" in text
    assert "- Liger: rows first" in text
    assert "- Liger: DIFFERS from float64; largest relative error 3.0e-03 in x" in text
    assert "- mhc, chain of 4: agrees with float64" in text


def test_floor_stands_first_and_units_are_said():
    text = markdown(RESULT)
    assert cells(text, "floor")[1:5] == ["139.8", "100%", "461.4", "100%"]
    assert "forward 10u, forward + backward 33u" in text


def test_launches_of_ours_by_kernel():
    text = markdown(RESULT)
    assert "12 launches, 1000 us; PyTorch's own 2, 44.4 us." in text
    assert "| `a\\|b` | 10 | 955.6 |  |" in text
    assert "| `add` | 2 | 44.4 | PyTorch |" in text


def test_kernels_with_their_resources():
    text = markdown(RESULT)
    assert cells(text, "pre")[1:] == ["tilelang, exact", "2.00", "70.0 (69.0..71.0)", "3000", "99%", "32", "0", "2", "80", "10", "47%"]
    assert "| project | default | 0.00 | failed: RuntimeError: x |" in text


def test_decode_columns_are_token_counts():
    text = markdown(RESULT)
    table = text[text.index("### Small token counts") :]
    assert "| implementation | T = 1 | T = 16 | host, T = 16 |" in table
    assert cells(table, "mhc")[1:] == ["9.0 / 40.0", "9.0 / 9.0", "41 / 55 / 120"]
    assert "- Liger, T = 1: failed: ValueError: no" in table
    again = copy.deepcopy(RESULT)
    again["shapes"][0]["decode"].append({**again["shapes"][0]["decode"][-1], "T": 16})
    assert "- Liger, T = 1, 16: failed: ValueError: no\n" in markdown(again)


def test_interrupted_and_missing_are_said():
    text = markdown({**RESULT, "complete": False, "missing": {"tile_kernels": "ModuleNotFoundError: ..."}})
    assert "Interrupted" in text
    assert "Not installed, so not measured: tile_kernels." in text
    assert "Interrupted" not in markdown(RESULT)


def test_every_table_is_well_formed():
    for text in (markdown(RESULT), readme_table(RESULT)):
        width = None
        for line in text.splitlines():
            if not line.startswith("|"):
                width = None
                continue
            count = line.replace("\\|", "").count("|")
            assert width in (None, count), line
            width = count


def test_readme_table_is_small_and_ours_stands_out():
    text = readme_table(RESULT)
    assert "| **mhc** | **200** | 50% | **600** | 50% | 500 |" in text
    assert "3000 GB/s" in text
    assert "| **mhc, chain of 4** | **180** |" in text
    assert "| FlashInfer | 250 | 56% | - | - | 500 |" in text


def test_results_are_read_back_or_refused(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(RESULT))
    assert readme_table(read_result(path)) == readme_table(RESULT)
    for text in ("{", "[]", '{"shapes": []}'):
        path.write_text(text)
        with pytest.raises(TuneError, match="--readme"):
            read_result(path)
    with pytest.raises(TuneError, match="--readme"):
        read_result(tmp_path / "none.json")


def test_chart_of_several_shapes(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    two = copy.deepcopy(RESULT)
    two["shapes"].append(copy.deepcopy(two["shapes"][0]) | {"copy_gbps": 2000.0})
    chart(two, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    titles = [axis.get_title() for axis in figures[0].axes]
    assert [[gbps in title for gbps in ("3000 GB/s", "2000 GB/s")] for title in titles] == 2 * [[True, False]] + 2 * [[False, True]]
    assert "GB/s" not in figures[0].get_suptitle()
