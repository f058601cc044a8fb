"""pytest --mhc-latency: a planted clock whose sample of a call is what the call returns, in microseconds; pytest inside pytest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from tests.conftest import python_path
from tuner import latency_baseline, latency_fixture, modelfile, timing
from tuner.device_state import State, Watch
from tuner.timing import Clock

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": python_path(ROOT)}
TWO = """
import kernels

def test_a(mhc_latency):
    mhc_latency(kernels.a)

def test_b(mhc_latency):
    mhc_latency(kernels.b)
"""


class Planted(Clock):
    def _one(self, timed):
        us = float(timed.call())
        return lambda: us

    def copy_gbps(self, nbytes=None):
        return 100.0


class Runner:
    """pytest in the folder ``path``; ``kernels`` are what ``kernels.<name>()`` takes, in microseconds, or Python expressions for it."""

    def __init__(self, pytester):
        self.pytester, self.path = pytester, pytester.path
        self.file = self.path / ".mhc-latency" / "cpu.json"

    def test(self, text):
        self.pytester.makepyfile(test_k=text)

    def kernels(self, **kernels):
        shutil.rmtree(self.path / "__pycache__", ignore_errors=True)  # a file of the same second and size
        (self.path / "kernels.py").write_text("".join(f"def {name}():\n    return {us}\n" for name, us in kernels.items()))

    def run(self, *args, **kwargs):
        return self.plain("--mhc-latency", *args, **kwargs)

    def plain(self, *args, **kwargs):
        # hypothesis would be imported anew for every summary
        args = ("-p", "tuner.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *args)
        return self.pytester.runpytest_inprocess(*args, syspathinsert=True, **kwargs)

    def update(self, *args):
        return self.run("--mhc-latency-update", *args)

    @property
    def stored(self):
        return json.loads(self.file.read_text())["kernels"]


@pytest.fixture
def runner(pytester, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(pytester.path))  # device locks of its own
    monkeypatch.setattr(latency_fixture, "Clock", Planted)
    monkeypatch.setattr(latency_fixture, "WARM_S", 0.0)
    monkeypatch.setattr(latency_fixture, "device_name", lambda device: "Planted CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner = Runner(pytester)
    runner.kernels(a=100.0, b=50.0)
    runner.test(TWO)
    return runner


def says(result, *lines):
    result.stdout.fnmatch_lines([f"*{line}*" for line in lines])


def test_without_the_option_tests_are_skipped_and_say_so(runner):
    (runner.path / ".mhc-latency").mkdir()
    runner.file.write_text("not read")
    result = runner.plain("-rs")
    result.assert_outcomes(skipped=2)
    says(result, "times a kernel, which takes --mhc-latency")
    result.stdout.no_fnmatch_line("*= mhc latency =*")


def test_the_marker_is_set_and_known(runner):
    runner.test(TWO + "\ndef test_other():\n    pass\n")
    result = runner.run("-m", "mhc_latency", "--strict-markers")
    result.assert_outcomes(passed=2, deselected=1)
    runner.run("-m", "not mhc_latency").assert_outcomes(passed=1, deselected=2)


def test_without_a_baseline_a_test_passes_with_a_note(runner):
    result = runner.run()
    result.assert_outcomes(passed=2)
    says(result, "= mhc latency =", "Planted CPU", "test_k.py::test_a  100.0 us*no baseline", "2 not compared: no baseline in *cpu.json")
    says(result, "--mhc-latency-update writes it")
    assert not runner.file.exists()


def test_a_test_that_times_nothing_says_so(runner):
    runner.test("import pytest\n\ndef test_a(mhc_latency):\n    pass\n\ndef test_b(mhc_latency):\n    pytest.skip('no such GPU')\n")
    result = runner.run()
    result.assert_outcomes(passed=1, skipped=1, warnings=1)
    says(result, "PytestWarning: mhc_latency timed nothing")
    result = runner.run("--mhc-latency-strict")
    result.assert_outcomes(passed=1, skipped=1, errors=1)
    says(result, "mhc_latency timed nothing")


def test_strict_fails_without_a_baseline(runner):
    runner.update("-k", "test_a")
    result = runner.run("--mhc-latency-strict")
    result.assert_outcomes(passed=1, failed=1)
    says(result, "AssertionError: test_k.py::test_b: 50.00 us on Planted CPU, but no baseline in *--mhc-latency-update writes it")


def test_a_slowdown_fails_and_says_how_to_accept_it(runner):
    result = runner.update()
    says(result, "2 written to *cpu.json")
    runner.run().assert_outcomes(passed=2)
    runner.kernels(a=112.0, b=40.0)
    result = runner.run()
    result.assert_outcomes(passed=1, failed=1)
    says(
        result, "AssertionError: test_k.py::test_a: 112.0 us, before 100.0 us: ratio 1.120 on Planted CPU (tolerance 5.0%, noise band 0.0%*"
    )
    says(result, "To accept it: pytest --mhc-latency --mhc-latency-update 'test_k.py::test_a'")
    says(result, "test_a  112.0 us*+12.0% against 100.0 us  regressed", "test_b  40.00 us*-20.0% against 50.00 us  improved")
    assert "latency_fixture.py" not in result.stdout.str()  # the traceback ends in the test
    runner.update("-k", "test_a").assert_outcomes(passed=1, deselected=1)
    runner.run("-k", "test_a").assert_outcomes(passed=1, deselected=1)


def test_tolerance_and_band_are_the_rule_s(runner):
    runner.update()
    runner.kernels(a=112.0, b=50.0)
    runner.run("--mhc-latency-tolerance", "0.15").assert_outcomes(passed=2)
    runner.file.write_text(runner.file.read_text().replace('"band": 0.0', '"band": 0.13'))  # by hand
    result = runner.run()
    result.assert_outcomes(passed=2)
    says(result, "+12.0% against 100.0 us  noise")


def test_what_was_slow_only_once_has_not_regressed(runner, monkeypatch):
    runner.update()
    runner.kernels(a="150.0 if next(count) < 60 else 100.0", b=50.0)
    with (runner.path / "kernels.py").open("a") as stream:
        stream.write("import itertools\ncount = itertools.count()\n")
    monkeypatch.setattr(latency_fixture, "SAMPLES", 9)
    result = runner.run()
    result.assert_outcomes(passed=2)
    says(result, "test_a  100.0 us*same")


def test_update_keeps_the_others_and_what_another_process_wrote(runner):
    runner.update()
    before = runner.stored
    runner.test(
        TWO
        + """
    import pathlib
    there = pathlib.Path(".mhc-latency/cpu.json")
    there.write_text(there.read_text().replace("::test_a", "::test_c"))
