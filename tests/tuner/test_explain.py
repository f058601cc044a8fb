"""tuner/explain.py and tuner/evidence.py: what is said of a configuration is what the run time does, and why."""

import io
import itertools
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest
import torch
from rich.console import Console

from mhc import profile as profiles
from mhc.profile import choose, choose_from, load_profile, save_profile
from mhc.schema import Entry, Profile, Provenance
from tl_kernels import KERNELS
from tuner import cli
from tuner.errors import TuneError
from tuner.evidence import verdict_text
from tuner.explain import ExplainRequest, explain, neighbours
from tuner.shape import Shape, parse_shape

TWO_DAYS_AGO = (datetime.now(timezone.utc) - timedelta(days=2, hours=1)).isoformat(timespec="seconds")
PROVENANCE = Provenance(
    gpu="Test CPU",
    arch="cpu",
    torch="2.13",
    tilelang="0.0.1",
    copy_gbps=10.0,
    seed=0,
    trials=3,
    date=TWO_DAYS_AGO,
    commit="abc",
    command="x",
)
WIN = {
    "time_us": 90.0,
    "time_ci_us": (89.5, 90.5),
    "default_us": 100.0,
    "default_ci_us": (99.0, 101.0),
    "runner_up_us": 91.0,
    "runner_up_ci_us": (90.0, 92.0),
    "gain_ci": (0.0912, 0.1088),
    "verdict": "win",
    "registers": 64,
    "stack": 8,
    "shared_bytes": 22528,
    "trials": 16,
    "sampler": "tpe",
    "funnel": {"space": 40, "constraint": 10, "shared": 3, "ok": 12, "slow": 4},
    "clock_mhz": 1755.0,
    "tilelang": "0.0.2",
    "driver": "580.1",
    "date": TWO_DAYS_AGO,
    "commit": "def",
}


def entry(kernel="pre", C=2560, tokens=8192, config=None, source_hash=None, **fields):
    spec = KERNELS[kernel]
    measured = {"time_us": 100.0, "time_ci_us": (99.0, 101.0), "default_us": 100.0, "verdict": "default"}
    return Entry(
        kernel=kernel, n=4, C=C, dtype="bfloat16", tokens=tokens, config=config or spec.default(spec.problem(4, C)), gbps=5.0,
        copy_share=0.5, error={"u": 1.5e-3}, source_hash=source_hash or spec.source_hash, **{**measured, **fields},
    )  # fmt: skip


@pytest.fixture
def said(tmp_path):
    """``said(shape, *entries, ...)``: exit code and text."""

    def run(shape, *entries, kernel="pre", where=PROVENANCE, **options):
        path = tmp_path / "p.yaml"
        save_profile(Profile(schema_version=1, provenance=where, entries=list(entries)), path)
        stream = io.StringIO()
        request = ExplainRequest(kernel, shape, profile=str(path), **options)
        return explain(request, Console(file=stream, width=140, highlight=False)), stream.getvalue()

    return run


def line(text, label):
    (found,) = [row for row in text.splitlines() if row.startswith(f"{label} ")]
    return found


def test_an_exact_entry_with_all_that_speaks_for_it(said):
    tuned = {"block_C": 256, "threads": 32}
    code, text = said("8192x4x2560", entry(config=tuned, **WIN))
    assert code == 0
    assert "exact: the entry tuned at T=8192, n=4, C=2560, bfloat16" in line(text, "runs with")
    default = KERNELS["pre"].default(KERNELS["pre"].problem(4, 2560))
    assert line(text, "block_C").split()[1:] == ["256", str(default["block_C"])]
    assert line(text, "tuned").split() == ["tuned", "90.0", "89.5", "to", "90.5", "5.0", "50.0%"]
    assert line(text, "default").split() == ["default", "100.0", "99.0", "to", "101.0", "4.5", "45.0%"]
    assert line(text, "runner-up").split()[:5] == ["runner-up", "91.0", "90.0", "to", "92.0"]
    assert "win: it takes 10.0% less time than the default (95% sure: 9.1% to 10.9%)" in line(text, "verdict")
    assert "u 0.0015 (relative, against float64)" in line(text, "error")
    assert "64 registers a thread, 8 bytes of stack a thread" in line(text, "resources")
    assert "22528 bytes of shared memory a block" in line(text, "resources")
    assert "16 tried by tpe; 40 configurations: 10 ruled out by the kernel's constraints, 3 with too much shared" in line(text, "search")
    assert "multiprocessors at 1755 MHz, not disturbed" in line(text, "timing")
    assert "as in this checkout" in line(text, "kernel")
    assert "0.0.2, here 0." in line(text, "TileLang")
    assert "580.1" in line(text, "driver")
    assert "(2 days ago), commit def" in text
    assert "STALE" not in text


