"""mhc-tune check: verdicts, exit codes and every output, over planted times in real processes; and one real run on the CPU."""

import json
import xml.etree.ElementTree as ET

import pytest

from tests.tuner import planted_latency as planted
from tests.tuner.conftest import make_entry as entry
from tl_kernels import KERNELS
from tuner import latency_job, latency_runs
from tuner.device_state import State, Watch
from tuner.hardware import cpu_model
from tuner.latency_case import Case, label
from tuner.latency_report import in_step
from tuner.noise import noise_path, read_noise
from tuner.timing import Clock

TIMED = ("--baseline", "--against", "--calibrate", "--runs", "--tolerance", "--floor-us")


def by_kernel(path):
    return {row["kernel"]: row for row in json.loads(path.read_text())["programs"]}


def test_ten_percent_is_caught_and_gains_are_told_in_every_output(check_here, profile_here, tmp_path):
    path = profile_here(entry("pre"), entry("post_res"), entry("sinkhorn"), entry("sinkhorn", C=128), entry("pre_bwd", source_hash="old"))
    wanted = {"--json": tmp_path / "c.json", "--junit": tmp_path / "c.xml", "--summary": tmp_path / "c.md"}
    args = ("--profile", path, *[x for pair in wanted.items() for x in pair])
    code, out = check_here(*args)
    assert code == 0, out
    assert "4 entries, 4 same" in out
    assert "[run 3/3]" in out
    assert "copy bandwidth 30.0 GB/s, in the baseline 30.0" in out
    assert "1 entries were tuned for another version of their kernel" in out
    assert wanted["--summary"].read_text().startswith("### Passed: mine, against")

    code, out = check_here(*args, us={"pre": 110.0, "post_res": 80.0, "pre_bwd": 120.0}, runs=[1.0, 1.01, 0.99])
    assert code == 1, out
    assert "2 regressed, 1 improved, 1 same" in out
    assert "100.0 -> 110.0 us (+10.0%; band" in out
    whole = json.loads(wanted["--json"].read_text())
    assert {k: whole[k] for k in ("mode", "exit_code", "runs", "baseline", "against", "false_alarms")} == {
        "mode": "baseline", "exit_code": 1, "runs": 3, "baseline": str(path), "against": None, "false_alarms": None,
    }  # fmt: skip
    assert whole["gpu"] == cpu_model()
    assert whole["copy_gbps"] == {"now": 30.0, "before": 30.0}
    rows = by_kernel(wanted["--json"])
    assert {k: row["verdict"] for k, row in rows.items()} == {
        "pre": "regressed", "post_res": "improved", "sinkhorn": "same", "pre_bwd": "regressed",
    }  # fmt: skip
    assert {k: row["causes"] for k, row in rows.items()} == {
        "pre": ["unexplained"],
        "post_res": ["unexplained"],
        "sinkhorn": [],
        "pre_bwd": ["code"],
    }
    pre = rows["pre"]
    assert pre["program"] == "pre n=4 C=64 bfloat16 T=64"
    assert pre["key"] == {"n": 4, "C": 64, "dtype": "bfloat16", "tokens": 64}
    assert pre["now"]["runs"] == pytest.approx([110.0, 111.1, 108.9])
    assert pre["before"]["runs"] == [100.0]
    assert pre["ratio"] == pytest.approx(1.1)
    assert pre["band_from"] == "pooled"
    root = ET.fromstring(wanted["--junit"].read_text())
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors")} == {"tests": "4", "failures": "2", "errors": "0"}
    cases = {case.attrib["classname"]: case for case in root.iter("testcase")}
    assert "100.0 -> 110.0 us" in cases["pre"].find("failure").attrib["message"]
    assert cases["post_res"].find("system-out").text.startswith("improved: ")
    text = wanted["--summary"].read_text()
    assert text.startswith("### Failed: mine, against ")
    assert text.count("\n|") == 2 + 3, "a head and what moved"


