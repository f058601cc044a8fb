"""tuner/search.py: the default first, nothing infeasible, nothing twice, nothing lost."""

import pytest

from tests.tuner.conftest import make_task
from tl_kernels import KERNELS
from tuner.search import Result, Search, config_key, open_storage


@pytest.fixture
def storage(tmp_path):
    return open_storage(f"sqlite:///{tmp_path}/study.db")


def drain(search):
    """Propose and tell until there is nothing left; the configurations in order."""
    tried = []
    while (cfg := search.propose()) is not None:
        tried.append(cfg)
        search.tell(cfg, Result("ok", time_us=float(len(tried)), time_ci_us=(0.5, 1.5)))
    return tried


def test_the_default_comes_first_and_nothing_twice(storage):
    search = Search(make_task("post_res", C=2560, arch="sm_90a"), storage, 20, seed=0)
    tried = drain(search)
    assert tried[0] == search.default
    assert len(tried) == 20 == len({config_key(cfg) for cfg in tried})
    invalid = KERNELS["post_res"].invalid
    assert [invalid(search.task.p, cfg) for cfg in tried] == [None] * 20


def test_seeds_that_fit_the_problem_follow_the_default(storage):
    kernel = KERNELS["streams_grad"]
    search = Search(make_task("streams_grad", C=2560, arch="sm_90a"), storage, 20, seed=0)
    fit = [dict(seed) for seed in kernel.seeds if kernel.invalid(search.task.p, seed) is None]
    assert 0 < len(fit) < len(kernel.seeds)
    assert drain(search)[1 : 1 + len(fit)] == fit


def test_seeds_are_for_gpus(storage):
    search = Search(make_task("streams_grad", C=2560), storage, 4, seed=0)
    assert not [cfg for cfg in drain(search) if cfg in KERNELS["streams_grad"].seeds]


def test_batches_without_results_are_distinct_too(storage):
    search = Search(make_task("post_res", C=2560, arch="sm_90a"), storage, 12, seed=0)
    batch = [search.propose() for _ in range(12)]
    assert search.propose() is None
    assert len({config_key(cfg) for cfg in batch}) == 12


def test_a_small_space_is_tried_in_full_and_then_ends(storage):
    search = Search(make_task("pre", C=1280), storage, 500, seed=0)
    tried = drain(search)
    everything = {config_key(cfg) for cfg in search._listed()}
    assert {config_key(cfg) for cfg in tried} >= everything
    assert search.left == 0


def test_gpu_only_knobs_keep_their_default_on_the_cpu(storage):
    search = Search(make_task("post_res", C=2560), storage, 10, seed=0)
    assert {cfg["threads"] for cfg in drain(search)} == {search.default["threads"]}


def test_the_same_seed_tries_the_same_configurations(tmp_path):
    runs = []
    for i in range(2):
        storage = open_storage(f"sqlite:///{tmp_path}/{i}.db")
        runs.append(drain(Search(make_task("post_res", C=2560, arch="sm_90a"), storage, 12, seed=3)))
    assert runs[0] == runs[1]


def test_stored_trials_come_back_with_every_field(storage):
    task = make_task("post_res", C=2560, arch="sm_90a")
    first = Search(task, storage, 3, seed=0)
    results = [
        Result("ok", 12.5, (12.0, 13.0), {"y": 1e-3}, samples=7, compile_s=1.5, shared_bytes=1024),
        Result("wrong", reason="y: relative error 1e-1"),
        Result("crash", reason="its process died (SIGSEGV)"),
    ]
    for result in results:
        first.tell(first.propose(), result)
    second = Search(task, storage, 3, seed=0)
    assert second.results == first.results
    assert second.propose() is None
    assert second.best_us == 12.5


def test_infeasible_after_lowering_does_not_count_as_a_trial(storage):
    search = Search(make_task("post_res", C=2560, arch="sm_90a"), storage, 3, seed=0)
    search.tell(search.propose(), Result("infeasible", reason="too much shared memory"))
    assert search.count == 0
    assert len(drain(search)) == 3


def test_hints_of_a_sibling_come_right_after_the_default(storage):
    task = make_task("post_res", C=2560, arch="sm_90a")
    space = Search(task, storage, 8, seed=0)._listed()
    hints = [cfg for cfg in space if cfg != task.spec.default(task.p)][:6]
    search = Search(task, storage, 8, seed=0, hints=lambda: hints)
    assert drain(search)[1:5] == hints[:4], "half of the trials at most"


def test_a_withdrawn_configuration_may_be_proposed_again(storage):
    search = Search(make_task("pre", C=1280), storage, 500, seed=0)
    cfg = search.propose()
    search.withdraw(cfg)
    assert not search.inflight
    assert search.count == 0


def test_a_confirmation_is_void_once_a_trial_was_added(storage):
    task = make_task("post_res", C=2560, arch="sm_90a")
    search = Search(task, storage, 3, seed=0)
    search.tell(search.propose(), Result("ok", 1.0, (1.0, 1.0)))
    search.confirm({"entry": {}})
    assert Search(task, storage, 3, seed=0).confirmation is not None
    search.tell(search.propose(), Result("ok", 2.0, (2.0, 2.0)))
    assert Search(task, storage, 3, seed=0).confirmation is None


def test_the_study_of_a_program_without_channels_does_not_depend_on_the_workloads_chosen():
    assert make_task("sinkhorn", C=1280).key == make_task("sinkhorn", C=4096).key
    assert make_task("pre", C=1280).key != make_task("pre", C=4096).key
