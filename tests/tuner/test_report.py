"""mhc-tune report: the page holds the numbers of the files, and names only as text; what is missing or malformed is said."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mhc.profile import read_profile, save_profile
from mhc.schema import Entry, Profile, Provenance
from tests.malformed import JUNK
from tl_kernels import KERNELS
from tuner import cli
from tuner import report_tables as tables
from tuner.errors import TuneError
from tuner.inputs import make_inputs
from tuner.measure_job import run_reference
from tuner.report import ReportRequest, readme, render, roof_points, run_report
from tuner.report_flops import flops
from tuner.report_history import CHAINED, OURS, RIVAL, changed_files, history, last_commit
from tuner.report_plots import number, spread
from tuner.report_read import Bench, parse, read_devices

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
#: A name that would run, load, close, draw mathematics, move the cursor or be no Unicode.
HOSTILE = "$\\frac{$ </svg><script>alert(1)</script>\"' onload=x <img src=http://evil.test/> | ]]> \x1b[2J \ud800 {{ 7*7 }}"


def time(us: float, share: float | None = 0.5) -> dict:
    return {"us": us, "lo": us - 0.5, "hi": us + 0.5, "samples": 30} | ({} if share is None else {"share": share})


def row(rival: str, label: str, us: float, **change) -> dict:
    times = {f"{p}_{k}": time(us * (3 if "b" in p else 1)) for p in ("forward", "forward_backward") for k in ("graph", "eager")}
    found = {"rival": rival, "label": label, "note": "", "layers": 1, "chained": False, "agrees": True, "errors": {"y": 2e-3}}
    return {**found, "times": times, "peak_mib": 500.0, "failures": [], **change}


def small(label: str, T: int, us: float) -> dict:
    times = {"forward_graph": time(us, None), "forward_eager": time(4 * us, None)}
    return row("ours" if label == "mhc" else label, label, 1.0, T=T, layers=8, times=times, host_us=None)


def kernel_row(kernel: str, us: float, program: str = "profile") -> dict:
    found = {"kernel": kernel, "program": program, "bytes": 209846272, "failure": None, "us": us, "lo": us - 0.1, "hi": us + 0.1}
    return found | {"gbps": 3037.8, "share": 0.98, "registers": 32, "stack": 0, "shared": 2048, "threads": 80, "occupancy": 0.47}


def result(**change) -> dict:
    shape = {
        "T": 8192,
        "n": 4,
        "C": 2560,
        "dtype": "bfloat16",
        "copy_gbps": 3000.0,
        "floor_us": {"forward": 139.8, "forward_backward": 461.4},
        "rounds": 30,
        "rows": [
            row("ours", "mhc", 213.7),
            row("ours", "mhc", 187.3, layers=4, chained=True),
            row("liger", "Liger", 911.1),
            row("wrong", "Fast but wrong", 50.0, agrees=False, errors={"x": float("nan")}),
            row("flashinfer", "FlashInfer", 0.0, times={}, failures=["RuntimeError: boom"]),
        ],
        "decode": [small("mhc", 1, 9.3), small("mhc", 16, 9.7), small("Other", 1, 47.7)],
        "kernels": [kernel_row("pre", 69.1), kernel_row("project", 88.4), kernel_row("project", 186.5, "default")],
    }
    whole = {
        "hardware": {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90a", "sm_count": 132, "driver": "580.1", "cuda": "13.0"},
        "versions": {"torch": "2.11.0", "liger-kernel": None},
        "command": "mhc-tune bench --gpu h100",
        "date": "2026-11-22 07:01 UTC",
        "method": "cuda",
        "dtype": "bfloat16",
        "missing": {"te": "x"},
        "shapes": [shape],
    }
    return {**whole, **change}


TUNE = {
    "hardware": {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90a"},
    "copy_gbps": 3000.0,
    "command": "mhc-tune --gpu h100 --kernels pre",
    "seconds": 61.0,
    "studies": [
        {"kernel": "pre", "n": 4, "C": [2560], "dtype": "bfloat16", "tokens": 8192}
        | {"trials": [{"outcome": outcome} for outcome in ("ok", "ok", "slow")]}
    ],
}
REPLAY = {
    "command": "mhc-tune replay ledger.json",
    "date": "2026-11-22",
    "ledger": "ledger.json",
    "hardware": "NVIDIA H100 80GB HBM3",
    "within": 0.02,
    "batch": 4,
    "studies": [
        {
            "label": "pre n=4",
            "measured": 96,
            "near_best": 3,
            "rows": [
                {"start": "cold", "sampler": "tpe", "seeds": 50, "reached": 50, "within_quarter": 46}
                | {"median_trials": 12, "p90_trials": 21, "median_share": 0.125, "p90_share": 0.2188},
                {"start": "cold", "sampler": "random", "seeds": 50, "reached": 20, "within_quarter": 9}
                | {"median_trials": None, "p90_trials": None, "median_share": None, "p90_share": None},
            ],
        }
    ],
}
STARTUP = {
    "command": "mhc-tune startup --bundle b",
    "date": "2026-11-24 17:00 UTC",
    "T": 8192,
    "n": 4,
    "C": 2560,
    "dtype": "bfloat16",
    "rows": [
        {"label": "ours", "setup": "bundle", "failure": None}
        | {"samples": [{"torch": 1.0, "ready": 1.5, "first": f, "second": f + 0.001} for f in (2.0, 2.5, 9.0)]},
        {"label": "rival", "setup": "cold", "failure": "took more than 600 s", "samples": []},
    ],
}
CHECK = {
    "title": "sm_90a, fingerprints",
    "exit_code": 1,
    "counts": {"regressed": 1, "same": 1},
    "notes": ["nvcc 13.0"],
    "programs": [
        {"kernel": "pre", "program": "pre 4x2560", "verdict": "regressed", "findings": ["loads: 16 -> 8 bytes"]},
        {"kernel": "project", "program": "project 4x2560", "verdict": "same", "findings": []},
    ],
}


TIMED_CHECK = {
    "title": "h100, calibration",
    "exit_code": 1,
    "mode": "calibrate",
    "date": "2026-11-24T10:00:00+00:00",
    "command": "mhc-tune check --calibrate 50",
    "runs": 50,
    "counts": {"regressed": 1, "same": 1},
    "notes": ["copy bandwidth 3020.1 GB/s"],
    "false_alarms": {"entries": 20, "runs": 50, "judged": 1000, "regressed": 2, "improved": 1, "runs_with_alarm": 2, "rate": 0.002},
    "programs": [
        {
            "kernel": "pre",
            "program": "pre n=4 C=2560 bfloat16 T=8192",
            "verdict": "regressed",
            "findings": ["69.5 -> 76.4 us"],
            "causes": ["code", "toolchain"],
            "before_us": 69.5,
            "now_us": 76.45,
            "ratio": 1.1,
            "band": 0.012,
        },
        {"kernel": "pre_bwd", "program": "pre_bwd n=4", "verdict": "not measured", "findings": ["its process died"], "before_us": None},
        {"kernel": "project", "program": "project n=4", "verdict": "same", "findings": [], "ratio": 1.0, "band": 0.01},
    ],
}


def entry(kernel: str = "pre", **change) -> Entry:
    fields = {"kernel": kernel, "n": 4, "C": 2560, "dtype": "bfloat16", "tokens": 8192, "config": {"block_T": 1}, "time_us": 69.5}
    fields |= {"time_ci_us": (69.0, 70.0), "gbps": 3000.0, "copy_share": 0.99, "default_us": 98.7, "verdict": "win", "error": {"u": 1e-3}}
    return Entry(**{**fields, "source_hash": KERNELS[kernel].source_hash, **change})


def profile(*entries: Entry) -> Profile:
    where = Provenance(
        gpu="NVIDIA H100 80GB HBM3",
        arch="sm_90a",
        torch="2.11.0",
        tilelang="0.1.15",
        copy_gbps=3000.0,
        seed=0,
        trials=3,
        date="2026-11-22",
        command="mhc-tune",
    )
    return Profile(schema_version=1, provenance=where, entries=list(entries))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``results/h100`` with everything a page can show; ``profiles/h100.yaml`` beside ``results``."""
    (tmp_path / "results" / "h100" / "decode").mkdir(parents=True)
    for name, content in {
        "bench.json": result(),
        "tune.json": TUNE,
        "replay.json": REPLAY,
        "check.json": CHECK,
        "startup.json": STARTUP,
    }.items():
        (tmp_path / "results" / "h100" / name).write_text(json.dumps(content))
    (tmp_path / "results" / "h100" / "check_noise.json").write_text(json.dumps(TIMED_CHECK))
    (tmp_path / "results" / "h100" / "tune_2.json").write_text(json.dumps({"runs": [TUNE, {**TUNE, "command": "mhc-tune again"}]}))
    (tmp_path / "results" / "h100" / "run #1 100%.txt").write_text("raw")
    (tmp_path / "profiles").mkdir()
    entries = (
        entry(gain_ci=(0.28, 0.31)),
        entry("project", verdict="tie", time_us=50.0, default_us=50.0, runner_up_us=49.6),
        entry("pre", tokens=64, source_hash="another"),
    )
    save_profile(profile(*entries), tmp_path / "profiles" / "h100.yaml")
    return tmp_path