def test_noise_the_rule_and_its_options(check_here, profile_here):
    path = profile_here(entry("pre"))
    slow, jumpy = {"pre": 110.0}, [1.0, 1.2, 0.85, 1.0, 1.1]
    code, out = check_here("--profile", path, "--runs", 5, us=slow, runs=jumpy)
    assert code == 0, out
    assert "1 entries, 1 noise" in out
    assert "1 entries by what their own runs of this check differ by" in out
    assert check_here("--profile", path, "--runs", 5, us=slow)[0] == 1
    assert check_here("--profile", path, "--runs", 1, "--tolerance", 0.2, us=slow)[0] == 0
    assert check_here("--profile", path, "--runs", 1, "--floor-us", 11, us=slow)[0] == 0
    code, out = check_here("--profile", path, "--runs", 1, us=slow)
    assert code == 1
    assert "noise: unknown for 1 entries" in out


def test_calibration_writes_bands_that_later_checks_judge_by(check_here, profile_here, tmp_path):
    path = profile_here(entry("pre"), entry("post_res"))
    runs = [1.0, 1.01, 0.99, 1.005, 0.995, 1.25]
    out_json = tmp_path / "c.json"
    code, out = check_here("--profile", path, "--calibrate", 6, "--json", out_json, runs=runs)
    assert code == 0, out
    assert "false alarms: 2 of 12 (16.67%; 2 entries, 6 runs each judged against the others), in 1 of 6 runs" in out
    alarms = json.loads(out_json.read_text())["false_alarms"]
    assert (alarms["judged"], alarms["regressed"], alarms["runs_with_alarm"]) == (12, 2, 1)
    noise = read_noise(noise_path(path))
    assert noise.gpu == cpu_model()
    assert {name.split()[0]: (band.runs, band.band > 0.24) for name, band in noise.entries.items()} == {
        "pre": (6, True),
        "post_res": (6, True),
    }

    code, out = check_here("--profile", path, us={"pre": 115.0})
    assert code == 0, out
    assert "(+15.0%; band 24" in out
    assert "2 entries by the calibration of " in out
    # a part is written into the whole
    assert check_here("--profile", path, "--calibrate", 3, "--kernels", "pre")[0] == 0
    found = read_noise(noise_path(path)).entries
    assert {name.split()[0]: (band.runs, band.band) for name, band in found.items()}["pre"] == (3, 0.0)
    assert len(found) == 2
    assert check_here("--profile", path, us={"pre": 115.0})[0] == 1

    noise_path(path).write_text(noise_path(path).read_text().replace(cpu_model(), "another CPU"))
    code, out = check_here("--profile", path)
    assert code == 0
    assert "its bands are of another CPU" in out
    noise_path(path).write_text('{"entries": {"pre": 1}}')
    code, out = check_here("--profile", path)
    assert (code, out.count("\n")) == (2, 1)
    assert f"{noise_path(path)}: " in out
    assert "gpu: missing" in out


def test_clocks_warn_unless_strict(check_here, profile_here):
    args = ("--profile", profile_here(entry("pre", clock_mhz=1980.0)), "--runs", 2)
    code, out = check_here(*args, us={"pre": 112.0}, clock=1755.0)
    assert code == 0, out
    assert "1 entries, 1 clocks" in out
    assert "SM clock 1980 -> 1755 MHz" in out
    assert check_here(*args, "--strict", us={"pre": 112.0}, clock=1755.0)[0] == 1
    assert check_here(*args, us={"pre": 112.0}, clock=1980.0)[0] == 1
    assert "this timing was disturbed: hw_slowdown" in check_here(*args, us={"pre": 112.0}, clock=1980.0, dirty="hw_slowdown")[1]


