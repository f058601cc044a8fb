"""mhc-tune check --against: another revision in a worktree, timed in turns; and the worktree is gone however it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tuner
from tests.conftest import python_path
from tests.tuner import planted_latency as planted
from tests.tuner.conftest import make_entry as entry
from tests.tuner.packaged import without
from tests.tuner.test_latency_check import by_kernel
from tuner import against
from tuner.against import worktree
from tuner.errors import TuneError
from tuner.latency_case import Case
from tuner.latency_job import surface_job
from tuner.workers import COMPILE_ENV, WorkerPool

TOP = Path(__file__).resolve().parents[2]
WHO = ("-c", "user.name=x", "-c", "user.email=x@x")
CASE = Case("pre", 4, 64, "bfloat16", 64, {"block_C": 64, "threads": 32})


def git(folder, *arguments):
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(["git", *WHO, *arguments], cwd=folder, check=True, capture_output=True, text=True, env=env).stdout.strip()


def slow_down(folder, percent):
    """Make ``pre`` do the first tokens once more after all: so many percent of them."""
    path = folder / "tl_kernels" / "pre.py"
    head, tail = path.read_text().split("def build_bwd", 1)
    changed = head.replace("T.Kernel(T_ * blocks,", f"T.Kernel((T_ + T_ * {percent} // 100) * blocks,")
    changed = changed.replace("t = b // blocks", "t = b // blocks % T_")
    assert changed.count("% T_") == 1
    assert "// 100" in changed
    path.write_text(f"{changed}def build_bwd{tail}")


@pytest.fixture
def clone(tmp_path):
    """A repository of its own with what is tracked here, as it stands: one commit."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("tl_kernels", "mhc", "tuner", "configs", "pyproject.toml"):
        copy = shutil.copytree if (TOP / name).is_dir() else shutil.copy
        copy(TOP / name, folder / name)
    without(("pre", "sinkhorn"), folder / "configs" / "cpu.yaml")
    git(folder, "init", "--quiet")
    (folder / ".gitignore").write_text("__pycache__/\n")
    commit(folder)
    return folder


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def here(monkeypatch, clone):
    """The clone, as if this process's tuner were its."""
    monkeypatch.setattr(against, "repository", lambda: clone)
    return clone


def command(folder, *args):
    env = {**os.environ, "PYTHONPATH": python_path(folder), "TMPDIR": str(folder.parent), "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-m", "tuner.cli", "check", *map(str, args)]
    return subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_over(folder):
    """What a check left in a repository and beside it."""
    trees = git(folder, "worktree", "list", "--porcelain").count("worktree ") - 1
    return trees, list(folder.parent.glob("mhc-check-*"))


def test_a_slower_kernel_is_caught(clone):
    """For real: `pre` does its work twenty times, on the CPU."""
    first = git(clone, "rev-parse", "HEAD")
    slow_down(clone, 1900)
    commit(clone)
    file = clone.parent / "c.json"
    args = (
        "--gpu",
        "cpu",
        "--kernels",
        "pre,sinkhorn",
        "--shapes",
        "64x4x1280",
        "--runs",
        1,
        "--jobs",
        1,
        "--tolerance",
        0.6,
        "--json",
        file,
    )
    process = command(clone, *args, "--against", first)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 1, out
    rows = by_kernel(file)
    assert (rows["pre"]["verdict"], rows["pre"]["causes"]) == ("regressed", ["code"])
    assert rows["pre"]["ratio"] > 2
    assert "code" not in rows["sinkhorn"]["causes"]
    assert json.loads(file.read_text())["against"] == {"rev": first, "commit": first}
    assert left_over(clone) == (0, [])


