"""The command line from outside: help, one-line errors with exit code 2, Ctrl-C, and one real tuning run on the CPU target."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mhc.profile import read_profile
from tests.conftest import python_path
from tuner import cli

ROOT = Path(__file__).resolve().parents[2]


def environment():
    return {**os.environ, "PYTHONPATH": python_path(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}


def mhc_tune(folder, *args, **env):
    return subprocess.run(
        [sys.executable, "-m", "tuner.cli", *args], cwd=folder, env={**environment(), **env}, capture_output=True, text=True, timeout=200
    )


def run_here(monkeypatch, *args):
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mhc-tune", *args])
    monkeypatch.setattr("tuner.hardware._gpu", lambda: None)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code


def test_help_teaches(tmp_path):
    done = mhc_tune(tmp_path, "--help")
    assert done.returncode == 0
    options = ("--gpu", "--kernels", "--time-limit", "--storage", "--sampler")
    for text in (*options, "Ctrl-C", "mhc-tune --gpu h100", "Examples", "Exit codes", "MHC_PROFILE"):
        assert text in done.stdout, text


def test_help_of_worker_teaches(tmp_path):
    done = mhc_tune(tmp_path, "worker", "--help")
    assert done.returncode == 0
    for text in ("--storage", "--wait", "--devices", "MHC_TUNE_STORAGE", "killed at any time", "Exit codes"):
        assert text in done.stdout, text


def test_help_of_bench_teaches(tmp_path):
    done = mhc_tune(tmp_path, "bench", "--help")
    assert done.returncode == 0
    for text in ("--shapes", "--rivals", "--rival-env", "MHC_RIVAL_<NAME>", "--readme", "Ctrl-C", "mhc-tune bench --gpu cpu", "Examples"):
        assert text in done.stdout, text


def test_bench_from_outside(tmp_path):
    args = ["bench", "--gpu", "cpu", "--shapes", "4x2x16", "--rivals", "eager", "--layers", "1", "--tokens", "none", "--no-kernels"]
    done = mhc_tune(tmp_path, *args, "--out", "here", MHC_BACKEND="reference", MHC_PROFILE="none", MHC_BUNDLE="", MHC_RESERVED_SMS="0")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"Command: `MHC_BACKEND=reference MHC_PROFILE=none MHC_RESERVED_SMS=0 mhc-tune {' '.join(args)} --out here`" in done.stdout
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"bench.json", "bench.md", "bench.png"}
    table = mhc_tune(tmp_path, "bench", "--readme", "here/bench.json")
    assert table.returncode == 0
    assert "| PyTorch eager |" in table.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--gpu", "h100"], "--gpu h100: "),
        (["--kernels", "post_ress"], "did you mean 'post_res'"),
        (["--workloads", "mhc-27"], "did you mean 'mhc-27b'"),
        (["--tokens", "many"], "--tokens: got 'many'"),
        (["--gpu", "cpu", "--output", "."], "is a folder"),
        (["--gpu", "cpu", "--storage", "nowhere://x"], "--storage nowhere://x: cannot be opened"),
        (["--gpu", "cpu", "--sampler", "tpee"], "did you mean 'tpe'"),
        (["--gpu", "cpu", "--devices", "0"], "--devices 0: there is one CPU"),
        (["--gpu", "cpu", "--storage", "foo"], "wanted postgresql://user@host/database or sqlite:///file"),
        (
            ["--gpu", "cpu", "--kernels", "project_pre,pre_streams_grad"],
            "got none that runs on cpu: project_pre: wanted compute capability 9.0",
        ),
        (["worker"], "--storage: got nothing"),
        (["worker", "--gpu", "cpu", "--storage", "nowhere://u:hush@x"], "--storage nowhere://u:***@x: cannot be opened"),
        (["worker", "--storage", "sqlite://", "--kernels", "pree"], "did you mean 'pre'"),
        (["--workloads-file", "bad.yaml"], "bad.yaml"),
        (["--trials", "0"], "'--trials'"),
        (["--effort", "huge"], "'--effort'"),
        (["--shapes", "8x4x64", "--tokens", "8"], "--shapes, --tokens: got both, wanted one"),
        (["--shapes", "8x4x64", "--workloads", "mhc-3b"], "--shapes, --workloads: got both, wanted one"),
        (["--shapes", "8x4x64", "--workloads-file", "bad.yaml"], "--shapes, --workloads-file: got both, wanted one"),
        (["--dtype", "float32"], "--dtype: wanted --shapes beside it"),
        (["--no-such-option"], "--no-such-option"),
        (["no-such-command"], "no-such-command"),
        (["--trials", "3", "bench"], "--trials stands before 'bench'"),
        (["bench", "--gpu", "h100"], "--gpu h100: "),
        (["bench", "--gpu", "cpu", "--rivals", "ligre"], "did you mean 'liger'"),
        (["bench", "--rounds", "0"], "'--rounds'"),
        (["bench", "--readme", "bad.yaml"], "--readme bad.yaml"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, said):
    (tmp_path / "bad.yaml").write_text("mhc-3b: {n: 4, C: [}\n")
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, *args) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("mhc-tune: ")


def test_the_version_is_one_name_and_number_a_line_and_imports_nothing_heavy(tmp_path):
    code = "import sys; sys.argv = ['mhc-tune', '--version']; from tuner import cli\ntry: cli.main()\n"
    code += "finally: print(*sorted({'torch', 'tilelang'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in filter(None, lines)] == ["mhc-kernels", "tilelang", "torch", "optuna"]
    assert lines[1] == ["tilelang", importlib.metadata.version("tilelang")]


@pytest.mark.parametrize("args", [("--gpu", "cpu", "--kernels", "pre"), ("compile", "--gpu", "h100", "-o", "bundle")])
def test_a_cache_of_tilelang_that_cannot_be_made_is_one_line_and_exit_code_2(tmp_path, args):
    done = mhc_tune(tmp_path, *args, TILELANG_CACHE_DIR="/dev/null/cache")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "set TILELANG_CACHE_DIR" in line


@pytest.mark.parametrize(
    ("first", "args"),
    [
        ("tuner.run.find_hardware", ["--gpu", "cpu"]),
        ("tuner.worker.find_hardware", ["worker", "--storage", "sqlite://"]),
        ("tuner.explain.parse_shape", ["explain", "pre", "64x4x1280"]),
        ("tuner.bench.make_plan", ["bench", "--gpu", "cpu"]),
        ("tuner.latency_check.make_plan", ["check", "--gpu", "cpu"]),
        ("tuner.bundle.find_compiler", ["compile", "--gpu", "h100", "-o", "bundle"]),
    ],
)
def test_ctrl_c_before_anything_is_measured_says_so_once(tmp_path, monkeypatch, capsys, first, args):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first, interrupt)
    assert run_here(monkeypatch, *args) == 130
    assert capsys.readouterr() == ("", "mhc-tune: interrupted before anything was measured\n")


def test_ctrl_c_while_torch_is_imported_is_no_crash(monkeypatch, capsys):
    with pytest.raises(KeyboardInterrupt):
        cli._interrupt()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__spec__=SimpleNamespace(_initializing=True)))
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as exit:
        cli._interrupt()
    assert exit.value.code == 130
    assert capsys.readouterr().err == "mhc-tune: interrupted before anything was measured\n"


def test_an_output_that_takes_nothing_is_one_line_and_exit_code_2(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_here(monkeypatch, "explain", "pre", "64x4x1280", "--gpu", "cpu") == 2
    assert capsys.readouterr().err == "mhc-tune: the output cannot be written: No space left on device\n"


def test_a_missing_compiler_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_here(monkeypatch, "--gpu", "cpu") == 2
    err = capsys.readouterr().err
    assert "g++" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_real_run_writes_a_profile_and_a_second_one_measures_nothing_new(tmp_path):
    args = ("--gpu", "cpu", "--kernels", "pre", "--workloads", "mhc-3b", "--trials", "2", "--raw", "raw.json")
    done = mhc_tune(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    (entry,) = read_profile(tmp_path / "configs" / "cpu.yaml").entries
    assert (entry.kernel, entry.n, entry.C, entry.tokens) == ("pre", 4, 1280, 64)
    assert 0 < entry.error["u"] < 4e-3
    assert "2 configurations measured" in done.stdout
    assert (tmp_path / "raw.json").is_file()
    again = mhc_tune(tmp_path, *args)
    assert again.returncode == 0, again.stderr
    assert "0 configurations measured" in again.stdout


def start(command, **kwargs):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(tmp_path):
    command = [sys.executable, "-m", "tuner.cli", "--gpu", "cpu", "--kernels", "pre,pre_bwd,post_res", "--trials", "2", "--jobs", "1"]
    child = start(command, cwd=tmp_path, env=environment())
    deadline = time.monotonic() + 150
    while not (tmp_path / "configs" / "cpu.yaml").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "interrupted" in out
    assert "run the same command again" in out
    assert "Traceback" not in out + err
    assert read_profile(tmp_path / "configs" / "cpu.yaml").entries


@pytest.mark.slow
def test_ctrl_c_ends_a_benchmark_with_what_it_has(tmp_path):
    args = "--gpu cpu --shapes 4x2x16 --rivals ours,eager --layers 1 --tokens none --no-kernels --rounds 100000 --seconds 600"
    command = [sys.executable, "-m", "tuner.cli", "bench", *args.split(), "--out", "here"]
    env = {**environment(), "MHC_BACKEND": "reference"}
    child = start(command, cwd=tmp_path, env=env)
    for line in child.stderr:
        if "boundaries" in line:  # opened within seconds, then sampled for minutes
            break
    time.sleep(8)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "interrupted; what was measured is in" in err
    assert "Traceback" not in err
    (entry,) = json.loads((tmp_path / "here" / "bench.json").read_text())["shapes"]
    assert all(row["times"] and not row["failures"] for row in entry["rows"])