def test_another_baseline_and_what_only_one_profile_has(check_here, profile_here):
    path = profile_here(entry("pre"), entry("post_res"))
    other = profile_here(entry("pre", time_us=90.0, config={"block_C": 32, "threads": 64}), entry("pre_bwd"), name="base.yaml", torch="2.0")
    code, out = check_here("--profile", path, "--baseline", other)
    assert code == 1, out
    assert "1 regressed, 1 noted" in out
    assert "configuration: block_C" in out
    assert "toolchain: torch 2.0 -> " in out
    assert "not in the baseline" in out
    assert "only in the baseline: pre_bwd n=4" in out


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("crashes", "its process died (SIGSEGV)"),
        ("raises", "requested | for launch"),
        ("hangs", "no result within 2 s"),
        ("does not compile", "not compiled: RuntimeError: no layout found"),
        (planted.SECOND + "crashes", "its process died (SIGSEGV)"),
    ],
)
def test_what_cannot_be_measured_costs_its_entry_alone(check_here, profile_here, monkeypatch, tmp_path, fault, words):
    if fault == "hangs":
        monkeypatch.setattr(latency_runs, "JOB_S", 2.0)
    path, file = profile_here(entry("post_res"), entry("pre"), entry("sinkhorn")), tmp_path / "c.json"
    args = ("--profile", path, "--runs", 2, "--json", file, "--junit", tmp_path / "c.xml")
    code, out = check_here(*args, faults={"pre": fault})
    assert code == 3, out
    rows = by_kernel(file)
    assert rows["pre"]["verdict"] == "not measured"
    assert words in rows["pre"]["findings"][0]
    assert {rows[k]["verdict"] for k in ("post_res", "sinkhorn")} == {"same"}
    assert [len(rows[k]["now"]["runs"]) for k in ("post_res", "sinkhorn")] == [2, 2]
    assert ET.parse(tmp_path / "c.xml").getroot().attrib["errors"] == "1"
    if fault == "raises":
        assert check_here(*args, faults={"pre": fault}, us={"post_res": 120.0})[0] == 1


def test_a_lost_gpu_ends_it_and_keeps_what_was_measured(check_here, profile_here, tmp_path):
    path, file = profile_here(entry("pre"), entry("post_res"), entry("sinkhorn")), tmp_path / "c.json"
    outputs = ("--json", file, "--junit", tmp_path / "c.xml", "--summary", tmp_path / "c.md")
    code, out = check_here("--profile", path, *outputs, faults={"post_res": planted.SECOND + "gone"})
    assert code == 3, out
    assert "stopped in run 2 of 3: the GPU is gone" in out
    assert {k: (row["verdict"], len(row["now"]["runs"])) for k, row in by_kernel(file).items()} == {
        "pre": ("same", 2), "post_res": ("same", 1), "sinkhorn": ("same", 1),
    }  # fmt: skip
    # every row is the same as before, and yet it is no pass
    assert (tmp_path / "c.md").read_text().startswith("### Incomplete: ")
    root = ET.fromstring((tmp_path / "c.xml").read_text())
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors")} == {"tests": "4", "failures": "0", "errors": "1"}
    (error,) = root.iter("error")
    assert error.attrib["message"] == "incomplete, exit code 3"
    assert "stopped in run 2 of 3: the GPU is gone" in error.text
    code, out = check_here("--profile", path, *outputs, faults={"post_res": "gone"})
    assert code == 3, out
    assert by_kernel(file)["sinkhorn"]["verdict"] == "not measured"
    root = ET.fromstring((tmp_path / "c.xml").read_text())
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors")} == {"tests": "3", "failures": "0", "errors": "2"}


def test_ctrl_c_reports_what_was_measured(check_here, profile_here, tmp_path):
    path, file = profile_here(entry("pre"), entry("post_res")), tmp_path / "c.json"
    outputs = ("--json", file, "--junit", tmp_path / "c.xml", "--summary", tmp_path / "c.md")
    code, out = check_here("--profile", path, *outputs, faults={"post_res": planted.SECOND + "Ctrl-C"})
    assert code == 130, out
    assert (tmp_path / "c.md").read_text().startswith("### Incomplete: ")
    assert ET.fromstring((tmp_path / "c.xml").read_text()).attrib["errors"] == "1"
    code, out = check_here("--profile", path, *outputs, us={"pre": 120.0}, faults={"post_res": planted.SECOND + "Ctrl-C"})
    assert code == 130, out
    assert (tmp_path / "c.md").read_text().startswith("### Failed: ")
    root = ET.fromstring((tmp_path / "c.xml").read_text())
    assert {k: root.attrib[k] for k in ("failures", "errors")} == {"failures": "1", "errors": "1"}
    whole = json.loads(file.read_text())
    assert (whole["exit_code"], whole["runs"]) == (130, 1)
    assert any(note.startswith("interrupted in run 2 of 3") for note in whole["notes"])
    assert by_kernel(file)["pre"]["verdict"] == "regressed"
    code, out = check_here("--profile", path, faults={"pre": "Ctrl-C"})
    assert (code, out.splitlines()[-1]) == (130, "mhc-tune: interrupted before anything was measured")
    # too few runs for a band
    code, out = check_here("--profile", path, "--calibrate", 9, faults={"post_res": planted.SECOND + "Ctrl-C"})
    assert code == 130
    assert "stays as it was: 1 complete runs" in out
    assert not noise_path(path).exists()


