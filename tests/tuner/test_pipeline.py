"""tuner/pipeline.py: studies from first proposal to written entry, faults kept to their own trial, resumption, time limits."""

import re
import time
from dataclasses import replace

import pytest

from mhc.profile import read_profile
from tests.tuner import fleet, planted
from tests.tuner.conftest import make_task
from tuner import pipeline as pipeline_module
from tuner import store as store_module
from tuner.deadline import Deadline
from tuner.devices import Device
from tuner.evidence import verdict_text
from tuner.hardware import Hardware
from tuner.pipeline import DeviceLost, MachineTrouble
from tuner.raw import raw
from tuner.store import StorageLost
from tuner.worker import open_orders


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
    assert run.measured < sum(len(s.search.space.listed) for s in run.studies), "there was no time for everything"


class UpAfter(Deadline):
    """Time is up once so many configurations were measured, however long that takes."""

    def __init__(self, run, measured):
        super().__init__(None, len(run.studies), run.lookahead)
        self._run, self._measured = run, measured

    @property
    def up(self):
        return self._run.measured >= self._measured

    def late(self, position):
        return self.up


def test_where_time_is_up_before_the_default_nothing_ships_and_the_same_command_goes_on(make_pipeline):
    run = make_pipeline([gpu_task()], trials=3, compile=planted.compile_without_end_for_the_default, hardware=GPU)
    run.deadline = UpAfter(run, 2)
    run.run()
    assert [r.outcome for r in outcomes(run).values()] == ["ok"] * 2
    assert not run.entries
    assert run.unreached == [f"{gpu_task().label}: the default was not measured; time was up"]
    again = make_pipeline([gpu_task()], trials=2, hardware=GPU)  # others have used the whole budget
    again.run()
    assert again.measured == 1
    assert again.entries[0].default_us == pytest.approx(planted.measured_us(again.studies[0].search.default), rel=1e-3)


def test_where_the_default_fails_the_best_of_the_others_ships_without_a_time_of_it(make_pipeline, tmp_path):
    run = make_pipeline([make_task()], trials=50, measure=planted.measure_all_but_the_default)
    run.run()
    (entry,) = read_profile(tmp_path / "cpu.yaml").entries
    best, second = sorted((c for c, r in outcomes(run).items() if r.outcome == "ok"), reverse=True)[:2]
    assert (entry.verdict, entry.config["block_C"]) == ("win", best)
    assert entry.time_us == pytest.approx(planted.measured_us({"block_C": best}), rel=1e-3)
    assert entry.runner_up_us == pytest.approx(planted.measured_us({"block_C": second}), rel=1e-3)
    assert (entry.default_us, entry.default_ci_us, entry.gain_ci) == (None, None, None)
    assert "the default configuration does not work here" in verdict_text(entry)


def test_a_confirmation_of_fewer_rounds_than_are_asked_for_is_made_again(make_pipeline):
    first = make_pipeline([make_task()])
    first.run()
    full = make_pipeline([make_task()], rounds=50)
    assert full.studies[0].search.confirmation is None
    assert open_orders(full.store, full.settings.hardware, ["pre_bwd"])[0], "a worker may help"
    full.run()
    assert full.measured == 0
    assert full.phases.seconds["confirm"] > 0
    quick = make_pipeline([make_task()])
    assert quick.studies[0].search.confirmation is not None, "more rounds are as good"
    assert not open_orders(quick.store, quick.settings.hardware, ["pre_bwd"])[0]


def test_the_profile_names_the_seed_of_the_study_that_made_the_entry(make_pipeline, tmp_path):
    make_pipeline([make_task()], seed=3).run()
    make_pipeline([make_task()], seed=4).run()
    assert read_profile(tmp_path / "cpu.yaml").provenance.seed == 3
    make_pipeline([make_task()], trials=5, seed=4).run()
    assert read_profile(tmp_path / "cpu.yaml").provenance.seed == 4


def test_studies_of_one_program_share_their_compiles(make_pipeline):
    run = make_pipeline([make_task(T=64), make_task(T=128)], trials=4)
    run.run()
    tried = [set(s.search.results) for s in run.studies]
    assert len(tried[0] & tried[1]) >= 2, "half of the second study's trials come from the first"
    assert len(run.compiling.futures) == len(tried[0] | tried[1])


def test_a_program_without_channels_is_tuned_once_for_every_C(make_pipeline, tmp_path):
    task = replace(make_task(), covers=(1280, 2560))
    run = make_pipeline([task])
    run.run()
    assert [e.C for e in read_profile(tmp_path / "cpu.yaml").entries] == [1280, 2560]


def test_raw_results_hold_every_trial(make_pipeline):
    run = make_pipeline([make_task()])
    run.run()
    (study,) = raw(run)["studies"]
    assert len(study["trials"]) == 4
    assert {"config", "outcome", "time_us", "error", "reason"} <= set(study["trials"][0])
    assert study["confirmation"]["entry"]["kernel"] == "pre_bwd"


