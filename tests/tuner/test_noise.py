"""The calibration file, and the rate of false alarms by leave-one-out."""

import json
import math
import random

import pytest

from tuner.errors import TuneError
from tuner.noise import Band, Noise, bands, false_alarms, noise_path, read_noise, write_noise
from tuner.regression import Rule

NOISE = Noise(
    gpu="NVIDIA H100 80GB HBM3",
    torch="2.11",
    tilelang="0.1.15",
    driver="580",
    date="2026-11-24T10:00:00+00:00",
    command="mhc-tune check --calibrate 50",
    entries={"pre n=4 C=2560 bfloat16 T=8192": Band(band=0.012, runs=50, median_us=69.5)},
)


def test_written_is_read(tmp_path):
    path = noise_path(tmp_path / "h100.yaml")
    assert path.name == "h100.noise.json"
    assert read_noise(path) is None
    write_noise(path, NOISE)
    assert read_noise(path) == NOISE
    write_noise(path, NOISE.model_copy(update={"entries": {}}))
    assert read_noise(path).entries == {}


def broken(**change):
    return json.dumps({**NOISE.model_dump(), **change})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "top level: "),
        ("[]", "top level: "),
        (broken(gpu=None), "gpu: got None"),
        (broken(date="soon"), "wanted an ISO date"),
        (broken(schema_version=2), "schema_version: got 2"),
        (broken(more=1), "more: unknown field"),
        (broken(entries={"pre": {"band": -0.1, "runs": 5, "median_us": 1.0}}), "entries.pre.band: got -0.1"),
        (broken(entries={"pre": {"band": 0.1, "runs": 1, "median_us": 1.0}}), "entries.pre.runs: got 1"),
        (broken(entries={"pre": {"band": 0.1, "runs": 5, "median_us": 0.0}}), "entries.pre.median_us: got 0"),
        (broken(entries={"pre": {"band": 0.1, "runs": 5}}), "entries.pre.median_us: missing"),
        (broken().replace("0.012", "NaN"), "band"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_it_and_the_field(tmp_path, text, words):
    path = tmp_path / "h100.noise.json"
    path.write_text(text)
    with pytest.raises(TuneError) as e:
        read_noise(path)
    assert str(e.value).startswith(f"{path}: ")
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    with pytest.raises(TuneError, match="cannot be read"):
        read_noise(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(TuneError, match="no UTF-8"):
        read_noise(tmp_path / "x")
    with pytest.raises(TuneError, match=r"--calibrate .*cannot be written"):
        write_noise(tmp_path, NOISE)


def test_bands_hold_their_runs():
    found = bands({"a": [100.0, 101.0, 99.0, 103.0], "b": [5.0], "c": [2.0, 2.0]})
    assert found.keys() == {"a", "c"}
    assert found["a"].band >= 0.02
    assert (found["a"].runs, found["a"].median_us) == (4, 100.5)
    assert found["c"].band == 0


def test_leave_one_out_counts_what_the_others_do_not_explain():
    steady = [100.0, 100.1, 99.9, 100.0, 100.2]
    one_slow = [100.0, 100.1, 99.9, 120.0, 100.0]
    one_fast = [100.0, 100.1, 99.9, 80.0, 100.0]
    found = false_alarms({"steady": steady, "slow": one_slow, "fast": one_fast, "short": [1.0, 9.0]}, Rule())
    assert (found.entries, found.runs, found.judged) == (3, 5, 15)
    assert (found.regressed, found.improved, found.runs_with_alarm) == (1, 1, 1)
    assert found.rate == pytest.approx(1 / 15)
    assert str(found).startswith("false alarms: 1 of 15 (6.67%; 3 entries, 5 runs each judged against the others), in 1 of 5 runs; 1 false")
    assert json.loads(json.dumps(found.as_dict()))["rate"] == found.rate


def test_nothing_to_judge_is_no_alarm():
    found = false_alarms({"short": [1.0, 9.0]}, Rule())
    assert (found.judged, found.rate, found.runs) == (0, 0.0, 0)


def test_fifty_runs_of_normal_noise_hardly_ever_alarm():
    rng = random.Random(0)
    runs = {str(i): [100 * math.exp(rng.gauss(0, 0.02)) for _ in range(50)] for i in range(40)}
    assert false_alarms(runs, Rule()).rate <= 0.002
