"""Starts of a script: real processes for ours and for PyTorch's eager, and planted ones for what goes wrong."""

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tuner import startup as module
from tuner.errors import INTERRUPTED, TuneError
from tuner.startup import MOMENTS, StartupRequest, run_startup
from tuner.startup_report import markdown, unfinished

TINY = StartupRequest("mhc-tune startup ...", gpu="cpu", shape="3x2x32", repeats=1)


def run(request, out):
    code = run_startup(replace(request, out=out))
    result = json.loads((out / "startup.json").read_text())
    return code, {(row["rival"], row["setup"]): row for row in result["rows"]}, (out / "startup.md").read_text()


def test_a_start_goes_through_its_moments_in_order_and_finds_what_was_cached(tmp_path, hostile_folder):
    code, rows, text = run(TINY, tmp_path)
    assert code == 0
    assert json.loads((tmp_path / "startup.json").read_text())["complete"]
    assert "Interrupted" not in text
    for row in rows.values():
        (sample,) = row["samples"]
        times = [sample[moment] for moment in MOMENTS]
        assert times == sorted(times), row
        assert times[0] > 0
        assert row["failure"] is None
    cold, cached = (rows["ours", setup]["samples"][0] for setup in ("cold", "cached"))
    warmed = rows["ours", "warm_up"]["samples"][0]
    for start in (cached, warmed):
        assert start["first"] - start["ready"] < cold["first"] - cold["ready"]  # nothing is compiled
    assert warmed["ready"] - warmed["torch"] > cold["ready"] - cold["torch"]
    assert "| mhc (this project) | cached |" in text


def test_a_bundle_starts_with_no_compiler_on_the_path(tmp_path, monkeypatch):
    seen = []

    def planted(arguments, env, folder, more):
        seen.append((arguments[0], folder, more))
        return dict.fromkeys(MOMENTS, 1.0), None

    monkeypatch.setattr(module, "_start", planted)
    monkeypatch.setattr("mhc.bundle.Bundle", lambda path: None)
    code, rows, _ = run(replace(TINY, bundle=tmp_path / "b", rivals="ours,eager", repeats=2), tmp_path)
    assert code == 0
    assert list(rows) == [("ours", s) for s in ("cold", "cached", "warm_up", "bundle")] + [("eager", "cold"), ("eager", "cached")]
    assert all(len(row["samples"]) == 2 for row in rows.values())
    cold, cached, warmed, bundle = seen[:4]
    assert len({cold[1], cached[1], warmed[1], bundle[1]}) == 3
    assert cold[1] == cached[1]
    assert bundle[2] == {"MHC_BUNDLE": str(tmp_path / "b"), "PATH": ""}


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("raise SystemExit('no such thing')", "exit code 1: no such thing"),
        ('print(\'{"missing": "no module"}\')', "not installed: no module"),
        ("import time; time.sleep(60)", "took more than 1 s"),
        ("print('hello')", "exit code 0"),
    ],
)
def test_a_start_that_fails_is_a_row_that_says_why(script, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "python_command", lambda env, arguments, links: ([sys.executable, "-c", script], {}))
    monkeypatch.setattr(module, "LIMIT_S", 1.0)
    code, rows, text = run(TINY, tmp_path)
    assert code == 1
    assert rows["ours", "cold"]["failure"] == wanted
    assert f"- mhc (this project), cold: {wanted}" in text


def test_a_start_from_a_bundle_of_which_nothing_is_used_is_no_start_from_it(tmp_path, monkeypatch):
    """Where PyTorch serves, on the CPU."""
    stamps = json.dumps({**dict.fromkeys(MOMENTS, 1.0), "bundled": 0})
    script = f"import sys; print('it was compiled for vax', file=sys.stderr); print({stamps!r})"
    monkeypatch.setattr(module, "python_command", lambda env, arguments, links: ([sys.executable, "-c", script], {}))
    monkeypatch.setattr("mhc.bundle.Bundle", lambda path: None)
    code, rows, text = run(replace(TINY, bundle=tmp_path / "b"), tmp_path)
    assert code == 1
    assert rows["ours", "cold"]["failure"] is None
    assert rows["ours", "bundle"]["failure"] == "no program of the bundle serves this shape: it was compiled for vax"
    assert "with a bundle PyTorch serves what it has not" in text


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    def planted(arguments, env, folder, more):
        if any(folder.iterdir()):
            raise KeyboardInterrupt
        (folder / "filled").touch()
        return dict.fromkeys(MOMENTS, 1.0), None

    monkeypatch.setattr(module, "_start", planted)
    code, rows, text = run(TINY, tmp_path)
    assert code == INTERRUPTED
    assert list(rows) == [("ours", "cold")]
    assert json.loads((tmp_path / "startup.json").read_text())["complete"] is False
    assert "\n\n**Interrupted: not everything was measured.**\n\n| implementation |" in text