def test_a_configuration_that_its_kernel_no_longer_takes_is_not_measured(check_here, profile_here):
    code, out = check_here("--profile", profile_here(entry("pre", config={"block_C": 64, "warps": 2}), entry("post_res")))
    assert code == 3, out
    assert "its config has block_C, warps, wanted block_C, threads" in out


def test_kernels_without_an_entry_are_measured_by_name_where_no_entry_is_needed(check_here, profile_here, tmp_path):
    path, file = profile_here(entry("pre")), tmp_path / "c.json"
    args = ("--profile", path, "--kernels", "pre,post_res", "--shapes", "64x4x1280,64x4x64", "--json", file)
    assert check_here(*args, "--calibrate", 3)[0] == 0
    assert [row["program"] for row in json.loads(file.read_text())["programs"]] == [
        "pre n=4 C=64 bfloat16 T=64",
        "post_res n=4 C=1280 bfloat16 T=64",
    ]
    assert check_here(*args)[0] == 0
    assert list(by_kernel(file)) == ["pre"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "check: there is no GPU here; to compile and compare without one: mhc-tune check --static"),
        (("--gpu", "h100"), "--gpu h100: found no CUDA device"),
        (("--gpu", "h100"), "to compile and compare without it: mhc-tune check --static --gpu h100"),
        (("--profile", "h100"), "check: there is no GPU here"),
        (("--gpu", "cpu", "--profile", "cpu"), "--profile and --gpu: got both"),
        (("--profile", "none/such.yaml"), "none/such.yaml: cannot be read"),
        (("--profile", "MINE", "--baseline", "none/such.yaml"), "--baseline: none/such.yaml: cannot be read"),
        (("--profile", "MINE", "--baseline", "GPU"), "its times are of NVIDIA H100, this is"),
        (("--profile", "OTHER"), "its times are of AMD K6, this is"),
        (("--profile", "OTHER"), "--against GIT_REV; see how much identical code differs here: --calibrate N"),
        (("--profile", "MINE", "--baseline", "MINE", "--against", "HEAD"), "--baseline and --against: got 2 of them, wanted one"),
        (("--profile", "MINE", "--calibrate", "5", "--against", "HEAD"), "--against and --calibrate: got 2 of them"),
        (("--profile", "MINE", "--calibrate", "5", "--runs", "5"), "--runs and --calibrate: got both"),
        (("--profile", "MINE", "--calibrate", "2"), "--calibrate"),
        (("--profile", "MINE", "--runs", "0"), "--runs"),
        (("--profile", "MINE", "--runs", "9999999"), "--runs: got 9999999, wanted at most 1000"),
        (("--profile", "MINE", "--calibrate", "9999999"), "--calibrate: got 9999999, wanted at most 1000"),
        (("--profile", "MINE", "--tolerance", "nan"), "--tolerance: got nan, wanted a share such as 0.05"),
        (("--profile", "MINE", "--tolerance", "-0.1"), "--tolerance: got -0.1"),
        (("--profile", "MINE", "--floor-us", "inf"), "--floor-us: got inf, wanted microseconds such as 0.5"),
        (("--profile", "MINE", "--json", "/dev/null/x"), "--json /dev/null/x: cannot be written"),
        (("--profile", "MINE", "--summary", "/"), "--summary /: is a folder"),
        (("--profile", "MINE", "--kernels", "prae"), "unknown kernel 'prae'; did you mean 'pre'?"),
        (("--profile", "MINE", "--workloads", "mhc-27"), "unknown workload 'mhc-27'"),
        (("--profile", "MINE", "--shapes", "4x64"), "--shapes: got '4x64', wanted TxnxC"),
        (("--profile", "MINE", "--shapes", "1x1x1"), "got filters that no entry of the profile passes"),
        (("--profile", "MINE", "--update"), "--update: got it without --static"),
        (("--profile", "MINE", "--fingerprints", "x"), "--fingerprints: got it without --static"),
        *(
            (("--static", option, value), f"{option}: got it with --static, which times nothing")
            for option, value in zip(TIMED, ("x", "HEAD", "5", "1", "0", "0"), strict=True)
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(check_here, profile_here, args, words):
    paths = {"MINE": profile_here(entry("pre")), "GPU": profile_here(entry("pre"), name="gpu.yaml", gpu="NVIDIA H100", arch="sm_90a")}
    paths["OTHER"] = profile_here(entry("pre"), name="other.yaml", gpu="AMD K6")
    code, out = check_here(*[paths.get(arg, arg) for arg in args])
    assert code == 2, out
    assert words in out
    assert out.count("\n") == 1


def test_a_cpus_times_are_compared_with_anothers_where_that_was_asked_for(check_here, profile_here):
    other = profile_here(entry("pre"), name="other.yaml", gpu="AMD K6")
    code, out = check_here("--profile", other, "--baseline", other)
    assert code == 0, out
    assert "its times are of AMD K6" in out


def test_a_process_that_follows_one_that_died_has_nothing_to_time(monkeypatch):
    monkeypatch.setattr(latency_job, "_call", None)
    with pytest.raises(RuntimeError, match="nothing is prepared"):
        latency_job.batch_job("cpu", 3)
    latency_job.prepare_job(Case("pre", 2, 96, "bfloat16", 40, KERNELS["pre"].default(KERNELS["pre"].problem(2, 96))), "cpu", 0)
    taken = latency_job.batch_job("cpu", 3)
    assert len(taken["samples"]) == 3
    assert min(taken["samples"]) > 0
    assert (taken["clock_mhz"], taken["dropped"], taken["dirty"]) == (None, 0, None)


class Throttled:
    """A monitor of a GPU that is too hot."""

    def clock(self):
        return State(sm_mhz=1200.0, reasons=("hw_thermal_slowdown",))


def test_a_batch_says_what_the_clocks_were(monkeypatch):
    monkeypatch.setattr(latency_job, "clock_of", lambda device: Clock("cpu", Watch(Throttled())))
    monkeypatch.setattr(latency_job, "_call", lambda: None)
    taken = latency_job.batch_job("cpu", 8)
    assert (len(taken["samples"]), taken["clock_mhz"], taken["dropped"]) == (8, 1200.0, 24)
    assert taken["dirty"].startswith("hw_thermal_slowdown")


def test_an_entry_is_called_by_what_its_kernel_has():
    names = [label(kernel, 4, 2560, "bfloat16", 8192) for kernel in ("pre", "sinkhorn", "sum_parts")]
    assert names == ["pre n=4 C=2560 bfloat16 T=8192", "sinkhorn n=4 T=8192", "sum_parts n=4 C=2560"]


def test_runs_in_step_lose_what_hit_both():
    assert in_step([110.0, 220.0, 99.0], [100.0, 200.0, 90.0]) == pytest.approx([110.0, 110.0, 110.0])


def test_a_real_run_on_the_cpu(check_here, profile_here, tmp_path):
    """Its kernel takes microseconds, the profile says a second and a nanosecond."""
    path, file = (
        profile_here(entry("pre", time_us=1e6), entry("pre_bwd", time_us=1e-3), entry("sinkhorn", impl="reference", time_us=1e-3)),
        tmp_path / "c.json",
    )
    code, out = check_here("--profile", path, "--runs", 2, "--jobs", 1, "--json", file, real=True)
    assert code == 1, out
    rows = by_kernel(file)
    assert {k: row["verdict"] for k, row in rows.items()} == {"pre": "improved", "pre_bwd": "regressed", "sinkhorn": "regressed"}
    assert all(len(row["now"]["runs"]) == 2 for row in rows.values())
