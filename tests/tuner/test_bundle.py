"""``mhc-tune compile``: each program once, failures by name, a folder that is replaced as a whole, and a cubin without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from mhc.profile import read_profile, save_profile
from mhc.schema import Profile
from tests.conftest import python_path
from tests.mhc.bundled import ROOT, N, write_profile
from tests.tuner import planted_bundle
from tl_kernels import KERNELS
from tuner import bundle, cli
from tuner.cubin import find_kernels
from tuner.errors import TuneError

GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def compiled(monkeypatch):
    """``compile_bundle`` with planted jobs, for a compiler that is there."""

    def run(profile, output, job=planted_bundle.library, gpu=None, kernels=None):
        monkeypatch.setattr(bundle, "library_job", job)
        monkeypatch.setattr(bundle, "find_compiler", lambda hardware: "g++")
        monkeypatch.setattr(bundle, "toolchain", lambda compiler: {"tilelang": "0.1.15", compiler: "12"})
        return bundle.compile_bundle(bundle.CompileRequest(gpu, output, profile and str(profile), kernels, 2, "mhc-tune compile -o bundle"))

    return run


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def with_entries(path, *changes):
    """The profile at ``path`` with its first entry again, once for each dictionary of other fields."""
    profile = read_profile(path)
    first = profile.entries[0].model_dump(mode="json")
    entries = [*profile.model_dump(mode="json")["entries"], *({**first, **change} for change in changes)]
    save_profile(Profile.model_validate({**profile.model_dump(mode="json"), "entries": entries}), path)
    return path


def test_every_program_once(compiled, tmp_path, capsys):
    profile = write_profile(tmp_path / "h100.yaml", ("pre", "sinkhorn"), 64, GPU, "sm_90a")
    # the same program at another T; and one without C in it at another C
    other = {"kernel": "sinkhorn", "C": 128, "config": KERNELS["sinkhorn"].default(KERNELS["sinkhorn"].problem(N, 128))}
    with_entries(profile, {"tokens": 8192}, {**other, "source_hash": KERNELS["sinkhorn"].source_hash})
    assert compiled(profile, tmp_path / "bundle") == 0
    written = manifest(tmp_path / "bundle")
    assert [(p["kernel"], p["n"], p["C"], p["dtype"]) for p in written["programs"]] == [
        ("pre", 4, 64, "bfloat16"),
        ("sinkhorn", 4, None, None),
    ]
    assert (written["arch"], written["gpu"], written["command"]) == ("sm_90a", GPU, "mhc-tune compile -o bundle")
    assert written["programs"][1]["options"] == {"iters": 20, "eps": 1e-6, "order": "columns_first"}
    for program in written["programs"]:
        content = (tmp_path / "bundle" / program["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (program["bytes"], program["sha256"])
        assert program["source_hash"] == KERNELS[program["kernel"]].source_hash
    assert {p.name for p in (tmp_path / "bundle").iterdir()} == {"manifest.json", *(p["file"] for p in written["programs"])}
    assert "2 of 2 programs compiled" in capsys.readouterr().out


def test_what_runs_is_compiled_where_entries_are_stale_or_pytorch_serves(compiled, tmp_path, capsys):
    tuned = {"block_C": 128, "threads": 64}
    profile = write_profile(tmp_path / "h100.yaml", ("pre",), 64, GPU, "sm_90a", source_hash="0123", config=tuned)
    default = {**KERNELS["pre_bwd"].default(KERNELS["pre_bwd"].problem(N, 64))}
    reference = {"kernel": "pre_bwd", "impl": "reference", "config": default, "source_hash": KERNELS["pre_bwd"].source_hash}
    with_entries(profile, reference)
    assert compiled(profile, tmp_path / "bundle") == 0
    (program,) = manifest(tmp_path / "bundle")["programs"]
    assert program["kernel"] == "pre"
    assert program["config"] == KERNELS["pre"].default(KERNELS["pre"].problem(N, 64)) != tuned
    said = capsys.readouterr().out
    assert f"pre: entries of {profile} were tuned for another version" in said
    assert "1 entries of" in said
    assert "served by PyTorch" in said


def test_on_the_cpu_pytorch_serves_in_the_place_of_stale_entries(compiled, tmp_path, capsys):
    profile = write_profile(tmp_path / "cpu.yaml", ("pre",), 64, "Test CPU", "cpu", source_hash="0123")
    fresh = KERNELS["pre_bwd"]
    with_entries(profile, {"kernel": fresh.name, "source_hash": fresh.source_hash, "config": fresh.default(fresh.problem(N, 64))})
    assert compiled(profile, tmp_path / "bundle") == 0
    assert [program["kernel"] for program in manifest(tmp_path / "bundle")["programs"]] == ["pre_bwd"]
    assert (
        f"pre: entries of {profile} were tuned for another version of the kernel; compiled is what runs without them"
        in capsys.readouterr().out
    )


def test_failures_are_named_and_the_rest_is_kept(compiled, tmp_path, capsys):
    profile = write_profile(tmp_path / "h100.yaml", ("pre", "sinkhorn", "post_res"), 64, GPU, "sm_90a")
    assert compiled(profile, tmp_path / "bundle", planted_bundle.faulty) == bundle.INCOMPLETE
    assert [p["kernel"] for p in manifest(tmp_path / "bundle")["programs"]] == ["post_res"]
    failed = capsys.readouterr().err.splitlines()
    assert [line for line in failed if "not compiled: pre n=4 C=64 bfloat16 {" in line and line.endswith("no available layout found")]
    assert [line for line in failed if "not compiled: sinkhorn n=4 C=any" in line and "SIGABRT" in line]
    assert len(failed) == 2


def test_nothing_compiled_changes_nothing(compiled, tmp_path, capsys):
    profile = write_profile(tmp_path / "h100.yaml", ("pre",), 64, GPU, "sm_90a")
    assert compiled(profile, tmp_path / "bundle") == 0
    before = manifest(tmp_path / "bundle")
    assert compiled(profile, tmp_path / "bundle", planted_bundle.faulty) == bundle.INCOMPLETE
    assert manifest(tmp_path / "bundle") == before
    assert compiled(profile, tmp_path / "new", planted_bundle.faulty) == bundle.INCOMPLETE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "h100.yaml"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_bundle_is_replaced_as_a_whole(can_exchange, compiled, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda one, other: False)
    folder = tmp_path / "bundle"
    for C in (64, 128):
        profile = write_profile(tmp_path / "h100.yaml", ("pre",), C, GPU, "sm_90a")
        assert compiled(profile, folder) == 0
        assert {p.name for p in folder.iterdir()} == {"manifest.json", *(p["file"] for p in manifest(folder)["programs"])}
        assert manifest(folder)["programs"][0]["C"] == C
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "h100.yaml"]


@pytest.mark.parametrize("restarts", [False, True])  # system calls after a signal, as a library may have asked for
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(signum, restarts, compiled, tmp_path, monkeypatch, capsys, request):
    signal.siginterrupt(signal.SIGINT, not restarts)
    request.addfinalizer(lambda: signal.siginterrupt(signal.SIGINT, True))
    profile = write_profile(tmp_path / "h100.yaml", ("pre",), 64, GPU, "sm_90a")
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("PLANTED_PID", str(pid_file))
    main = threading.main_thread().ident

    def interrupt():
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.02)
        signal.pthread_kill(main, signum)

    threading.Thread(target=interrupt, daemon=True).start()
    assert compiled(profile, tmp_path / "bundle", planted_bundle.endless) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h100.yaml", "pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert "interrupted" in capsys.readouterr().err


def test_help_teaches(tmp_path):
    env = {**os.environ, "PYTHONPATH": python_path(ROOT), "COLUMNS": "160"}
    command = [sys.executable, "-m", "tuner.cli", "compile", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for text in ("--gpu", "--profile", "--kernels", "--jobs", "--output", "-o", "MHC_BUNDLE", "Exit codes", "Examples", "Needs no GPU"):
        assert text in done.stdout, text


def refused(monkeypatch, capsys, *args):
    """The line that the command refuses with."""
    monkeypatch.setattr(sys, "argv", ["mhc-tune", "compile", *args])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_the_user_can_mend(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bundle, "find_compiler", lambda hardware: "g++")
    monkeypatch.chdir(tmp_path)
    assert "--gpu is missing" in refused(monkeypatch, capsys, "-o", "b")
    assert "'--output'" in refused(monkeypatch, capsys, "--gpu", "h100")
    assert "unknown --gpu 'h1000'; did you mean 'h100'?" in refused(monkeypatch, capsys, "--gpu", "h1000", "-o", "b")
    assert "--profile nowhere.yaml: nowhere.yaml: cannot be read" in refused(monkeypatch, capsys, "--profile", "nowhere.yaml", "-o", "b")
    assert "--profile and --gpu: got both" in refused(monkeypatch, capsys, "--gpu", "h200", "--profile", "h100", "-o", "b")
    assert "unknown kernel 'prex'; did you mean 'pre'?" in refused(monkeypatch, capsys, "--gpu", "h100", "--kernels", "prex", "-o", "b")
    for name, make in {"file": lambda p: p.write_text("x"), "full": lambda p: (p.mkdir(), (p / "thesis.txt").write_text("x"))}.items():
        make(tmp_path / name)
        assert "or a bundle to replace" in refused(monkeypatch, capsys, "--gpu", "h100", "-o", name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty" / "below").mkdir(parents=True)
    monkeypatch.setattr(bundle, "compile_each", lambda *args: pytest.fail("compiled"))
    monkeypatch.chdir(tmp_path / "empty" / "below")
    for name in (".", "..", str(tmp_path / "empty" / "below")):
        assert "is, or holds, the current folder" in refused(monkeypatch, capsys, "--gpu", "h100", "-o", name)


@pytest.mark.parametrize("gpu", ["H100", " h100 ", "CPU"])
def test_a_gpu_is_found_as_other_commands_find_it(compiled, tmp_path, monkeypatch, gpu):
    seen = []
    monkeypatch.setattr(bundle, "_programs", lambda profile, names, source: (seen.append(source), ([], []))[1])
    with pytest.raises(TuneError, match="nothing to compile"):
        compiled(None, tmp_path / "bundle", gpu=gpu)
    assert seen == [gpu.strip().lower()]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_cubin_without_a_gpu(tmp_path):
    """From outside, with nvcc: then a process takes its program from the bundle, without TileLang, and another one from TileLang."""
    profile = write_profile(tmp_path / "h100.yaml", ("pre",), 256, GPU, "sm_90a")
    env = {**os.environ, "PYTHONPATH": python_path(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tuner.cli", "compile", "--profile", str(profile), "-o", "bundle"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (program,) = manifest(tmp_path / "bundle")["programs"]
    assert manifest(tmp_path / "bundle")["toolchain"].keys() == {"tilelang", "tvm_ffi", "torch", "python", "nvcc"}
    (resources,) = find_kernels((tmp_path / "bundle" / program["file"]).read_bytes())
    assert resources.name.startswith("pre")
    code = """if True:
        import sys, mhc
        from tl_kernels import KERNELS
        from tl_kernels.launch import Launcher
        kernel = KERNELS["pre"]
        p = kernel.problem(4, 256)
        found = Launcher(kernel, p, kernel.default(p), "sm_90a")
        assert callable(found._call) and "jit" not in vars(found)
        assert not {"tilelang", "tvm"} & set(sys.modules)
        made = Launcher(kernel, p, {**kernel.default(p), "threads": 64}, "sm_90a")
        assert callable(made._call) and "jit" in vars(made)
    """
    env["MHC_BUNDLE"] = str(tmp_path / "bundle")
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert child.returncode == 0, child.stderr
    assert child.stderr.count("no program for pre n=4, C=256, bfloat16") == 1