@pytest.mark.gpu
@pytest.mark.slow
def test_ten_percent_is_caught_on_a_gpu_and_nothing_else(clone):
    first = git(clone, "rev-parse", "HEAD")
    slow_down(clone, 10)
    commit(clone)
    file = clone.parent / "c.json"
    argv = [sys.executable, "-m", "tuner.cli", "check", "--kernels", "pre,post_res,pre_grad", "--shapes", "8192x4x2560", "--runs", "5"]
    env = {**os.environ, "PYTHONPATH": python_path(clone), "TMPDIR": str(clone.parent)}
    done = subprocess.run([*argv, "--json", str(file), "--against", first], cwd=clone, env=env, capture_output=True, text=True, timeout=540)
    print(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = by_kernel(file)
    assert {k: row["verdict"] for k, row in rows.items()} == {"pre": "regressed", "post_res": "same", "pre_grad": "same"}
    assert 1.05 < rows["pre"]["ratio"] < 1.2


def test_planted_ten_percent_in_runs_that_differ_by_more(check_here, profile_here, here, tmp_path):
    """What hits both revisions of a run does not hide it."""
    path, file = profile_here(entry("pre"), entry("post_res"), entry("sinkhorn")), tmp_path / "c.json"
    args = ("--profile", path, "--against", "HEAD", "--runs", 5, "--json", file)
    drift = [1.0, 1.3, 0.8, 1.1, 1.5]
    code, out = check_here(*args, us={"pre": 110.0, "post_res": 90.0}, runs=drift, program="new", other_program="old")
    assert code == 1, out
    assert "1 regressed, 1 improved, 1 same" in out
    assert "code: the generated program differs (old -> new)" in out
    pre = by_kernel(file)["pre"]
    assert pre["now"]["runs"] == pytest.approx([110.0 * f for f in drift])
    assert pre["before"]["runs"] == pytest.approx([100.0 * f for f in drift])
    assert (pre["before_us"], pre["ratio"]) == (pytest.approx(110.0), pytest.approx(1.1))
    code, out = check_here(*args, runs=drift)
    assert code == 0, out
    assert "3 entries, 3 same" in out
    assert left_over(here) == (0, [])


def test_what_only_one_revision_has_is_noted(check_here, profile_here, here, tmp_path):
    names = (here / "tl_kernels" / "__init__.py").read_text()
    path, file = profile_here(entry("pre"), entry("sum_parts")), tmp_path / "c.json"
    (here / "tl_kernels" / "__init__.py").write_text(names.replace('    "sum_parts",\n', '    "sum_of_parts",\n'))
    commit(here)
    code, out = check_here("--profile", path, "--against", "HEAD", "--json", file, surface=True)
    assert code == 0, out
    assert "1 entries are not in HEAD (" in out
    assert "there is no kernel sum_parts" in out
    assert "HEAD (" in out
    assert "has no profile called mine: its kernels run with defaults" in out
    assert "only in HEAD (" in out
    assert "sum_of_parts" in out
    assert list(by_kernel(file)) == ["pre"]


def test_the_other_revisions_profile_says_what_is_measured_there(check_here, profile_here, here, tmp_path):
    path, file = profile_here(entry("pre", C=1280, config={"block_C": 640, "threads": 64})), tmp_path / "c.json"
    theirs = path.read_text().replace("threads: 64", "threads: 32")
    (here / "configs" / "mine.yaml").write_text(theirs)
    commit(here)
    code, out = check_here("--profile", path, "--against", "HEAD", "--json", file, surface=True, us={"pre": 150.0})
    assert code == 1, out
    assert by_kernel(file)["pre"]["causes"] == ["configuration"]
    assert by_kernel(file)["pre"]["before"]["config"]["threads"] == 32
    assert "configuration: threads 32 -> 64" in out


@pytest.mark.parametrize("fault", ["crashes", "Ctrl-C", planted.SECOND + "Ctrl-C", "does not compile"])
def test_the_worktree_is_gone_however_it_ends(check_here, profile_here, here, fault):
    code, out = check_here("--profile", profile_here(entry("pre"), entry("post_res")), "--against", "HEAD", faults={"post_res": fault})
    assert code == (130 if "Ctrl-C" in fault else 3), out
    assert left_over(here) == (0, [])


@pytest.mark.parametrize("raised", [TuneError, KeyboardInterrupt, RuntimeError])
def test_the_worktree_is_gone_after_an_exception(here, tmp_path, monkeypatch, raised):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def use():
        with worktree("HEAD") as found:
            assert (Path(found.path[0]) / "tuner").resolve() == Path(tuner.__file__).resolve().parent
            assert os.listdir(found.path[0]) == ["tuner"]
            (Path(found.path[1]) / "left over").touch()
            git(here, "worktree", "lock", found.path[1])
            raise raised("x")

    with pytest.raises(raised):
        use()
    assert left_over(here) == (0, [])


def test_sigterm_removes_the_worktree(clone):
    process = command(clone, "--gpu", "cpu", "--kernels", "pre", "--against", "HEAD")
    for _ in range(600):
        if left_over(clone)[0]:
            break
        time.sleep(0.05)
    assert left_over(clone)[0] == 1
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert left_over(clone) == (0, [])


def surface(path, case=CASE):
    with WorkerPool(1, env=COMPILE_ENV, path=path) as pool:
        return pool.submit(surface_job, "cpu", [case], path[-1], timeout=60.0).result()


def test_a_process_of_a_worktree_runs_its_kernels_and_todays_tuner(here):
    slow_down(here, 10)
    (here / "tuner" / "latency_job.py").write_text("raise RuntimeError('yesterday')\n")
    commit(here)
    with worktree("HEAD") as found:
        said = surface(found.path)
    from tl_kernels import KERNELS

    assert said["hashes"]["pre"] != KERNELS["pre"].source_hash
    assert said["cases"][0].kernel == "pre"
    assert said["profile"]


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("mhc/profile.py", "def choose_from(", "def choose_of(", "cannot import name 'choose_from'"),
        ("tl_kernels/__init__.py", "", None, "it has no package tl_kernels"),
    ],
)
def test_a_revision_that_lacks_a_piece_is_one_line(check_here, profile_here, here, file, old, new, words):
    if new is None:
        shutil.rmtree(here / "tl_kernels")
    else:
        (here / file).write_text((here / file).read_text().replace(old, new))
    commit(here)
    code, out = check_here("--profile", profile_here(entry("pre")), "--against", "HEAD", surface=True)
    assert (code, out.count("\n")) == (2, 1), out
    assert re.match(r"mhc-tune: --against HEAD: [0-9a-f]{12} has not what today's check needs of it: ", out)
    assert words in out
    assert left_over(here) == (0, [])