def test_a_default_that_does_not_work_has_no_time(said):
    code, text = said("8192x4x2560", entry(config={"block_C": 256, "threads": 32}, **{**WIN, "default_us": None, "default_ci_us": None}))
    assert code == 0
    assert "the default configuration does not work here" in line(text, "verdict")
    assert [row.split()[0] for row in text.splitlines() if row.startswith(("tuned ", "default ", "runner-up "))] == ["tuned", "runner-up"]


def test_the_default_it_was_compared_with_is_shown_where_it_has_changed(said):
    now, then = KERNELS["pre"].default(KERNELS["pre"].problem(4, 2560)), {"block_C": 256, "threads": 32}
    _, text = said("8192x4x2560", entry(config=dict(now), default_config=then, **WIN))
    assert line(text, "block_C").split()[1:] == [str(now["block_C"]), str(now["block_C"]), "256"]
    assert line(text, "default then").split()[2:6] == ["100.0", "99.0", "to", "101.0"]
    _, text = said("8192x4x2560", entry(config=then, default_config=then, verdict="default"))
    assert line(text, "default then").split()[2:3] == ["100.0"]
    _, text = said("8192x4x1280", entry(config=then, default_config=dict(now), **WIN))
    assert line(text, "default").split()[1] == "100.0"
    assert "default then" not in text


def test_an_entry_of_an_older_tuner_says_what_it_does_not_hold(said):
    code, text = said("8192x4x2560", entry(verdict="win", time_us=90.0))
    assert code == 0
    assert "its interval was not kept, but it was clear of the default's" in line(text, "verdict")
    for label in ("resources", "search", "timing"):
        assert "not kept in this entry" in line(text, label)
    assert "0.0.1, here 0." in line(text, "TileLang")
    assert "commit abc" in text
    assert "this entry may be older" in text


def test_a_disturbed_timing_is_said_to_be(said):
    assert "DISTURBED: clocks fell by 8%" in said("8192x4x2560", entry(**{**WIN, "dirty": "clocks fell by 8%"}))[1]


def test_a_shape_that_was_not_tuned_gets_the_nearest_entry(said):
    code, text = said("8192x4x2048", entry(), entry(C=7168))
    assert code == 0
    assert "nearest: the entry tuned at T=8192, n=4, C=2560, bfloat16; this shape was not tuned" in line(text, "runs with")
    assert "at the entry's shape, T=8192, n=4, C=2560, bfloat16" in line(text, "measured")


@pytest.mark.parametrize(("arch", "serves"), [("cpu", "PyTorch"), ("sm_90a", "the default configuration")])
def test_a_kernel_without_entries_runs_its_default(said, arch, serves):
    code, text = said("8192x4x2560", entry("post_res"), where=PROVENANCE.model_copy(update={"arch": arch}))
    assert code == 0
    assert f"{serves}: the profile has no entry that is good for this" in line(text, "runs with")
    assert "verdict" not in text


@pytest.mark.parametrize(("sm_count", "reserved", "taken"), [(148, "", True), (132, "", False), (132, "20", True)])
def test_a_design_that_would_leave_nccl_too_little_is_said_to_be_taken_by_no_boundary(said, monkeypatch, sm_count, reserved, taken):
    monkeypatch.setenv("MHC_RESERVED_SMS", reserved)
    gpu = PROVENANCE.model_copy(update={"gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90a", "sm_count": sm_count})
    _, text = said("4096x4x7168", entry("pre_streams_grad", C=7168, tokens=4096), kernel="pre_streams_grad", where=gpu)
    assert ("none takes it, so that 32 multiprocessors are left to NCCL" in text) != taken
    assert ("112 blocks wait for each other, wanted at most 100" in text) != taken