GPU = Hardware(profile="h100", name="Test GPU", arch="sm_90a")
TWO = (Device(0, "0", "h100", "Test GPU"), Device(1, "1", "h100", "Test GPU"))


def gpu_task(**kwargs):
    return make_task(arch="sm_90a", device="Test GPU", **kwargs)


def test_two_devices_share_one_search(make_pipeline):
    tasks = [gpu_task(C=C) for C in (1280, 2560)]
    run = make_pipeline(tasks, trials=8, measure=planted.measure_where, hardware=GPU, devices=TWO)
    run.run()
    by_device = [result.samples for study in run.studies for _, result in study.search.results.values() if result.outcome == "ok"]
    assert len(by_device) == run.measured == sum(study.search.count for study in run.studies)
    assert min(by_device.count(0), by_device.count(1)) >= 3, "both measure"
    assert sorted(entry.C for entry in run.entries) == [1280, 2560]
    # 0.04 s of each measurement are the gate's, 0.05 s the timing's
    assert run.phases.seconds["gate"] == pytest.approx(0.04 * run.measured, rel=0.05)
    assert run.phases.seconds["timing"] == pytest.approx(0.05 * run.measured, rel=0.05)
    assert "on 2 devices" in run.time_lines()[0]
    assert "timing" in run.time_lines()[0]


def test_a_lost_device_leaves_its_work_to_the_other(make_pipeline):
    run = make_pipeline([gpu_task(C=2560)], trials=6, measure=planted.measure_on_one_of_two, hardware=GPU, devices=TWO)
    run.run()
    assert len(run.entries) == 1
    results = [r.outcome for _, r in run.studies[0].search.results.values() if r.counts]
    assert results == ["ok"] * 6, "what the lost device was given is no failure of the configuration"


def test_the_last_device_lost_ends_the_run_and_gives_everything_back(make_pipeline):
    run = make_pipeline([gpu_task(C=2560)], measure=planted.measure_nowhere, hardware=GPU)
    with pytest.raises(DeviceLost, match=r"Test GPU: lost in mid-run: .*the GPU is gone"):
        run.run()
    assert not run.studies[0].search.count
    assert not any(row.running for row in run.studies[0].search._claims.read())


def test_a_busy_device_is_asked_again(make_pipeline):
    run = make_pipeline([make_task()], trials=3, measure=planted.measure_when_free)
    run.run()
    assert [r.outcome for r in outcomes(run).values()] == ["ok"] * 3


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ({"compile": planted.compile_on_a_full_disk}, "error writing to /tmp/x.s: No space left on device; 5 jobs in a row failed so"),
        ({"measure": planted.measure_never}, "device lock /tmp/x.lock: held by process 1; 5 jobs in a row"),
    ],
    ids=["full disk", "busy device"],
)
def test_trouble_with_the_machine_is_no_configurations_failure(make_pipeline, jobs, said):
    tasks = [gpu_task(C=C, T=T) for C in (1280, 2560) for T in (64, 128)]
    run = make_pipeline(tasks, hardware=GPU, **jobs)
    with pytest.raises(MachineTrouble, match=re.escape(said)):
        run.run()
    for study in run.studies:
        assert not study.search.results
        assert not any(row.running for row in study.search._claims.read())
    again = make_pipeline(tasks, hardware=GPU)
    again.run()
    assert len(again.entries) == len(tasks)
    assert again.measured == 4 * len(tasks)


def test_a_device_kept_while_its_bandwidth_is_measured_is_the_machines_trouble_too(make_pipeline):
    run = make_pipeline([gpu_task()], hardware=GPU, copy=planted.measure_never)
    with pytest.raises(MachineTrouble, match=r"bandwidth failed on Test GPU: device lock /tmp/x\.lock: held by process 1"):
        run.run()
    again = make_pipeline([gpu_task()], hardware=GPU)
    again.run()
    assert again.entries