def test_ctrl_c_before_anything_was_measured_leaves_the_earlier_result(tmp_path, monkeypatch, capsys):
    def planted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_start", planted)
    (tmp_path / "startup.json").write_text("of before")
    assert run_startup(replace(TINY, out=tmp_path)) == INTERRUPTED
    assert (tmp_path / "startup.json").read_text() == "of before"
    assert "interrupted before anything was measured" in capsys.readouterr().err


def test_an_interpreter_that_cannot_be_executed_is_a_row_that_says_why(tmp_path):
    (tmp_path / "python").write_text("#!/nowhere/python\n")
    code, rows, _ = run(replace(TINY, rivals="eager", rival_envs=(f"eager={tmp_path / 'python'}",)), tmp_path)
    assert code == 0, "ours was not asked for"
    assert rows["eager", "cold"]["failure"].startswith("PermissionError: [Errno 13] Permission denied")
    (tmp_path / "python").chmod(0o755)
    _, rows, _ = run(replace(TINY, rivals="eager", rival_envs=(f"eager={tmp_path / 'python'}",)), tmp_path)
    assert rows["eager", "cold"]["failure"].startswith("FileNotFoundError: ")


def test_what_was_measured_is_printed_before_it_is_written(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_start", lambda *args: (dict.fromkeys(MOMENTS, 1.0), None))
    monkeypatch.setattr(module, "replace_file", full)
    with pytest.raises(TuneError, match=r"^--out .*: cannot be written: No space left on device$"):
        run_startup(replace(TINY, out=tmp_path))
    assert "| mhc (this project) | cold | 1.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"complete": True, "command": "mhc-tune startup --rivals ours,compile"}, None),
        ({"complete": False}, "Interrupted: not everything was measured"),
        # of files from before there was such a key
        ({}, None),
        ({"command": "mhc-tune startup --rivals ours,transformer-engine --repeats 1"}, None),
        (
            {"command": "mhc-tune startup --rivals=ours,tile-kernels,compile"},
            "Not all of what the command asked for: no start of tile-kernels, compile",
        ),
    ],
)
def test_what_a_run_lacks_is_said(change, wanted):
    rows = [{"rival": name} for name in ("ours", "transformer_engine")]
    assert unfinished({"command": "mhc-tune startup", "rows": rows, **change}) == wanted


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rivals": "ourz"}, "did you mean 'ours'"),
        ({"shape": "3x2"}, "--shape: got '3x2', wanted TxnxC such as 8192x4x2560"),
        ({"shape": "3x2x32:ours"}, "--shape: got '3x2x32:ours', wanted TxnxC such as 8192x4x2560"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"bundle": "nowhere"}, "/nowhere/manifest.json: cannot be read"),
        ({"rival_envs": ("liger",)}, "--rival-env"),
    ],
)
def test_a_bad_request_is_one_line(change, wanted, tmp_path):
    change = {k: Path(v) if k == "bundle" else v for k, v in change.items()}
    with pytest.raises(TuneError) as e:
        run_startup(replace(TINY, out=tmp_path, **change))
    assert wanted in str(e.value)
    assert ":ours+" not in str(e.value), "of what this command does not take"
    assert "\n" not in str(e.value)


def test_a_bundle_is_only_for_ours(tmp_path, monkeypatch):
    monkeypatch.setattr("mhc.bundle.Bundle", lambda path: None)
    with pytest.raises(TuneError, match=r"^--bundle: starts ours, which is not among --rivals eager$"):
        run_startup(replace(TINY, out=tmp_path, rivals="eager", bundle=tmp_path / "b"))


def test_a_row_without_a_start_is_dashes():
    row = {"rival": "x", "label": "X", "setup": "cold", "samples": [], "failure": "why"}
    result = {"hardware": {"name": "H"}, "versions": {}, "date": "", "command": "", "T": 1, "n": 1, "C": 1, "dtype": "", "rows": [row]}
    assert "| X | cold | - | - | - | - | - | 0 |" in markdown(result)
