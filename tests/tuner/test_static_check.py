"""mhc-tune check --static: verdicts, exit codes and every output; planted regressions, and a sample of the profile that ships."""

import functools
import json
import shlex
import xml.etree.ElementTree as ET
from datetime import datetime

import pytest

from mhc.profile import packaged_dir, read_profile, save_profile
from mhc.schema import Profile, Provenance
from tests.tuner import planted_fingerprints, planted_programs
from tests.tuner.conftest import make_entry, outcome
from tests.tuner.test_fingerprint import compiles
from tuner import cli, static_check
from tuner.commands import check as check_command
from tuner.fingerprint import fingerprint_job, fingerprints_path, read_fingerprints
from tuner.selection import Selection
from tuner.static_check import StaticRequest, programs_of

#: Of every way to move data: copied by threads, through registers alone, summed across threads, by async copies. Seconds to compile.
SAMPLE = "pre,post_res,pre_bwd,sum_parts,sinkhorn"

entry = functools.partial(make_entry, C=2560, tokens=8192)


def outputs(wanted):
    """The options of files to write, as arguments."""
    return [str(x) for pair in wanted.items() for x in pair]


@pytest.fixture
def profile(tmp_path):
    """A function that writes a profile of these entries and gives its path."""
    where = {"gpu": "NVIDIA H100", "arch": "sm_90a", "torch": "2", "tilelang": "0.1.15", "copy_gbps": 3000.0}
    provenance = Provenance(**where, seed=0, trials=1, date="2026-11-22", command="x")

    def write(*entries, **changes):
        path = tmp_path / "h100.yaml"
        save_profile(Profile(schema_version=1, provenance=provenance.model_copy(update=changes), entries=list(entries)), path)
        return path

    return write


@pytest.fixture
def check(monkeypatch, capsys):
    """``check(*args, planted={...}) -> exit code, what was printed``: the command in this process, its compilers planted."""
    monkeypatch.setattr("tuner.hardware._gpu", lambda: None)
    monkeypatch.setattr(static_check, "find_compiler", lambda hardware: "nvcc")
    monkeypatch.setattr(static_check, "find_nvdisasm", lambda: "nvdisasm")

    def run(*args, planted=None, job=planted_fingerprints.fingerprint_planted):
        monkeypatch.setattr(static_check, "fingerprint_job", job)
        monkeypatch.setenv(planted_fingerprints.VARIABLE, json.dumps(planted or {}))
        return outcome(monkeypatch, capsys, "check", *args)

    return run


def test_from_update_to_every_verdict_and_every_output(check, profile, tmp_path, monkeypatch):
    for name in ("MHC_BACKEND", "MHC_PROFILE"):  # they would stand before the command
        monkeypatch.delenv(name, raising=False)
    path = profile(entry("pre"), entry("pre", tokens=64), entry("post_res"), entry("pre_bwd"), entry("sum_parts"), entry("project"))
    args = ("--static", "--profile", path)
    code, out = check(*args)
    assert (code, out.count("\n")) == (2, 1)
    assert (
        f"{fingerprints_path(path)}: no fingerprints to compare with; write them: mhc-tune check --static --profile {path} --update" in out
    )

    code, out = check(*args, "--update")
    assert code == 0, out
    assert "wrote 5 of 5 fingerprints" in out, "one for both entries of pre"
    assert check(*args)[0] == 0

    wanted = {"--json": tmp_path / "c.json", "--junit": tmp_path / "c.xml", "--summary": tmp_path / "c.md"}
    planted = {
        "pre": {"stack": 16, "local_loads": 4, "local_stores": 4, "barriers": 2},
        "post_res": {"loads": {"32": 10, "4": 5}},
        "pre_bwd": {"barriers": 3},
        "sum_parts": "nvcc said | no\x1b[0m",
    }
    code, out = check(*args, *outputs(wanted), planted=planted)
    assert code == 1, out
    assert "stack 0 -> 16 bytes a thread" in out
    assert "5 programs, 1 regressed, 1 not compiled, 1 better, 1 noted, 1 same" in out
    whole = json.loads(wanted["--json"].read_text())
    assert whole["exit_code"] == 1
    assert (whole["mode"], whole["command"]) == ("static", shlex.join(["mhc-tune", "check", *map(str, args), *outputs(wanted)]))
    datetime.fromisoformat(whole["date"])
    assert {row["kernel"]: row["verdict"] for row in whole["programs"]} == {
        "pre": "regressed",
        "post_res": "better",
        "pre_bwd": "noted",
        "sum_parts": "not compiled",
        "project": "same",
    }
    (pre,) = (row for row in whole["programs"] if row["kernel"] == "pre")
    assert (pre["was"]["stack"], pre["now"]["stack"]) == (0, 16)
    root = ET.fromstring(wanted["--junit"].read_text())
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors")} == {"tests": "5", "failures": "1", "errors": "1"}
    cases = {case.attrib["classname"]: case for case in root.iter("testcase")}
    assert "stack 0 -> 16" in cases["pre"].find("failure").attrib["message"]
    assert cases["sum_parts"].find("error") is not None
    assert cases["pre_bwd"].find("system-out").text == "noted: barriers 1 -> 3"
    assert len(cases["project"]) == 0
    assert cases["pre"].attrib["time"] == "0.250"
    text = wanted["--summary"].read_text()
    assert text.startswith("### Failed: h100, sm")
    assert "nvcc said \\| no" in text
    assert text.count("\n|") == 2 + 4, "a head and what moved"

    code, out = check(*args, "--kernels", "sum_parts", *outputs(wanted), planted=planted)
    assert code == 3, out
    assert wanted["--summary"].read_text().startswith("### Incomplete: ")
    root = ET.fromstring(wanted["--junit"].read_text())
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors")} == {"tests": "1", "failures": "0", "errors": "1"}
    code, out = check(*args, "--kernels", "post_res", "--summary", wanted["--summary"], planted=planted)
    assert code == 0, out
    assert wanted["--summary"].read_text().startswith("### Passed: ")

    # a part is written into the whole, and what does not compile keeps what it had
    code, out = check(*args, "--kernels", "pre,sum_parts", "--update", planted=planted)
    assert code == 3, out
    kept = read_fingerprints(fingerprints_path(path)).programs
    assert {name.split()[0]: f.stack for name, f in kept.items()} == {"pre": 16, "post_res": 0, "pre_bwd": 0, "sum_parts": 0, "project": 0}