def test_where_no_worker_can_start_nothing_is_stored(make_pipeline, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/bin/false")
        run = make_pipeline([gpu_task()], hardware=GPU)
        with pytest.raises(
            MachineTrouble, match=r"a worker process did not start: its process died \(exit code 1\); see .*workers\.log; 5"
        ):
            run.run()
        assert not run.studies[0].search.results
    again = make_pipeline([gpu_task()], hardware=GPU)
    again.run()
    assert again.measured == 4
    assert again.entries


def test_a_compile_that_met_with_trouble_is_made_again(make_pipeline):
    run = make_pipeline([make_task(T=64), make_task(T=128)], trials=3, compile=planted.compile_at_the_second_try)
    run.run()
    assert [[r.outcome for r in outcomes(run, study).values()] for study in (0, 1)] == [["ok"] * 3] * 2
    assert all(study.search.default_result for study in run.studies)


def test_what_alone_meets_with_trouble_is_left_for_another_run(make_pipeline):
    run = make_pipeline([make_task()], trials=50, compile=planted.compile_without_memory)
    run.run()
    assert run.entries
    assert 512 not in outcomes(run)
    again = make_pipeline([make_task()], trials=50)
    again.run()
    assert (again.measured, outcomes(again)[512].outcome) == (1, "ok")


def test_what_cannot_win_by_its_bytes_is_not_measured(make_pipeline, monkeypatch):
    seen = []

    def never(kernel, p, T, cfg, copy_gbps, best_us):
        seen.append((cfg, copy_gbps, best_us))
        return "too many bytes" if cfg["block_C"] in (1024, 1280) and best_us is not None else None

    monkeypatch.setattr(pipeline_module, "hopeless", never)
    run = make_pipeline([gpu_task()], trials=100, hardware=GPU)
    run.run()
    search = run.studies[0].search
    refused = [cfg["block_C"] for cfg, r in search.results.values() if r.rung == "roofline"]
    assert refused
    assert set(refused) <= {1024, 1280}
    assert search.funnel()["roofline"] == len(refused)
    assert run.measured == search.count
    assert (10.0, search.default) not in [(gbps, cfg) for cfg, gbps, _ in seen], "the default is always measured"
    assert run.entries[0].funnel == search.funnel()


def test_a_program_that_does_not_compile_is_compiled_once_for_all_token_counts(make_pipeline):
    run = make_pipeline([make_task(T=64)], trials=50, compile=planted.compile_refusing)
    run.run()
    later = make_pipeline([make_task(T=128)], trials=50, compile=planted.compile_refusing)
    later.run()
    assert outcomes(later)[512] == outcomes(run)[512]
    assert outcomes(later)[640].rung == "shared"
    compiled = [key for key in later.compiling.futures if '"block_C": 512' in key[2] or '"block_C": 640' in key[2]]
    assert not compiled


def test_other_shapes_are_tried_where_their_best_was(make_pipeline):
    make_pipeline([make_task(C=2560)], trials=50).run()
    run = make_pipeline([make_task(C=4096)], trials=3)
    run.run()
    search = run.studies[0].search
    assert [cfg["block_C"] for cfg in search._hints()] == [2560, 2048], "the best two of C = 2560"
    asked = [row.cfg["block_C"] for row in search._claims.read() if row.cfg]
    assert asked[1] == 2048, "the one of them that divides C = 4096 comes right after the default"


def test_what_another_gpus_profile_ships_is_tried_before_the_seeds(make_pipeline, tmp_path):
    make_pipeline([make_task(C=2560)], trials=50).run()
    other = read_profile(tmp_path / "cpu.yaml")
    (tmp_path / "cpu.yaml").unlink()
    shipped = other.entries[0].config
    task = gpu_task(C=2560)
    run = make_pipeline([task, gpu_task(C=1280)], trials=2, hardware=GPU, related=(other,))
    run.run()
    tried = [[row.cfg for row in study.search._claims.read() if row.cfg] for study in run.studies]
    assert tried[0] == [task.spec.default(task.p), shipped]
    assert shipped not in tried[1], "at another C it is a hint like any other"
    assert shipped != task.spec.default(task.p)


def test_an_entry_says_how_it_was_found(make_pipeline):
    run = make_pipeline([make_task()], trials=3, sampler="random")
    run.run()
    (entry,) = run.entries
    assert (entry.trials, entry.sampler, entry.clock_mhz) == (3, "random", 1980.0)
    assert entry.default_ci_us[0] <= entry.default_us <= entry.default_ci_us[1]
    assert entry.runner_up_ci_us is not None
    assert entry.tilelang
    assert entry.date


def test_a_storage_removed_in_mid_run_ends_it_with_what_was_written(make_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "PATIENCE_S", (0.01,))
    monkeypatch.setenv("PLANTED_STORAGE", str(tmp_path / "study.db"))
    tasks = [make_task(C=C) for C in (1280, 2560, 4096)]
    run = make_pipeline(tasks, trials=2, confirm=planted.confirm_then_remove_the_storage)
    with pytest.raises(StorageLost, match="was removed"):
        run.run()
    assert len(read_profile(tmp_path / "cpu.yaml").entries) == len(run.entries) == 1
    assert raw(run)["studies"][0]["trials"]


def test_an_interrupted_run_gives_back_what_it_held(make_pipeline, monkeypatch):
    run = make_pipeline([make_task()], measure=planted.measure_slowly)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_measured", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    claims = run.studies[0].search._claims
    assert claims.read()
    assert not any(row.running for row in claims.read())
    assert not fleet.deaths(claims._study.get_trials())
