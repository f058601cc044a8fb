"""tuner/replay.py: the tuner's own search over a ledger, counted exactly, and the figures and the chart that come of it."""

import errno
import json
import math
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest

from tests.tuner.planted_ledger import make_ledger, make_study
from tl_kernels import KERNELS
from tuner.errors import TuneError
from tuner.ledger import Study
from tuner.replay import COLD, QUARTER, SEEDED, Job, ReplayRequest, make_jobs, make_search, percentile, replay, replay_job, summarise
from tuner.replay_plot import steps
from tuner.task import config_key

ROOT = Path(__file__).resolve().parents[2]
ARCH = "sm_90a"


@pytest.fixture(scope="module")
def study():
    """180 configurations and four starting points in its space."""
    return Study.model_validate(make_study("post_res_project", world=1))


def make_request(tmp_path=Path("."), **change):
    fields = {"samplers": ("tpe", "random"), "seeds": 2, "batch": 4, "within": 0.02, "trials": None, "cold_only": False, "jobs": 1}
    return ReplayRequest(ledger=tmp_path / "ledger.json", out=tmp_path, command="mhc-tune replay", **{**fields, **change})


def recorded(study, sampler, seed=0, seeded=False, trials=None, batch=4):
    """Every configuration measured or refused, in order, when nothing is ever found."""
    told = []

    def oracle(cfg):
        told.append(dict(cfg))
        return study.results[config_key(cfg)]

    search = make_search(study, ARCH, sampler, seed, seeded, trials or study.size - 1)
    assert replay(search, oracle, batch, lambda cfg: False) is None
    return told, search


def test_a_replay_begins_with_the_default_and_tries_each_configuration_of_the_ledger_at_most_once(study):
    told, search = recorded(study, "random")
    assert told[0] == study.default
    assert len({config_key(cfg) for cfg in told}) == len(told)
    assert search.count == study.size - 1, "the whole budget"
    refused = [cfg for cfg in told if not study.results[config_key(cfg)].counts]
    assert refused, "infeasible ones are proposed too, and do not count"
    assert len(told) == search.count + len(refused)


def test_starting_points_come_after_the_default_only_where_they_are_wanted(study):
    fit = [dict(seed) for seed in KERNELS["post_res_project"].seeds if config_key(seed) in study.results]
    assert len(fit) >= 4
    seeded, _ = recorded(study, "tpe", seeded=True, trials=20)
    assert seeded[1 : 1 + len(fit)] == fit
    cold, _ = recorded(study, "tpe", seeded=False, trials=20)
    assert cold[1 : 1 + len(fit)] != fit


def test_batch_is_how_many_are_proposed_before_the_first_is_told(study):
    search = make_search(study, ARCH, "random", 0, False, 30)
    most = 0

    def oracle(cfg):
        nonlocal most
        most = max(most, len(search.inflight))
        return study.results[config_key(cfg)]

    replay(search, oracle, 7, lambda cfg: False)
    assert most == 7


@pytest.mark.parametrize("sampler", ["tpe", "random", "brute-force"])
def test_trials_are_counted_until_the_first_near_the_best(study, sampler):
    near = study.near_best(0.02)
    told, _ = recorded(study, sampler, seed=1, trials=90)
    first = next(i for i, cfg in enumerate(told) if config_key(cfg) in near)
    wanted = sum(study.results[config_key(cfg)].counts for cfg in told[: first + 1])
    assert replay_job(study, ARCH, Job(0, sampler, COLD, 1), make_request()) == wanted