def test_a_kernel_whose_blocks_do_not_wait_is_taken_however_many_multiprocessors_are_left_to_nccl(said, monkeypatch):
    monkeypatch.setenv("MHC_RESERVED_SMS", "200")
    gpu = PROVENANCE.model_copy(update={"gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90a", "sm_count": 132})
    _, text = said("64x4x64", entry("pre"), where=gpu)
    assert "none takes it" not in text


def test_reserved_multiprocessors_that_are_no_number_are_one_line(said, monkeypatch):
    monkeypatch.setenv("MHC_RESERVED_SMS", "some")
    with pytest.raises(TuneError, match="MHC_RESERVED_SMS: got 'some', wanted a number of multiprocessors"):
        said("64x4x64", entry("pre"))


def test_a_shortcut_that_the_profile_has_not_is_said_to_be_taken_by_nobody(said):
    hopper = PROVENANCE.model_copy(update={"arch": "sm_90a"})
    code, text = said("8192x4x2560", entry("post_res"), kernel="pre_streams_grad", where=hopper)
    assert code == 0
    assert "the default configuration when called by itself; no boundary takes it" in line(text, "runs with")


def test_a_stale_entry_is_shown_for_what_it_is(said):
    code, text = said("8192x4x2560", entry(config={"old_knob": 7}, source_hash="0" * 16, **WIN), entry(C=7168))
    assert code == 1
    assert "nearest: the entry tuned at T=8192, n=4, C=7168" in line(text, "runs with")
    assert "tuned for another version of the kernel and is not used; run: mhc-tune --gpu cpu --kernels pre" in line(text, "STALE")
    assert line(text, "old_knob").split() == ["old_knob", "-", "-", "7"]
    assert f"source {'0' * 16}, in this checkout {KERNELS['pre'].source_hash}" in line(text, "kernel")


def test_other_shapes_get_what_the_run_time_would_give_them(said):
    small, large = {"block_C": 256, "threads": 32}, {"block_C": 640, "threads": 80}
    entries = [entry(tokens=64, config=small), entry(tokens=8192, config=large)]
    _, text = said("8192x4x2560", *entries, unseen="1x4x2560,9000x4x2560,64x4x5120")
    rows = text[text.index("other shapes get") :]
    assert line(rows, "1x4x2560").split()[1] == "nearest"
    assert "block_C=256, threads=32" in line(rows, "1x4x2560")
    assert line(rows, "9000x4x2560").split()[1] == "exact"
    assert "block_C=640, threads=80" in line(rows, "9000x4x2560")
    assert "T=64, n=4, C=2560" in line(rows, "64x4x5120")


def test_an_entry_that_does_not_fit_is_refused_with_its_reason(said):
    _, text = said("8192x4x2560", entry(C=2560, config={"block_C": 0, "threads": 32}))
    assert "PyTorch: the profile has no entry" in line(text, "runs with")
    assert "not by the entry n=4, C=2560, bfloat16, tokens=8192" in line(text, "runs with")


def test_neighbours_are_those_the_program_can_tell_apart():
    assert neighbours(KERNELS["pre"], Shape(8, 4, 64)) == [Shape(1, 4, 64), Shape(64, 4, 64), Shape(8, 4, 32), Shape(8, 4, 96)]
    assert neighbours(KERNELS["sinkhorn"], Shape(1, 4, 64)) == [Shape(8, 4, 64)]
    assert neighbours(KERNELS["sum_parts"], Shape(8, 4, 64)) == [Shape(8, 4, 32), Shape(8, 4, 96)]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"verdict": "win", "time_us": 90.0, "gain_ci": (0.08, 0.12)}, "win: it takes 10.0% less time than the default (95% sure: 8.0% to"),
        ({"verdict": "tie", "gain_ci": (-0.002, 0.009)}, "takes -0.2% to 0.9% less time than the default (95% sure), not clearly more"),
        ({"verdict": "default", "gain_ci": (-0.03, -0.02)}, "the best other takes 2.0% to 3.0% more time (95% sure)"),
        ({"verdict": "default"}, "default: nothing that was tried is faster"),
        ({"verdict": "win", "default_us": None}, "win: the fastest that works ships; the default configuration does not work here"),
        ({"verdict": "win", "default_us": None, "impl": "reference"}, "PyTorch serves; the default configuration does not work here"),
        ({"verdict": "default", "impl": "reference", "time_us": 60.0}, "PyTorch serves: it takes 40.0% less time"),
    ],
)  # fmt: skip
def test_the_verdict_in_words(fields, text):
    assert text in verdict_text(entry(**fields))