def test_what_update_accepts_has_passed_in_every_output(check, profile, tmp_path):
    path = profile(entry("pre"), entry("post_res"))
    args = ("--static", "--profile", path)
    check(*args, "--kernels", "pre", "--update")
    wanted = {"--json": tmp_path / "c.json", "--junit": tmp_path / "c.xml", "--summary": tmp_path / "c.md"}
    code, out = check(*args, "--update", *outputs(wanted), planted={"pre": {"stack": 16}})
    assert code == 0, out
    assert "2 programs, 2 noted" in out
    whole = json.loads(wanted["--json"].read_text())
    assert [row["findings"] for row in whole["programs"]] == [["stack 0 -> 16 bytes a thread"], ["no committed fingerprint"]]
    assert wanted["--summary"].read_text().startswith("### Passed: ")
    root = ET.fromstring(wanted["--junit"].read_text())
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors")} == {"tests": "2", "failures": "0", "errors": "0"}


def test_a_program_without_a_fingerprint_fails_and_one_too_many_is_noted(check, profile):
    path = profile(entry("pre"), entry("post_res"))
    args = ("--static", "--profile", path)
    check(*args, "--update")
    profile(entry("pre"), entry("sum_parts", source_hash="of old"))
    code, out = check(*args)
    assert code == 1, out
    assert "2 programs, 1 uncovered, 1 same" in out
    assert f"1 programs have no committed fingerprint; to write them: mhc-tune check --static --profile {path} --update\n" in out
    assert "1 fingerprints are of programs that the profile no longer has" in out
    assert "1 programs come from entries tuned for another version" in out
    assert check(*args, "--update")[0] == 0
    assert [name.split()[0] for name in read_fingerprints(fingerprints_path(path)).programs] == ["pre", "sum_parts"]


def test_another_nvcc_warns_unless_strict_and_another_tilelang_counts(check, profile):
    args = ("--static", "--profile", profile(entry("pre")))
    check(*args, "--update")
    newer = {"pre": {"stack": 16, "nvcc": "13.1.0"}}
    code, out = check(*args, planted=newer)
    assert code == 0, out
    assert "1 programs, 1 warned" in out
    assert "by nvcc 13.1.0, committed by 13.0.88" in out
    assert "toolchain: nvcc 13.0.88 -> 13.1.0; what it made worse is a warning" in out
    assert check(*args, "--strict", planted=newer)[0] == 1
    code, out = check(*args, planted={"pre": {"stack": 16, "tilelang": "0.1.16"}})
    assert code == 1, out
    assert "toolchain: tilelang 0.1.15 -> 0.1.16" in out


def test_a_configuration_that_its_kernel_no_longer_takes_is_not_compiled(check, profile):
    path = profile(entry("pre", config={"block_C": 640, "warps": 2}), entry("post_res"))
    code, out = check("--static", "--profile", path, "--update", "--json", path.with_suffix(".json"))
    assert code == 3, out
    first = json.loads(path.with_suffix(".json").read_text())["programs"][0]
    assert (first["verdict"], first["now"]) == ("not compiled", None)
    assert first["findings"] == ["its config has block_C, warps, wanted block_C, threads"]