def test_the_same_job_gives_the_same_answer_and_another_seed_another(study):
    answers = [[replay_job(study, ARCH, Job(0, "tpe", COLD, seed), make_request()) for seed in range(3)] for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_a_budget_that_ends_first_is_said(study):
    assert replay_job(study, ARCH, Job(0, "random", COLD, 1), make_request(trials=1)) is None


def test_a_looser_target_is_reached_no_later(study):
    strict, loose = (replay_job(study, ARCH, Job(0, "tpe", COLD, 2), make_request(within=within)) for within in (0.0, 0.1))
    assert loose <= strict


def test_tpe_needs_less_of_the_space_than_chance(study):
    """What a sampler that learns is for; the ledger is made up, the search is not."""
    sizes = {
        name: [replay_job(study, ARCH, Job(0, name, COLD, s), make_request()) or math.inf for s in range(15)] for name in ("tpe", "random")
    }
    assert sum(sizes["tpe"]) < sum(sizes["random"])


def test_the_space_is_the_ledgers_also_after_the_kernel_has_changed(study, monkeypatch):
    """A committed ledger stays replayable: nothing but names is taken from the kernel."""
    before, _ = recorded(study, "tpe", trials=12)
    kernel = KERNELS["post_res_project"]
    for name in ("space", "default", "invalid"):
        monkeypatch.setitem(kernel.__dict__, name, lambda *args: pytest.fail("asked the kernel"))
    after, _ = recorded(study, "tpe", trials=12)
    assert before == after


def test_jobs_are_every_combination(tmp_path, study):
    plain = Study.model_validate(make_study("post_res"))
    assert not KERNELS["post_res"].seeds
    ledger = type("L", (), {"studies": [study, plain]})
    jobs = make_jobs(ledger, make_request(samplers=("tpe", "gp"), seeds=3))
    wanted = {Job(0, s, start, i) for s in ("tpe", "gp") for start in (COLD, SEEDED) for i in range(3)}
    wanted |= {Job(1, s, COLD, i) for s in ("tpe", "gp") for i in range(3)}
    assert set(jobs) == wanted
    assert len(jobs) == len(wanted)
    assert jobs[0].sampler == "gp", "the slow one first"
    assert {job.start for job in make_jobs(ledger, make_request(cold_only=True))} == {COLD}


def test_percentiles_are_by_nearest_rank():
    assert [percentile([5, 1, 4, 2, 3], share) for share in (0.0, 0.2, 0.21, 0.5, 0.9, 1.0)] == [1, 1, 2, 3, 5, 5]


def test_figures_of_a_sampler():
    runs = [{"seed": i, "trials": t} for i, t in enumerate([10, 20, 25, 26, None])]
    assert summarise(runs, 100) == {
        "seeds": 5,
        "reached": 4,
        "within_quarter": 3,
        "median_trials": 25,
        "median_share": 0.25,
        "p90_trials": None,
        "p90_share": None,
    }


def test_the_line_of_a_chart_steps_at_each_seed():
    runs = [{"trials": 40}, {"trials": 10}, {"trials": None}, {"trials": 100}]
    assert steps(runs, 100) == ([0.0, 0.1, 0.4, 1.0, 1.0], [0.0, 0.25, 0.5, 0.75, 0.75])
    assert QUARTER == 0.25


def mhc_tune(folder, *args):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MHC_")}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
    command = [sys.executable, "-m", "tuner.cli", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def test_the_command_writes_figures_and_a_chart(tmp_path):
    (tmp_path / "ledger.json").write_text(json.dumps(make_ledger(make_study("post_res_project", world=1), make_study("post_res"))))
    args = ["replay", "ledger.json", "--samplers", "random,tpe", "--seeds", "3", "--out", "here"]
    done = mhc_tune(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "here" / "replay.json").read_text())
    assert result["command"] == f"mhc-tune {' '.join(args)}"
    assert result["versions"]["optuna"]
    first, second = result["studies"]
    assert [(row["start"], row["sampler"]) for row in first["rows"]] == [(s, n) for s in (COLD, SEEDED) for n in ("random", "tpe")]
    assert [row["start"] for row in second["rows"]] == [COLD, COLD]
    # processes give what this one does
    study = Study.model_validate(make_study("post_res_project", world=1))
    near = len(study.near_best(0.02))
    assert (first["measured"], first["refused"], first["near_best"]) == (study.size, len(study.trials) - study.size, near)
    for row in first["rows"]:
        for run in row["runs"]:
            assert run["trials"] == replay_job(study, ARCH, Job(0, row["sampler"], row["start"], run["seed"]), make_request())
    assert (tmp_path / "here" / "replay.png").read_bytes().startswith(b"\x89PNG")
    counts = f"{study.size} measured, {near} near the best"
    for said in ("post_res_project n=4 C=2560 bfloat16 T=8192", counts, "quarter", "18 replays; written: "):
        assert said in done.stdout, said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["none.json"], "ledger none.json: cannot be read"),
        (["part.json"], "post_res n=4 C=2560 bfloat16 T=8192: 1 feasible configurations are missing, wanted all of the space"),
        (["part.json", "--samplers", "tpee"], "did you mean 'tpe'"),
        (["part.json", "--seeds", "0"], "'--seeds'"),
        (["part.json", "--out", "part.json"], "--out part.json/replay.json: cannot be written"),
        ([], "LEDGER"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, said):
    from tuner import cli

    study = make_study("post_res")
    study["trials"].pop()
    (tmp_path / "part.json").write_text(json.dumps(make_ledger(study)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mhc-tune", "replay", *args])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["replace_file", "plot"])
def test_on_a_full_disk_it_prints_the_figures_and_ends_in_one_line(tmp_path, monkeypatch, capsys, name):
    from tuner import replay as module

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "ledger.json").write_text(json.dumps(make_ledger(make_study("post_res"))))
    monkeypatch.setattr(module, name, full)
    monkeypatch.setattr(module, "run_jobs", lambda jobs, request: [(job, 3) for job in jobs])
    with pytest.raises(TuneError, match=r"^--out .*: cannot be written: No space left on device$"):
        module.run_replay(make_request(tmp_path))
    assert "near the best" in capsys.readouterr().out


def test_no_chart_library_is_one_line(monkeypatch):
    import importlib.util

    from tuner import replay as module

    there = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name))
    with pytest.raises(TuneError, match="wanted matplotlib"):
        module.run_replay(make_request())


def test_results_come_in_the_order_of_the_proposals(study):
    """As from a device that measures one at a time."""
    search = make_search(study, ARCH, "random", 3, False, 12)
    asked, told = deque(), []
    propose = search.propose

    def proposing():
        cfg = propose()
        if cfg is not None:
            asked.append(cfg)
        return cfg

    search.propose = proposing
    replay(search, lambda cfg: told.append(dict(cfg)) or study.results[config_key(cfg)], 5, lambda cfg: False)
    assert told == list(asked)
