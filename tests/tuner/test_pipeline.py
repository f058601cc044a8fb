"""tuner/pipeline.py: studies from first proposal to written entry, faults kept to their own trial, resumption, time limits."""

import time

import pytest

from mhc.profile import read_profile
from tests.tuner import planted
from tests.tuner.conftest import make_task
from tuner import pipeline as pipeline_module


def outcomes(pipeline, study=0):
    return {cfg["block_C"]: result for cfg, result in pipeline.studies[study].search.results.values()}


def test_a_study_ends_in_the_profile_with_its_best_configuration(make_pipeline, tmp_path):
    run = make_pipeline([make_task()], trials=50)
    run.run()
    (entry,) = read_profile(tmp_path / "cpu.yaml").entries
    feasible = [c for c in outcomes(run) if outcomes(run)[c].outcome == "ok"]
    assert entry.verdict == "win"
    assert entry.config["block_C"] == max(feasible)
    assert entry.time_us < entry.default_us
    assert entry.config["threads"] == run.studies[0].search.default["threads"], "threads mean nothing on the CPU target"
    assert entry.copy_share == pytest.approx(entry.gbps / 10.0, abs=1e-3)


def test_a_second_run_measures_nothing_new_and_gives_the_same_entry(make_pipeline, tmp_path):
    first = make_pipeline([make_task()])
    first.run()
    before = read_profile(tmp_path / "cpu.yaml").entries
    (tmp_path / "cpu.yaml").unlink()
    second = make_pipeline([make_task()])
    second.run()
    assert first.measured == 4
    assert second.measured == 0
    assert read_profile(tmp_path / "cpu.yaml").entries == before


def test_more_trials_go_on_from_the_stored_ones_without_repeating_any(make_pipeline):
    make_pipeline([make_task(C=2560)], trials=3).run()
    second = make_pipeline([make_task(C=2560)], trials=5)
    stored = set(second.studies[0].search.results)
    second.run()
    assert second.measured == 2
    assert stored < set(second.studies[0].search.results)


def test_a_crashing_hanging_or_failing_compile_costs_only_its_own_trial(make_pipeline, monkeypatch):
    monkeypatch.setattr(pipeline_module, "COMPILE_TIMEOUT_S", 4.0)
    run = make_pipeline([make_task()], trials=50, compile=planted.compile_faulty)
    run.run()
    seen = outcomes(run)
    faulty = {128: "crash", 320: "timeout", 512: "compile_error", 640: "infeasible"}
    assert {c: r.outcome for c, r in seen.items() if r.outcome != "ok"} == faulty
    assert "SIGSEGV" in seen[128].reason
    assert seen[512].reason.endswith("no available layout found")
    assert "shared memory" in seen[640].reason
    assert run.entries, "the other configurations were tuned all the same"


def test_a_measurement_that_kills_its_process_is_stored_and_the_next_one_runs(make_pipeline):
    run = make_pipeline([make_task()], trials=50, measure=planted.measure_dying)
    run.run()
    assert outcomes(run)[1280].outcome == "crash"
    assert "exit code 9" in outcomes(run)[1280].reason
    assert run.entries[0].config["block_C"] != 1280


def test_the_time_limit_ends_the_run_and_keeps_what_was_found(make_pipeline):
    tasks = [make_task(C=C) for C in (1280, 1920, 2560, 4096)]
    run = make_pipeline(tasks, trials=50, measure=planted.measure_slowly, time_limit=5.0)
    start = time.monotonic()
    run.run()
    assert time.monotonic() - start < 20
    assert sorted(e.C for e in run.entries) == [1280, 1920, 2560, 4096], "every shape gets its share of the time"
    assert not any(s.open for s in run.studies)
    assert run.measured < sum(len(s.search._listed()) for s in run.studies), "there was no time for everything"


def test_studies_of_one_program_share_their_compiles(make_pipeline):
    run = make_pipeline([make_task(T=64), make_task(T=128)], trials=4)
    run.run()
    tried = [set(s.search.results) for s in run.studies]
    assert len(tried[0] & tried[1]) >= 2, "half of the second study's trials come from the first"
    assert len(run._compiled) == len(tried[0] | tried[1])


def test_a_program_without_channels_is_tuned_once_for_every_C(make_pipeline, tmp_path):
    from tuner.search import Task

    base = make_task()
    task = Task(base.kernel, base.p, base.T, base.arch, base.profile, covers=(1280, 2560))
    run = make_pipeline([task])
    run.run()
    assert [e.C for e in read_profile(tmp_path / "cpu.yaml").entries] == [1280, 2560]


def test_raw_results_hold_every_trial(make_pipeline):
    run = make_pipeline([make_task()])
    run.run()
    (study,) = run.raw()["studies"]
    assert len(study["trials"]) == 4
    assert {"config", "outcome", "time_us", "error", "reason"} <= set(study["trials"][0])
    assert study["confirmation"]["entry"]["kernel"] == "pre_bwd"