"""
    )
    runner.kernels(a=1.0, b=60.0)
    runner.update("-k", "test_b")
    after = runner.stored
    assert after["test_k.py::test_c"] == before["test_k.py::test_a"]
    assert after["test_k.py::test_b"]["runs_us"] == [[60.0] * latency_fixture.RUNS]
    assert set(after) == {"test_k.py::test_b", "test_k.py::test_c"}


def test_updates_of_the_same_time_make_the_band_and_another_time_begins_anew(runner):
    for us in (100.0, 101.0, 99.0):
        runner.kernels(a=us, b=50.0)
        runner.update()
    entry = runner.stored["test_k.py::test_a"]
    assert [runs[0] for runs in entry["runs_us"]] == [100.0, 101.0, 99.0]
    assert entry["band"] == pytest.approx(0.06, abs=0.005)
    for us in range(9):
        runner.kernels(a=100 + us / 10, b=50.0)
        runner.update()
    assert len(runner.stored["test_k.py::test_a"]["runs_us"]) == latency_baseline.KEEP
    runner.kernels(a=80.0, b=50.0)
    runner.update()
    assert runner.stored["test_k.py::test_a"]["runs_us"] == [[80.0] * latency_fixture.RUNS]
    assert runner.stored["test_k.py::test_a"]["band"] == 0.0


def test_a_failed_test_and_an_unsteady_device_are_not_written(runner, monkeypatch):
    runner.test(TWO + "    raise RuntimeError('wrong numbers')\n")
    runner.update().assert_outcomes(passed=1, failed=1)
    assert set(runner.stored) == {"test_k.py::test_a"}
    before = runner.file.read_text()

    class Hot:
        def clock(self):
            return State(sm_mhz=1410.0, reasons=("hw_slowdown",))

    monkeypatch.setattr(Watch, "of", lambda device: Watch(Hot()))
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(latency_fixture, "SAMPLES", 5)
    result = runner.update("-k", "test_a")
    result.assert_outcomes(passed=1, deselected=1)
    says(result, "SM 1410 MHz  not steady: hw_slowdown", "1 not written: the test failed, or the device was not steady")
    assert runner.file.read_text() == before
    runner.kernels(a=120.0, b=50.0)
    result = runner.run("-k", "test_a", "--junitxml=junit.xml")
    says(result, "The device was not steady (hw_slowdown *): run it again")
    assert properties(runner)["mhc_latency.clock_mhz"] == "1410"


def test_what_the_runs_at_hand_differ_by_is_noise_too(runner, monkeypatch):
    runner.update()
    runs = latency_fixture._Runs([104.0, 109.0, 112.0, 115.0, 121.0], None, None)
    monkeypatch.setattr(latency_fixture._Device, "measure", lambda self, call: runs)
    result = runner.run("-k", "test_a")
    result.assert_outcomes(passed=1, deselected=1)
    says(result, "test_a  112.0 us [[]104.0, 121.0]  +12.0% against 100.0 us  noise")


def test_runs_that_say_nothing_are_taken_again_and_never_a_baseline(runner):
    runner.test("def test_a(mhc_latency):\n    mhc_latency(iter(range(1, 10**6)).__next__)\n")
    result = runner.update()
    result.assert_outcomes(passed=1)
    says(result, "not steady: runs from * us to * us", "1 not written: the test failed, or the device was not steady")
    assert not runner.file.exists()


def properties(runner):
    root = ET.parse(runner.path / "junit.xml").getroot()
    return {p.get("name"): p.get("value") for p in root.iter("property")}


def test_parameters_and_names_are_kernels_of_their_own(runner):
    runner.test(
        """
        import pytest

        @pytest.mark.parametrize("us", [10.0, 20.0])
        def test_p(mhc_latency, us):
            assert mhc_latency(lambda: us).median_us == us

        def test_several(mhc_latency):
            for T in (64, 128):
                mhc_latency(lambda: float(T), name=f"post, T={T}")
            with pytest.raises(ValueError, match="is measured already in this test"):
                mhc_latency(lambda: 1.0, name="post, T=64")

        def test_taken(mhc_latency):
            with pytest.raises(ValueError, match="test_several has"):
                mhc_latency(lambda: 1.0, name="post, T=64")
        """
    )
    runner.update().assert_outcomes(passed=4)
    times = {name: entry["runs_us"][0][0] for name, entry in runner.stored.items()}
    assert times == {"test_k.py::test_p[10.0]": 10.0, "test_k.py::test_p[20.0]": 20.0, "post, T=64": 64.0, "post, T=128": 128.0}


def test_the_result_and_junit_properties_carry_everything(runner):
    runner.test(
        """
        def test_a(mhc_latency):
            r = mhc_latency(lambda: 100.0, bytes_moved=5_000_000)
            assert (r.median_us, r.interval, r.gbps, r.copy_share) == (100.0, (100.0, 100.0), 50.0, 0.5)
            r = mhc_latency(lambda: 7.0, name="bare", device="cpu")
            assert (r.gbps, r.copy_share, r.clock_mhz, r.dirty) == (None, None, None, None)
        """
    )
    runner.update()
    result = runner.run("--junitxml=junit.xml")
    result.assert_outcomes(passed=1)
    says(result, "Planted CPU, copy 100 GB/s", "test_a  100.0 us [[]100.0, 100.0]  50 GB/s  50% of copy  +0.0% against 100.0 us  same")
    said = properties(runner)
    assert said["mhc_latency.median_us"] == "100"
    assert said["mhc_latency.copy_share"] == "0.5"
    assert said["mhc_latency.verdict"] == "same"
    assert said["mhc_latency.device"] == "Planted CPU"
    assert said["mhc_latency.bare.before_us"] == "7"


@pytest.mark.parametrize("argument", ["bytes_moved=0", "bytes_moved=-1", "name=''", "name=3", "name='\\udcff'", "device='mps'"])
def test_a_wrong_argument_is_named(runner, argument):
    runner.test(f"def test_a(mhc_latency):\n    mhc_latency(lambda: 1.0, {argument})\n")
    says(runner.run(), f"ValueError: {argument.split('=')[0]}: got *")


GOOD = {"schema_version": 1, "device": "Planted CPU", "kernels": {"k": {"band": 0.0, "runs_us": [[1.0, 1.0]], "date": "", "torch": ""}}}
BAD = {
    "top level": "[]",
    "top level: *JSON*": "{",
    "device: missing": json.dumps({**GOOD, "device": None}).replace('"device": null, ', ""),
    "schema_version: got 2": json.dumps({**GOOD, "schema_version": 2}),
    "kernels.k.band: got -1": json.dumps(GOOD).replace('"band": 0.0', '"band": -1'),
    "kernels.k.runs_us[[]0[]]: got": json.dumps(GOOD).replace("[1.0, 1.0]", "[1.0]"),
    "kernels.k.runs_us[[]0[]][[]1[]]: got 'x'": json.dumps(GOOD).replace("1.0]", '"x"]'),
    "kernels.k.runs_us[[]0[]][[]1[]]: got nan": json.dumps(GOOD).replace("1.0]", "NaN]"),
    "kernels.k.note: unknown field": json.dumps(GOOD).replace('"band"', '"note": 1, "band"'),
    "is no UTF-8": "\udcff",
}


@pytest.mark.parametrize("said", BAD, ids=[said.split(":")[0] for said in BAD])
def test_a_malformed_baseline_is_one_line_and_stays_as_it_is(runner, said):
    runner.file.parent.mkdir()
    bad = BAD[said].encode("utf-8", "surrogateescape")
    runner.file.write_bytes(bad)
    for args in ((), ("--mhc-latency-update",)):
        result = runner.run(*args)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        (line,) = [line for line in result.stderr.lines if line.strip()]
        result.stderr.fnmatch_lines([f"ERROR: --mhc-latency-baseline {runner.file}: {said}*"])
        assert len(line) < 500
    assert runner.file.read_bytes() == bad


def test_a_baseline_of_another_device_is_not_compared_with_and_never_overwritten(runner, monkeypatch):
    runner.update()
    before = runner.file.read_text()
    monkeypatch.setattr(latency_fixture, "device_name", lambda device: "Another CPU")
    runner.kernels(a=1000.0, b=1000.0)
    result = runner.run()
    result.assert_outcomes(passed=2)
    says(result, "2 not compared: *cpu.json is of 'Planted CPU', not of this device; name another file: --mhc-latency-baseline")
    runner.run("--mhc-latency-strict").assert_outcomes(failed=2)
    result = runner.update()
    result.assert_outcomes(failed=2)
    says(result, "its baselines are of 'Planted CPU', this is 'Another CPU'; wanted another file or folder for this device")
    assert runner.file.read_text() == before
    runner.update("--mhc-latency-baseline", "other.json").assert_outcomes(passed=2)
    runner.run("--mhc-latency-baseline", "other.json", "--mhc-latency-strict").assert_outcomes(passed=2)


def test_a_file_that_cannot_be_written_is_an_error_in_one_line(runner, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(modelfile, "replace_file", full)
    result = runner.update("-k", "test_a")
    result.assert_outcomes(passed=1, errors=1, deselected=1)
    says(result, "UsageError: --mhc-latency-baseline *cpu.json: cannot be written: No space left on device")


def test_a_baseline_that_was_spoilt_meanwhile_is_left_alone(runner):
    runner.update()
    runner.test(TWO + "    import pathlib\n    pathlib.Path('.mhc-latency/cpu.json').write_text('{')\n")
    runner.update().assert_outcomes(passed=2, errors=1)
    assert runner.file.read_text() == "{"


def test_the_ini_option_names_a_folder_beside_the_ini(runner):
    runner.pytester.makeini("[pytest]\nmhc_latency_baseline = base/lines\n")
    runner.update()
    assert set(json.loads((runner.path / "base/lines/cpu.json").read_text())["kernels"]) == {"test_k.py::test_a", "test_k.py::test_b"}
    runner.run("--mhc-latency-strict").assert_outcomes(passed=2)


def test_ctrl_c_keeps_what_was_measured(runner):
    runner.test(
        TWO
        + """