def page_of(folder: Path, out: str = "results/report.html") -> str:
    request = ReportRequest(folder / "results", folder / "profiles", folder / out, False, "mhc-tune report")
    return render(read_devices(request.results, folder / "profiles"), request)


class Page(HTMLParser):
    """The elements of a page as a browser's tokenizer sees them, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data + "\n"

    def section(self, title: str) -> str:
        """The text from a heading to the next."""
        return self.text.split(f"\n{title}\n", 1)[1]


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_the_page_holds_what_the_files_say(folder):
    page = Page(page_of(folder))
    for text in (
        "213.7 (213.2 to 214.2)",  # bench.json
        "561.9 (561.4 to 562.4)",
        "fastest rival of the same run 911 us",  # not the faster one, which is wrong
        "FlashInfer: failed: RuntimeError: boom",
        "Fast but wrong: DIFFERS from float64; largest relative error nan in x",
        "not installed, so not measured: te",
        "9.3 / 37.2",  # small token counts
        "69.1 (69.0 to 69.2)",  # kernels
        "29.6% (28.0% to 31.0%)",  # the profile
        "2 of 3 entries are clearly faster",
        "1 entries were tuned for other sources",
        "12.5%",  # replay
        "never",
        "loads: 16 -> 8 bytes",  # check
        "2.50 (2.00 to 9.00)",  # startup
        "rival, cold: took more than 600 s",
        "1 slow",  # tune
        "mhc-tune again",
        "NVIDIA H100 80GB HBM3, sm_90a, 132 multiprocessors",
        "driver 580.1, CUDA 13.0",
        "torch 2.11.0",
        "mhc-tune bench --gpu h100",
    ):
        assert text in page.text, text
    assert "project 4x2560" not in page.text  # the same as before
    for text in (
        "check_noise.json: h100, calibration: 3 entries, 50 runs, 1 regressed, 1 same; exit code 1",
        "\npre n=4 C=2560 bfloat16 T=8192\nregressed\ncode; toolchain\n69.5\n76.5\n+10.0%\n1.2%\n",
        "\nnot measured\nits process died\n",
        "False alarms: 0.2%, 2 of 1000 (20 entries, 50 runs of identical code); 2 runs had one.",
        "2026-11-24T10:00:00+00:00",
        "mhc-tune check --calibrate 50",
    ):
        assert text in re.sub(r"\s*\n\s*", "\n", page.text), text
    assert "project n=4" not in page.text
    kernels = tables.kernels(*(lambda d: (d.bench.data.shapes[0], d.profile))(read_devices(folder / "results", folder / "profiles")[0]))
    assert [[cell.text for cell in cells[5:7]] for cells in kernels.rows] == [["win", "fresh"], ["tie", "fresh"], ["tie", "fresh"]]


def test_the_profile_says_nothing_of_a_configuration_that_is_not_its_own(folder):
    path = folder / "results" / "h100" / "bench.json"
    found = json.loads(path.read_text())
    for program, block_T in zip(found["shapes"][0]["kernels"], (1, 2, 1), strict=True):
        program["config"] = {"block_T": block_T}
    path.write_text(json.dumps(found))
    (device,) = read_devices(folder / "results", folder / "profiles")
    kernels = tables.kernels(device.bench.data.shapes[0], device.profile)
    said = [[cell.text for cell in cells[5:7]] for cells in kernels.rows]
    assert said == [["win", "fresh"], ["–", "another configuration"], ["tie", "fresh"]]
    assert "Another configuration: the entry's is not the one that was timed here" in Page(page_of(folder)).text


@pytest.mark.parametrize("name", ["bench.json", "wide/bench.json", "decode/bench.json"])
def test_a_run_that_measured_nothing_is_named_and_the_rest_is_shown(folder, name):
    path = folder / "results" / "h100" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result(shapes=[])))
    page = page_of(folder)
    check_inert(page, folder / "results")
    text = " ".join(Page(page).text.split())
    assert text.count(f"{name} holds no shape: its run ended before anything was measured") == 1
    assert ("213.7 (213.2 to 214.2)" in text) == (name != "bench.json")
    assert "12.5%" in text


def test_a_run_that_measured_nothing_alone_makes_a_page_too(tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "results" / "h100").mkdir(parents=True)
    (tmp_path / "results" / "h100" / "bench.json").write_text(json.dumps(result(shapes=[])))
    assert "bench.json holds no shape" in Page(page_of(tmp_path)).text


def test_small_token_counts_are_of_every_run_the_newest_first(folder):
    for name, day, us in (("decode", 24, 11.1), ("decode_ours", 25, 10.2), ("older", 20, 12.3)):
        other = result() | {"date": f"2026-11-{day} 01:02 UTC"}
        other["shapes"][0]["decode"] = [small("mhc", 1, us)]
        (folder / "results" / "h100" / name).mkdir(exist_ok=True)
        (folder / "results" / "h100" / name / "bench.json").write_text(json.dumps(other))
    text = Page(page_of(folder)).section("Small token counts")
    times = [text.index(f"\n{us} / ") for us in (10.2, 11.1, 9.3, 12.3)]  # that of bench.json is of the 22nd
    assert times == sorted(times)


def test_runs_of_another_dtype_have_a_section_of_their_own(folder):
    other = result(dtype="float32", date="2026-11-26 01:02 UTC")
    other["shapes"][0]["dtype"] = "float32"
    (folder / "results" / "h100" / "exact").mkdir()
    (folder / "results" / "h100" / "exact" / "bench.json").write_text(json.dumps(other))
    text = " ".join(Page(page_of(folder)).text.split())
    assert "Boundaries against rivals, 8192 × 4 × 2560, bfloat16 " in text
    assert text.count("Boundaries against rivals, 8192 × 4 × 2560, float32, run of 2026-11-26 01:02 UTC") == 1
    assert "run of 2026-11-26 01:02 UTC implementation" not in text, "folded below the other dtype's"


def test_what_a_startup_lacks_is_said(folder):
    path = folder / "results" / "h100" / "startup.json"
    assert "Interrupted" not in Page(page_of(folder)).section("Start of a script")
    path.write_text(json.dumps({**STARTUP, "complete": False}))
    assert "Interrupted: not everything was measured" in Page(page_of(folder)).section("Start of a script")
    rows = [{**row, "rival": name} for row, name in zip(STARTUP["rows"], ("ours", "liger"), strict=True)]
    path.write_text(json.dumps({**STARTUP, "command": "mhc-tune startup --rivals ours,liger,compile", "rows": rows}))
    assert "Not all of what the command asked for: no start of compile" in Page(page_of(folder)).section("Start of a script")


def test_no_command_is_made_up_for_a_check_that_did_not_record_it(folder):
    (folder / "results" / "h100" / "check_noise.json").unlink()
    assert "mhc-tune check --json" not in Page(page_of(folder)).text


def test_nothing_on_the_page_runs_or_loads(folder):
    page = page_of(folder)
    assert "default-src 'none'" in page
    check_inert(page, folder / "results")


def check_inert(page: str, where: Path) -> None:
    """No script, no handler, nothing from elsewhere; links are the paper, places of the page and files that are there."""
    found = Page(page)
    inside = {"html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "nav", "div", "figure", "figcaption"}
    inside |= {"h1", "h2", "h3", "p", "a", "strong", "code", "dl", "dt", "dd", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    inside |= {"details", "summary", "svg", "g", "path", "defs", "clippath", "rect", "use", "text", "desc", "tspan"}
    assert {tag for tag, _ in found.elements} <= inside
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.elements:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action", "xlink:href")}, tag
        for name, value in attributes.items():
            assert name == "href" or "url(" not in (value or "").replace("url(#", ""), (tag, name, value)
        link = attributes.get("href")
        if link is None or link == "https://arxiv.org/abs/2512.24880":
            continue
        if link.startswith("#"):
            assert link[1:] in ids, link
        else:
            assert (where / unquote(link)).is_file(), link


def test_hostile_names_are_text(folder):
    path = folder / "results" / "h100" / "bench.json"
    hostile = result(date=HOSTILE, command=HOSTILE, versions={HOSTILE: HOSTILE}, missing={HOSTILE: 1})
    hostile["hardware"]["name"] = HOSTILE
    shape = hostile["shapes"][0]
    shape["rows"][0] |= {"label": HOSTILE, "note": HOSTILE, "failures": [HOSTILE]}
    shape["rows"][2]["label"] = HOSTILE
    shape["decode"][0]["label"] = HOSTILE
    shape["kernels"].append(kernel_row(HOSTILE, 3.0, HOSTILE))
    path.write_text(json.dumps(hostile))
    replay, check, tune = copy.deepcopy(REPLAY), copy.deepcopy(CHECK), {**TUNE, "command": HOSTILE}
    replay["studies"][0]["label"] = check["programs"][0]["findings"][0] = check["notes"][0] = HOSTILE
    timed = {**copy.deepcopy(TIMED_CHECK), "command": HOSTILE, "date": HOSTILE}
    timed["programs"][0] |= {"program": HOSTILE, "causes": [HOSTILE], "verdict": HOSTILE}
    for name, content in {"replay.json": replay, "check.json": check, "check_noise.json": timed, "tune.json": tune}.items():
        path.with_name(name).write_text(json.dumps(content))
    page = page_of(folder)
    check_inert(page, folder / "results")
    assert {c for c in page if not c.isprintable()} <= {"\n", "\u202f"}
    text = Page(page).text
    assert text.count("alert(1)") > 20
    assert "{{ 7*7 }}" in text
    drawn = ["".join(t.itertext()) for svg in svgs(page) for t in svg.iter(f"{SVG}text")]
    assert sum("<script>" in t for t in drawn) >= 8  # selectable, and text
    table = readme(read_devices(folder / "results", folder / "profiles"))
    assert "<script" not in table
    assert "\x1b" not in table


def test_charts_follow_the_scheme_and_the_width(folder):
    charts = svgs(page_of(folder))
    assert len(charts) == 2 * 5  # boundaries, roofline, gains, tokens, replays; no history outside a checkout
    assert sorted({float(c.get("viewBox").split()[2]) for c in charts}) == [356, 1040]
    for chart in charts:
        notes = {child.tag.removeprefix(SVG): "".join(child.itertext()) for child in list(chart)[:2]}
        assert set(notes) == {"title", "desc"}
        assert re.search(r"\d", notes["desc"]), notes  # the numbers of the chart, for who cannot see it
        colours = {m for e in chart.iter() for v in e.attrib.values() for m in re.findall(r"#[0-9a-f]{6}\b", v)}
        assert not colours
        width, height = map(float, chart.get("viewBox").split()[2:])
        for text in chart.iter(f"{SVG}text"):
            x, y = float(text.get("x", "nan")), float(text.get("y", "nan"))
            outside = x < 0 or x > width or y < 0 or y > height
            assert not outside, "".join(text.itertext())


def test_what_is_missing_is_said_and_not_made_up(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "profiles").mkdir()
    with pytest.raises(TuneError, match="nothing to report"):
        read_devices(tmp_path / "results", tmp_path / "profiles")
    save_profile(profile(entry()), tmp_path / "profiles" / "h100.yaml")
    page = Page(page_of(tmp_path))
    for text in ("no bench.json", "not measured; measure with", "no tune*.json", "no replay.json", "no check*.json", "no startup.json"):
        assert text in page.text, text
    assert "100%" in page.text
    assert not re.search(r"\b(None|nan|undefined)\b", page.text)
    with pytest.raises(TuneError, match=r"no bench\.json"):
        readme(read_devices(tmp_path / "results", tmp_path / "profiles"))


def broken(change) -> str:
    found = result()
    change(found)
    return json.dumps(found)


def first_time(found: dict) -> dict:
    return found["shapes"][0]["rows"][0]["times"]["forward_graph"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "top level"),
        ("{}", "hardware: missing"),
        (broken(lambda r: r.update(shapes={})), "shapes"),
        (broken(lambda r: first_time(r).update(us="fast")), "shapes[0].rows[0].times.forward_graph.us: got 'fast'"),
        (broken(lambda r: first_time(r).update(us=float("nan"))), "forward_graph.us: got nan"),
        (broken(lambda r: first_time(r).pop("share")), "times.forward_graph.share"),
        (broken(lambda r: r["shapes"][0].update(copy_gbps=0)), "shapes[0].copy_gbps"),
        (broken(lambda r: r["shapes"][0].update(T=10**400)), "shapes[0].T"),
        (broken(lambda r: r["shapes"][0]["floor_us"].pop("forward")), "forward: missing"),
        (broken(lambda r: r["shapes"][0]["kernels"][0].pop("bytes")), "shapes[0].kernels[0].bytes: missing"),
        (broken(lambda r: r.update(versions=3)), "versions"),
    ],
)
def test_a_malformed_result_is_one_line(folder, monkeypatch, capsys, text, named):
    path = folder / "results" / "h100" / "bench.json"
    path.write_text(text)
    arguments = ["report", "--results", str(folder / "results"), "--profiles", str(folder / "profiles")]
    monkeypatch.setattr(sys, "argv", ["mhc-tune", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert err.count("\n") == 1
    assert str(path) in err
    assert named in err
    assert not (folder / "results" / "report.html").exists()


def test_other_malformed_files_are_named_too(folder):
    for name, content, named in (
        ("tune_2.json", {"runs": [{**TUNE, "studies": [{}]}]}, r"runs\[0\].studies\[0\].kernel: missing"),
        ("replay.json", {**REPLAY, "within": "x"}, "within"),
        ("check.json", {**CHECK, "programs": {}}, "programs"),
        ("startup.json", {**STARTUP, "rows": [{}]}, r"rows\[0\].label: missing"),
        ("check_noise.json", {**TIMED_CHECK, "false_alarms": {"rate": 0.0}}, "false_alarms.entries: missing"),
    ):
        path = folder / "results" / "h100" / name
        good = path.read_text()
        path.write_text(json.dumps(content))
        with pytest.raises(TuneError, match=f"{re.escape(str(path))}: {named}"):
            read_devices(folder / "results", folder / "profiles")
        path.write_text(good)
    (folder / "profiles" / "h100.yaml").write_text("entries: [")
    with pytest.raises(TuneError, match=r"h100.yaml: line 2"):
        read_devices(folder / "results", folder / "profiles")
    with pytest.raises(TuneError, match=r"--results .*nowhere"):
        read_devices(folder / "nowhere", folder / "profiles")


def paths(node, at=()):
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [at, *(path for key in keys for path in paths(node[key], (*at, key)))]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(paths(result())), JUNK)
def test_a_spoilt_field_is_refused_or_shown(path, junk):
    spoilt = result()
    target = {"whole": spoilt}
    for step in ("whole", *path)[:-1] if path else ():
        target = target[step]
    target[path[-1] if path else "whole"] = junk
    text = json.dumps(spoilt if path else junk)
    try:
        bench = parse(Bench, text, "bench.json").data
    except TuneError as e:
        refused = str(e)
    else:
        refused = ""
    if refused:
        assert refused.startswith("bench.json: ")
        assert "\n" not in refused
        return
    for shape in bench.shapes:
        tables.headline(shape, bench.kind)
        tables.small_tokens(shape.decode, bench.graph)
        tables.kernels(shape, None)
        roof_points(shape, None)


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t.test", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_history_reads_every_committed_measurement(tmp_path):
    path = tmp_path / "h100" / "bench.json"
    path.parent.mkdir()
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "begin")
    wanted = parse(Bench, json.dumps(result()), "bench.json").data.shapes[0]
    path.write_text("{}")
    assert history(path, wanted).why_not == "no committed result of this shape"

    shape = result()["shapes"][0]
    first = {**result(date="day 1"), "copy_gbps": 2999.0, "rows": [{k: v for k, v in row("ours", "mhc", 300.0).items() if k != "layers"}]}
    first["case"] = {k: shape[k] for k in ("T", "n", "C", "dtype", "floor_us")}
    del first["shapes"]
    versions = [("boundary.json", json.dumps(first)), ("bench.json", "{"), ("bench.json", json.dumps(result(date="day 2")))]
    other = result(date="day 3")
    other["shapes"][0]["T"] = 64
    versions += [("bench.json", json.dumps(other)), ("bench.json", json.dumps(result(date="day 2"), indent=1))]
    for i, (name, text) in enumerate(versions):
        (path.parent / name).write_text(text)
        git(tmp_path, "add", ".")
        git(tmp_path, "-c", "core.hooksPath=/nowhere", "commit", "-q", "-m", f"commit {i} <b>", f"--date=2026-11-2{i}T00:00:00Z")
    found = history(path, wanted)
    assert [(p.measured, p.subject) for p in sorted(found.points, key=lambda p: p.measured)] == [
        ("day 1", "commit 0 <b>"),
        ("day 2", "commit 2 <b>"),
    ]
    now = parse(Bench, json.dumps(result(date="today")), "bench.json").data
    assert [(p.commit, p.measured) for p in history(path, wanted, now).points][-1] == ("not committed", "today")
    committed = parse(Bench, json.dumps(result(date="day 2")), "bench.json").data
    assert history(path, wanted, committed) == found
    points = {p.measured: p for p in found.points}
    assert points["day 1"].times["forward", OURS] == 300.0
    assert points["day 1"].copy_gbps == 2999.0
    latest = points["day 2"].times
    assert (latest["forward", OURS], latest["forward", CHAINED], latest["forward", RIVAL]) == (213.7, 187.3, 911.1)
    assert [re.sub(r"^\w+:", "", text)[:30] for text in found.skipped] == [
        "bench.json: hardware: missing,",
        "bench.json: is no JSON: JSONDe",
    ]


def test_history_is_in_the_order_of_time_in_whatever_time_zone(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    git(tmp_path, "init", "-q")
    # as text 23:00+05:00 comes last, and is the first
    for i, when in enumerate(("2026-11-24T23:00:00+05:00", "2026-11-24T20:00:00+00:00", "2026-11-24T17:00:00-05:00")):
        monkeypatch.setenv("GIT_COMMITTER_DATE", when)
        path.write_text(json.dumps(result(date=f"day {i}")))
        git(tmp_path, "add", ".")
        git(tmp_path, "-c", "core.hooksPath=/nowhere", "commit", "-q", "-m", f"commit {i}")
    wanted = parse(Bench, json.dumps(result()), "bench.json").data.shapes[0]
    assert [p.measured for p in history(path, wanted).points] == ["day 0", "day 1", "day 2"]


def test_a_file_has_the_commit_that_last_changed_it_and_a_mark_where_it_was_changed_since(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    git(tmp_path, "init", "-q")
    for name in ("same ü.json", "edited.json", "staged.json"):
        (folder / name).write_text("{}")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "core.hooksPath=/nowhere", "commit", "-q", "-m", "one")
    for name in ("edited.json", "staged.json", "new.json"):
        (folder / name).write_text("[]")
    git(tmp_path, "add", "a folder/staged.json")
    changed = changed_files(folder)
    commits = {path.name: last_commit(path, changed) for path in folder.iterdir()}
    same = commits["same ü.json"]
    assert re.fullmatch("[0-9a-f]{7,}", same)
    assert commits == {"same ü.json": same, "edited.json": f"{same}+", "staged.json": f"{same}+", "new.json": None}
    assert changed_files(tmp_path / "nowhere") == frozenset()


def test_history_without_a_checkout_says_so(folder, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    wanted = parse(Bench, json.dumps(result()), "bench.json").data.shapes[0]
    assert "not run inside a git checkout" in history(folder / "results" / "h100" / "bench.json", wanted).why_not


def test_readme_prints_the_tables(folder, capsys):
    run_report(ReportRequest(folder / "results", folder / "profiles", folder / "no.html", True, ""))
    printed = capsys.readouterr().out
    assert "| **mhc** | **214** | 50% | **641** | 50% | 500 |" in printed
    assert "| **mhc** | **9.3 / 37.2** | **9.7 / 38.8** |" in printed
    assert "| Other | 47.7 / 190.8 | – / – |" in printed
    assert not (folder / "no.html").exists()


def test_this_repository_makes_a_page(tmp_path, capsys):
    out = tmp_path / "deep" / "report.html"
    assert run_report(ReportRequest(ROOT / "results", ROOT / "configs", out, False, "mhc-tune report")) == 0
    page = out.read_text()
    assert len(page.encode()) < 2_500_000  # 1.92 MB with an H100, an H200 and the CPU, everything tuned on each
    check_inert(page, out.parent)
    roof = next(s for s in svgs(page) if "d0-roofline" in s.get("aria-labelledby"))
    tuned = {e.kernel for file in ("h100", "cpu") for e in read_profile(ROOT / "configs" / f"{file}.yaml").entries}
    assert {name for name in KERNELS if not KERNELS[name].shortcut} <= tuned
    assert tuned <= {"".join(t.itertext()).removesuffix("*") for t in roof.iter(f"{SVG}text")}  # *: from the profile, not the bench


@pytest.mark.parametrize("kernel", KERNELS)
def test_operations_are_counted_as_the_definition_has_them(kernel):
    spec, T = KERNELS[kernel], 16
    p = spec.problem(4, 64, "float32")
    inputs = make_inputs(spec, p, T, 0, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        run_reference(kernel, p, inputs)
    ours, products = flops(kernel, p, T), counter.get_total_flops()
    assert ours > 0
    assert ours == flops(kernel, p, 2 * T) // (2 if spec.has_tokens else 1)
    if kernel == "pre_bwd":  # autograd runs the forward too, and counts a product without a sum as two operations
        assert ours == flops("pre_grad", p, T) + p.K * T
    elif kernel == "post_res_bwd":
        assert ours == flops("post_res_grads", p, T) + 2 * p.n * p.K * T
    elif products:  # what is no product of matrices comes on top
        assert products <= ours <= 1.3 * products


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.001, 0.2))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_labels_never_overlap(wanted, gap):
    places = spread(wanted, gap, 0.0, 1.0)
    fits = min(gap, 1 / max(1, len(wanted) - 1))
    ordered = sorted(places)
    assert all(b - a >= fits - 1e-9 for a, b in pairwise(ordered))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert [places[i] for i in sorted(range(len(wanted)), key=lambda i: wanted[i])] == ordered


def test_a_label_alone_stays_where_it_wants_to_be():
    assert spread([0.2, 0.8], 0.1, 0.0, 1.0) == [0.2, 0.8]
    assert spread([], 0.1, 0.0, 1.0) == []


def test_numbers_have_the_digits_that_count():
    wanted = {0: "0", 0.034: "0.034", 7.25: "7.25", 10.1: "10", 138.67: "139", 5840.2: "5\u202f840"}
    assert {value: number(value) for value in wanted} == wanted


def test_without_matplotlib_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("tuner.report.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(TuneError, match=r"wanted jinja2 .*pip install jinja2"):
        run_report(ReportRequest(folder / "results", folder / "profiles", folder / "x.html", False, ""))


def test_other_runs_of_the_benchmark_are_folded_below_the_first_of_their_shape(folder):
    """That of bench.json comes first, of a shape that it has not the newest."""
    for day, C in ((24, 4096), (25, 2560), (26, 4096)):
        other = result() | {"date": f"2026-11-{day} 01:02 UTC", "command": f"mhc-tune bench --out wide{day}"}
        other["shapes"][0]["C"] = C
        (folder / "results" / "h100" / f"wide{day}").mkdir()
        (folder / "results" / "h100" / f"wide{day}" / "bench.json").write_text(json.dumps(other))
    text = " ".join(Page(page_of(folder)).text.split())
    assert text.count("Boundaries against rivals, 8192 × 4 × 2560") == 2  # in the contents and above the section
    assert text.count("Boundaries against rivals, 8192 × 4 × 4096, bfloat16, run of 2026-11-26 01:02 UTC") == 1
    assert "Boundaries against rivals, 8192 × 4 × 2560, bfloat16 8192 × 4 × 4096, bfloat16 " in text  # the contents
    places = [" run of 2026-11-25 01:02 UTC", "8192 × 4 × 4096, bfloat16, run of", " run of 2026-11-24 01:02 UTC"]
    assert [text.index(place) for place in places] == sorted(text.index(place) for place in places)
    assert all(f"mhc-tune bench --out wide{day}" in text for day in (24, 25, 26))


def test_the_page_begins_with_the_newest_run(folder):
    (folder / "results" / "h200").mkdir()
    newer = result() | {"date": "2026-12-01 01:02 UTC"}
    newer["hardware"]["name"] = "NVIDIA H200"
    (folder / "results" / "h200" / "bench.json").write_text(json.dumps(newer))
    text = " ".join(Page(page_of(folder)).text.split())
    assert "on one NVIDIA H200: forward" in text
    assert "on one NVIDIA H100" not in text


def test_a_check_in_which_nothing_moved_has_no_empty_table_and_says_its_alarms_once(folder):
    same = {**TIMED_CHECK, "programs": [], "counts": {}, "notes": [*TIMED_CHECK["notes"], "false alarms: 2 of 1000 (0.20%)"]}
    before = page_of(folder)
    (folder / "results" / "h100" / "check_noise.json").write_text(json.dumps(same))
    (folder / "results" / "h100" / "check.json").unlink()
    page = page_of(folder)
    assert ">before us</th>" in before
    assert ">before us</th>" not in page
    assert " ".join(Page(page).text.split()).lower().count("false alarms") == 1
