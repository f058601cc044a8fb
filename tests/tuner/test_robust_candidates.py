"""A candidate that hangs, crashes or writes where it may not is a stored failure, and the tuner goes on."""

from __future__ import annotations

from tests.tuner.conftest import make_task
from tests.tuner.planted_faults import FAULTS, confirm_hanging, measure_faulty
from tuner import pipeline as pipeline_module


def test_every_fault_is_stored_and_costs_only_its_own_trial(make_pipeline, monkeypatch):
    monkeypatch.setattr(pipeline_module, "MEASURE_TIMEOUT_S", 3.0)
    run = make_pipeline([make_task(C=3840)], trials=50, measure=measure_faulty)
    run.run()
    seen = {cfg["block_C"]: result for cfg, result in run.studies[0].search.results.values()}
    assert set(FAULTS) < set(seen), "every fault was tried, and other configurations too"
    for block_C, result in seen.items():
        _, outcome, said = FAULTS.get(block_C, (None, "ok", None))
        assert result.outcome == outcome, (block_C, result)
        if said is not None:
            assert said in result.reason
            assert len(result.reason.splitlines()) == 1
    (entry,) = run.entries
    assert entry.config["block_C"] == max(c for c, r in seen.items() if r.outcome == "ok")

    again = make_pipeline([make_task(C=3840)], trials=50, measure=measure_faulty)
    again.run()
    assert again.measured == 0, "failures are stored, and not tried again"
    assert again.entries[0].config == entry.config


def test_a_confirmation_that_hangs_leaves_the_other_studies_alone(make_pipeline, monkeypatch):
    monkeypatch.setattr(pipeline_module, "CONFIRM_TIMEOUT_S", 2.0)
    run = make_pipeline([make_task(C=3840), make_task(C=1280)], confirm=confirm_hanging)
    run.run()
    assert [e.C for e in run.entries] == [1280]
    assert len(run.unreached) == 1
    assert "C=3840" in run.unreached[0]
    assert "no result within 2 s" in run.unreached[0]
    assert [s.search.best_us is not None for s in run.studies] == [True, True], "what was measured stays stored"
