"""tuner/ledger.py: an exhaustive measurement is read whole, and what is wrong with a file is one line that names the field."""

import copy
import json

import pytest

from tests.tuner.planted_ledger import make_ledger, make_study
from tl_kernels import KERNELS
from tuner.errors import TuneError
from tuner.ledger import read_ledger
from tuner.space import Space
from tuner.task import config_key


@pytest.fixture(scope="module")
def study():
    return make_study("post_res_project")


def write(tmp_path, data):
    path = tmp_path / "ledger.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_ledger_is_read_whole(tmp_path, study):
    (read,) = read_ledger(write(tmp_path, make_ledger(study))).studies
    assert len(read.results) == len(study["trials"]) > 100
    assert read.missing("sm_90a") == 0
    refused = sum(t["outcome"] == "infeasible" for t in study["trials"])
    assert 0 < refused == len(study["trials"]) - read.size
    times = {config_key(t["config"]): t["time_us"] for t in study["trials"] if t["outcome"] == "ok"}
    assert read.best.time_us == min(times.values())
    assert read.near_best(0.02) == {key for key, us in times.items() if us <= 1.02 * min(times.values())}
    assert len(read.near_best(0.0)) == 1


def test_what_a_slow_trial_took_is_not_the_best(tmp_path, study):
    other = copy.deepcopy(study)
    fastest = min((t for t in other["trials"] if t["time_us"]), key=lambda t: t["time_us"])
    fastest["outcome"] = "slow"
    (read,) = read_ledger(write(tmp_path, make_ledger(other))).studies
    assert read.best.config != fastest["config"]
    assert config_key(fastest["config"]) not in read.near_best(0.02)


def test_a_repeated_trial_is_named_by_its_place(tmp_path, study):
    trials = study["trials"]
    with pytest.raises(TuneError, match=rf"trials\[{len(trials)}\] repeats an earlier configuration"):
        read_ledger(write(tmp_path, make_ledger({**study, "trials": [*trials, trials[0]]})))


def test_what_was_left_out_is_counted(tmp_path, study):
    other = copy.deepcopy(study)
    del other["trials"][-3:]
    (read,) = read_ledger(write(tmp_path, make_ledger(other))).studies
    assert read.missing("sm_90a") == 3
    other["study"] = other["study"][:-4] + "0000"
    (read,) = read_ledger(write(tmp_path, make_ledger(other))).studies
    assert read.missing("sm_90a") is None, "another version of the kernel"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("schema_version"), "schema_version: Field required"),
        (lambda d: d.update(schema_version=2), "schema_version: Input should be 1"),
        (lambda d: d.update(studies=[]), "studies: List should have at least 1 item"),
        (lambda d: d["studies"][0].update(kernel="nothing"), "studies[0]: kernel: got 'nothing'"),
        (lambda d: d["studies"][0].update(n=9), "studies[0].n: Input should be less than or equal to 8"),
        (lambda d: d["studies"][0].update(trials=[]), "studies[0].trials: List should have at least 1 item"),
        (
            lambda d: d["studies"][0]["trials"][3].update(outcome="fine"),
            "studies[0].trials[3]: outcome: got 'fine', wanted one of ok, slow",
        ),
        (lambda d: d["studies"][0]["trials"][3].update(outcome="ok", time_us=-1.0), "studies[0].trials[3].time_us: "),
        (lambda d: d["studies"][0]["trials"][3].update(outcome="ok", time_us=None), "time_us: got None, wanted a time with outcome 'ok'"),
        (lambda d: d["studies"][0]["trials"][3].update(outcome="crash", time_us=2.0), "time_us: got 2.0, wanted none with outcome 'crash'"),
        (
            lambda d: d["studies"][0]["trials"][3].update(config={"threads": 1}),
            "config: got the knobs threads, wanted the default's",
        ),
        (lambda d: d["studies"][0]["default"].update(threads=999), "was not measured"),
        (lambda d: [t.update(outcome="crash", time_us=None) for t in d["studies"][0]["trials"]], "none has outcome 'ok'"),
        (lambda d: d["hardware"].pop("arch"), "hardware.arch: Field required"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_field(tmp_path, study, change, said):
    ledger = copy.deepcopy(make_ledger(study))
    change(ledger)
    path = write(tmp_path, ledger)
    with pytest.raises(TuneError) as error:
        read_ledger(path)
    assert said in str(error.value)
    assert str(error.value).startswith(f"ledger {path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "file: Input should be"), ("null", "file: ")])
def test_a_file_of_something_else(tmp_path, text, said):
    with pytest.raises(TuneError, match=said):
        read_ledger(write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TuneError, match="cannot be read: No such file"):
        read_ledger(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TuneError, match="cannot be read: "):
        read_ledger(tmp_path / "binary")


def test_on_the_cpu_knobs_of_the_gpu_stay_at_their_default():
    kernel = KERNELS["post_res_project"]
    p = kernel.problem(4, 1280)
    every = Space(kernel, p, "cpu").feasible()
    assert {(cfg["threads"], cfg["stages"]) for cfg in every} == {(kernel.default(p)["threads"], kernel.default(p)["stages"])}
    assert 1 < len(every) < len(Space(kernel, p, "sm_90a").feasible())