def test_filters_keep_what_they_name(profile):
    one = [entry("pre"), entry("pre", C=4096, tokens=2048), entry("sinkhorn"), entry("sinkhorn", C=4096), entry("sum_parts", tokens=8192)]
    read = read_profile(profile(*one))
    names = lambda **filters: [p.name for p in programs_of(read, StaticRequest(selection=Selection(**filters)))]  # noqa: E731
    pre, wide, sinkhorn, parts = names()
    assert sinkhorn.startswith("sinkhorn n=4 ("), "one program for every C"
    assert names(kernels="pre") == [pre, wide]
    assert names(workloads="deepseek-v4-flash") == [wide, sinkhorn]
    assert names(shapes="8192x4x2560") == [pre, sinkhorn, parts]
    assert names(shapes="2048x4x2560,2048x4x4096") == [wide, parts], "a second stage has no tokens"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "check: there is no GPU here; to compile and compare without one: mhc-tune check --static"),
        (("--static",), "--gpu auto: got no GPU with a profile, wanted one of h100, h200"),
        (("--static", "--gpu", "h10"), "unknown --gpu 'h10'; did you mean 'h100'?"),
        (("--static", "--gpu", "h100", "--profile", "h100"), "--profile and --gpu: got both"),
        (("--static", "--profile", "none/such.yaml"), "none/such.yaml: cannot be read"),
        (("--static", "--profile", "cpu"), "got a profile of a CPU, wanted one of a GPU"),
        (("--static", "--gpu", "h100", "--kernels", "prae"), "unknown kernel 'prae'; did you mean 'pre'?"),
        (("--static", "--gpu", "h100", "--workloads", "mhc-27"), "unknown workload 'mhc-27'; did you mean 'mhc-27b'?"),
        (("--static", "--gpu", "h100", "--shapes", "4x2560"), "--shapes: got '4x2560', wanted TxnxC"),
        (("--static", "--gpu", "h100", "--shapes", "1x1x1"), "got filters that no entry of the profile passes"),
        (("--static", "--gpu", "h100", "--fingerprints", "no/such.json"), "no/such.json: no fingerprints to compare with"),
        (("--static", "--gpu", "H200", "--fingerprints", "no/such.json"), "write them: mhc-tune check --static --gpu h200 --update"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(check, args, words):
    code, out = check(*args)
    assert code == 2, out
    assert words in out
    assert out.count("\n") == 1


def test_examples_name_the_gpu():
    """Several profiles are packaged: without a GPU here one must be named."""
    examples = [line for text in (check_command.EPILOG, cli.EPILOG) for line in text.splitlines() if "check --static" in line]
    assert len(examples) == 5
    assert all("check --static --gpu h100" in line for line in examples)


def test_fingerprints_of_another_architecture_are_refused(check, profile):
    args = ("--static", "--profile", profile(entry("pre")))
    check(*args, "--update")
    profile(entry("pre"), arch="sm_100a")
    code, out = check(*args)
    assert code == 2
    assert "got fingerprints of sm_90a, wanted those of the profile's sm_100a" in out


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_a_profile_that_ships_has_a_fingerprint_for_each_of_its_programs_and_no_other(gpu):
    path = packaged_dir() / f"{gpu}.yaml"
    programs = programs_of(read_profile(path), StaticRequest())
    assert [p.name for p in programs if p.why_not] == []
    assert read_fingerprints(fingerprints_path(path)).programs.keys() == {p.name for p in programs}


@compiles
@pytest.mark.slow
def test_a_sample_of_the_profile_that_ships_has_not_regressed(check):
    """The gate of `make test`; all of it: mhc-tune check --static."""
    code, out = check("--static", "--gpu", "h100", "--kernels", SAMPLE, "--shapes", "8192x4x2560", job=fingerprint_job)
    assert code == 0, out
    assert "5 programs, " in out


@compiles
@pytest.mark.slow
def test_planted_regressions_fail_the_command(check, profile, monkeypatch):
    path = profile(entry("pre"), entry("pre_bwd"))
    args = ("--static", "--profile", path)
    assert check(*args, "--update", job=fingerprint_job)[0] == 0
    assert check(*args, job=fingerprint_job)[0] == 0
    for name in planted_programs.VARIANTS:
        monkeypatch.setenv(planted_programs.VARIABLE, name)
        code, out = check(*args, job=planted_programs.fingerprint_variant)
        assert code == 1, out
        assert "2 programs, 1 regressed, 1 same" in out