def test_c(mhc_latency):
    mhc_latency(lambda: 3.0, name="first of two")
    mhc_latency(kernels.c, name="second of two")

def test_d(mhc_latency):
    mhc_latency(kernels.a)
"""
    )
    runner.kernels(a=100.0, b=50.0, c="(_ for _ in ()).throw(KeyboardInterrupt)")
    result = runner.run("--mhc-latency-update", no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    says(result, "= mhc latency =", "first of two  3.000 us*", "3 written to *cpu.json")
    assert set(runner.stored) == {"test_k.py::test_a", "test_k.py::test_b", "first of two"}


def test_update_needs_the_option(runner):
    result = runner.plain("--mhc-latency-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --mhc-latency-update: nothing is measured without --mhc-latency"])


@pytest.mark.parametrize("tolerance", ["5", "-0.1", "nan", "x"])
def test_a_tolerance_is_a_share(runner, tolerance):
    result = runner.run("--mhc-latency-tolerance", tolerance)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--mhc-latency-tolerance: got '{tolerance}', wanted a share from 0 to below 1, such as 0.05"])


def test_xdist_workers_are_refused_with_the_option_only(runner):
    for args in (("-n2",), ("-n", "auto"), ("--dist", "load", "--tx", "2*popen")):
        result = runner.run(*args)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: --mhc-latency: with pytest-xdist other workers *: -n0"])
    runner.run("-n0").assert_outcomes(passed=2)


def test_without_the_option_workers_skip_and_nothing_heavy_is_imported(runner):
    heavy = ("torch", "tilelang", "optuna", "rich", "pydantic", "yaml", "mhc", "tuner.latency_fixture")
    runner.test(
        TWO.replace("import kernels", "") + f"\ndef test_c():\n    import sys\n    assert not [m for m in {heavy} if m in sys.modules]\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tuner.pytest_plugin", "-p", "no:hypothesispytest", "-n1", "-rs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert "1 passed, 2 skipped" in done.stdout, done.stdout + done.stderr


def test_importing_the_plugin_costs_milliseconds():
    code = (
        "import sys, pytest, time; before = set(sys.modules); start = time.perf_counter(); import tuner.pytest_plugin;"
        "print(time.perf_counter() - start, *sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    seconds, *modules = done.stdout.split()
    assert modules == ["tuner", "tuner.pytest_plugin"]
    assert float(seconds) < 0.2  # a few milliseconds; the machine may be busy