@pytest.mark.parametrize("rev", ["nope", "", "-x", "--help", "HEAD:tuner", "a\nb", "\udcff", "HEAD..HEAD", "x" * 300])
def test_no_revision_is_one_line(check_here, profile_here, here, rev):
    code, out = check_here("--profile", profile_here(entry("pre")), f"--against={rev}")
    assert (code, out.count("\n")) == (2, 1), out
    assert "no such revision" in out


def test_outside_a_checkout_is_one_line(check_here, profile_here, monkeypatch, tmp_path):
    """As from a wheel; also where the environment lies in a repository that is another project's."""
    (tmp_path / "site" / "tuner").mkdir(parents=True)
    monkeypatch.setattr(tuner, "__file__", str(tmp_path / "site" / "tuner" / "__init__.py"))
    for init in (tmp_path / "x", tmp_path, tmp_path / "site"):
        init.mkdir(exist_ok=True)
        git(init, "init", "--quiet")
        code, out = check_here("--profile", profile_here(entry("pre")), "--against", "HEAD")
        assert (code, out.count("\n")) == (2, 1), out
        assert "site is no git checkout of this project" in out
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("tuner.latency_plan.find_compiler", lambda hardware: "g++")
    code, out = check_here("--profile", profile_here(entry("pre")), "--against", "HEAD")
    assert code == 2
    assert "--against: git cannot be run" in out