def test_it_never_disagrees_with_the_run_time(tmp_path, monkeypatch, caplog):
    """Every shape, from entries good, stale and refused: the choice without a device is the choice on it."""
    entries = [
        entry(tokens=64, config={"block_C": 256, "threads": 32}),
        entry(tokens=8192, config={"block_C": 640, "threads": 80}),
        entry(C=4096, config={"block_C": 0, "threads": 32}),
        entry(C=1280, tokens=512, source_hash="0" * 16),
        entry(C=1280, tokens=64, impl="reference"),
        entry("sinkhorn", tokens=64),
        entry("post_res", C=7168),
    ]
    path, device = tmp_path / "p.yaml", torch.device("cpu")
    save_profile(Profile(schema_version=1, provenance=PROVENANCE, entries=entries), path)
    profile = load_profile(path)
    try:
        origins = set()
        for name, T, n, C, dtype in itertools.product(
            ("pre", "sinkhorn", "post_res", "sum_parts"), (0, 1, 63, 700, 9000), (2, 4), (64, 1280, 2560, 5000), ("bfloat16", "float32")
        ):
            p = KERNELS[name].problem(n, C, dtype)
            found, _ = choose_from(profile, name, p, T)
            served = choose(name, p, T, device)
            assert (found, found.tuned) == (served, served.tuned), (name, T, p)
            origins.add((found.origin, found.impl))
        assert origins == {
            ("exact", "tilelang"),
            ("nearest", "tilelang"),
            ("nearest", "reference"),
            ("exact", "reference"),
            ("default", "reference"),
        }
    finally:
        profiles.reset()


@pytest.mark.parametrize(
    "text", ["8192", "8192x4", "0x4x64", "8x9x64", "8x0x64", "8x4x0", "-8x4x64", "8x4x64x1", "", "9" * 40 + "x4x64", "٣x4x64"]
)
def test_a_wrong_shape_is_named(text):
    with pytest.raises(TuneError, match=r"^shape: got '"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["post_ress", "8192x4x2560"], "unknown kernel 'post_ress'; did you mean 'post_res'?"),
        (["pre", "8192"], "shape: got '8192', wanted TxnxC such as 8192x4x2560"),
        (["pre", "8x4x64", "--dtype", "bf16"], "--dtype: got 'bf16', wanted one of bfloat16, float16, float32"),
        (["pre", "8x4x64", "--gpu", "h10"], "unknown --gpu 'h10'; did you mean 'h100'?"),
        (["pre", "8x4x64", "--profile", "no/such.yaml"], "--profile: no/such.yaml: cannot be read"),
        (["pre", "8x4x64", "--profile", "h100", "--gpu", "h100"], "--profile and --gpu: got both"),
        (["pre", "8x4x64", "--gpu", "h100", "--unseen", "8x4x64,"], "--unseen: got ''"),
        (["project_pre", "8x4x64", "--gpu", "cpu"], "there is nothing to explain"),
        (["pre"], "Missing argument"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(monkeypatch, capsys, args, complaint):
    monkeypatch.setattr(sys, "argv", ["mhc-tune", "explain", *args])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert complaint in shown.err
    assert shown.err.count("\n") == 1


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mhc-tune", "explain", "--help"])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for word in ("TxnxC", "--unseen", "--profile", "Exit code 1", "mhc-tune explain post_res 8192x4x2560"):
        assert word in text, word


def test_the_profile_of_the_environment_counts_and_none_is_none(monkeypatch, tmp_path):
    stream = io.StringIO()
    monkeypatch.setenv("MHC_PROFILE", "none")
    assert explain(ExplainRequest("pre", "8x4x64"), Console(file=stream, width=140)) == 0
    assert "MHC_PROFILE=none: PyTorch serves" in stream.getvalue()
    monkeypatch.setenv("MHC_PROFILE", "nowhere.yaml")
    with pytest.raises(TuneError, match=r"^MHC_PROFILE: nowhere\.yaml: cannot be read"):
        explain(ExplainRequest("pre", "8x4x64"))


def test_in_a_pipe_it_is_plain(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "explain", "post_res", "8192x4x2560", "--gpu", "h100"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode in (0, 1), done.stderr
    assert "post_res at T=8192, n=4, C=2560, bfloat16" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
