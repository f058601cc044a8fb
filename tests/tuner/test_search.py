"""tuner/search.py: the default first, nothing infeasible, nothing twice, nothing lost."""

import json
import threading
import time

import pytest
from optuna.trial import TrialState

from tests.tuner import fleet
from tests.tuner.conftest import EFFORT, make_task
from tl_kernels import KERNELS
from tuner import identity
from tuner.search import Search
from tuner.storage import open_storage
from tuner.store import Store
from tuner.task import Order, Result, config_key


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
    space = kernel.space(search.task.p)  # how many helpers there may be depends on C
    listed = [seed for seed in kernel.seeds if all(seed[knob] in values for knob, values in space.items())]
    fit = [dict(seed) for seed in listed if kernel.invalid(search.task.p, seed) is None]
    assert 0 < len(fit) < len(listed) < len(kernel.seeds)
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
    everything = {config_key(cfg) for cfg in search.space.listed}
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


def test_the_default_is_tried_even_where_others_have_used_the_budget(storage):
    task = make_task("post_res", C=2560, arch="sm_90a")
    first = Search(task, storage, 3, seed=0)
    batch = [first.propose() for _ in range(3)]
    for cfg in batch[1:]:
        first.tell(cfg, OK)
    first.withdraw(first.default)
    other = Search(task, storage, 2, seed=0)
    assert other.left == 1
    assert other.propose() == other.default
    assert other.propose() is None
    assert other.default_result is None
    other.tell(other.default, OK)
    assert (other.left, other.default_result) == (0, OK)


def test_infeasible_after_lowering_does_not_count_as_a_trial(storage):
    search = Search(make_task("post_res", C=2560, arch="sm_90a"), storage, 3, seed=0)
    search.tell(search.propose(), Result("infeasible", reason="too much shared memory"))
    assert search.count == 0
    assert len(drain(search)) == 3


def test_hints_of_a_sibling_come_right_after_the_default(storage):
    task = make_task("post_res", C=2560, arch="sm_90a")
    space = Search(task, storage, 8, seed=0).space.listed
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


# -- several workers ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def workers(storage_url, monkeypatch):
    """``workers(task, trials)`` is a search as one more worker has it, with a connection of its own; no two can see each other die."""
    monkeypatch.setattr(identity, "_machine", lambda: None)
    stores = []

    def make(task, trials=100, seed=0, **kwargs):
        stores.append(Store(open_storage(storage_url, heartbeat_s=1, grace_s=1), storage_url))
        return Search(task, stores[-1], trials, seed, **kwargs)

    yield make
    for store in stores:
        store.close()


OK = Result("ok", 1.0, (1.0, 1.0))


def stored(search):
    """Configurations that count in the storage, one for each trial."""
    return [row.key for row in search._claims.read() if row.kind == "config" and row.counts]


def fall_silent(search):
    """As if the process was stopped: it is alive, but nobody hears of it."""
    search._claims.store._stop.set()


def wait_for(condition, *searches):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
        for search in searches:
            search.refresh()


def test_workers_that_propose_at_once_never_get_the_same_nor_more_than_the_budget(workers):
    searches = [workers(make_task("post_res", C=2560, arch="sm_90a"), trials=9) for _ in range(3)]
    got, gate = [[] for _ in searches], threading.Barrier(len(searches))

    def take(search, mine):
        gate.wait()
        while (cfg := search.propose()) is not None:
            mine.append(config_key(cfg))

    threads = [threading.Thread(target=take, args=pair) for pair in zip(searches, got, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [key for mine in got for key in mine]
    assert len(every) == len(set(every)) == 9
    assert sorted(stored(searches[0])) == sorted(every)


def test_a_claim_that_came_second_takes_no_place_in_the_budget(workers):
    first, late, third = (workers(make_task(C=2560), trials=3) for _ in range(3))
    cfg = first.propose()
    claim = late._claims.create(late._template(cfg, TrialState.RUNNING))  # the late one has not looked yet whether it was the first
    assert third.propose() is not None
    first.sync()
    assert first.left == 1
    last = first.propose()
    assert last is not None
    assert third.propose() is None
    late._claims.withdraw(claim, "another worker has it")
    assert len(stored(first)) == 3


def test_what_one_worker_stored_the_other_knows(workers):
    one, other = (workers(make_task(C=2560), trials=3) for _ in range(2))
    cfg = one.propose()
    assert other.propose() != cfg
    one.tell(cfg, Result("ok", 12.5, (12.0, 13.0), {"u": 1e-3}, samples=7, registers=40, clock_mhz=1980.0, rung=None, gate_s=0.5))
    other.sync()
    assert other.results[config_key(cfg)] == one.results[config_key(cfg)]


def test_what_a_dead_worker_held_is_tried_again_and_its_late_result_is_dropped(workers):
    asleep, awake = (workers(make_task(C=2560), trials=3) for _ in range(2))
    cfg = asleep.propose()
    fall_silent(asleep)
    awake.sync()
    assert config_key(cfg) in awake.elsewhere
    wait_for(lambda: config_key(cfg) not in awake.elsewhere, awake)
    again = awake.propose()
    assert again == cfg, "it goes first"
    asleep.tell(cfg, Result("ok", 1.0, (1.0, 1.0)))
    assert asleep.measured_now == 0
    assert config_key(cfg) in asleep.elsewhere, "the other one is at it"
    awake.tell(again, Result("ok", 2.0, (2.0, 2.0)))
    asleep.sync()
    assert asleep.results[config_key(cfg)][1].time_us == 2.0
    assert stored(awake) == [config_key(cfg)]


def bury(search, trial_id):
    """As the reaper does once the process that holds the trial is dead."""
    search._claims.store.storage.set_trial_state_values(trial_id, TrialState.FAIL)


def test_workers_that_are_killed_say_nothing_of_what_they_held(workers):
    for _ in range(5):
        search = workers(make_task(C=2560))
        batch = [search.propose() for _ in range(3)]
        assert batch[0] == search.default
        for cfg in batch:
            bury(search, search._held_trials[config_key(cfg)])
    last = workers(make_task(C=2560))
    assert last.propose() == last.default
    assert not last.results


def test_workers_that_are_killed_say_nothing_of_the_confirmation(workers):
    one = workers(make_task(C=2560), trials=1)
    one.tell(one.propose(), OK)
    for _ in range(5):
        assert one.claim_confirmation()
        bury(one, one._confirming[0])
    assert one.claim_confirmation()


def test_what_was_withdrawn_is_no_death(workers):
    search = workers(make_task(C=2560))
    search.propose()
    search.release()
    assert not fleet.deaths(search._claims._study.get_trials())


def test_devices_of_another_name_do_not_share_a_study(workers):
    one, other = workers(make_task(device="NVIDIA H100 PCIe")), workers(make_task(device="NVIDIA H100 80GB HBM3"))
    one.tell(one.propose(), OK)
    other.sync()
    assert not other.results
    assert other.propose() == other.default


def test_one_worker_confirms(workers):
    one, other = (workers(make_task(C=2560), trials=1) for _ in range(2))
    one.tell(one.propose(), OK)
    assert one.claim_confirmation()
    assert not other.claim_confirmation()
    assert other.confirmed_elsewhere
    assert one.confirm({"entry": {}})
    assert not other.claim_confirmation()
    assert other.confirmation == {"entry": {}, "count": 1, "rounds": 0}
    other.sync()
    assert not other.confirmed_elsewhere
    assert other.count == 1, "a confirmation is no trial"


def test_a_dead_workers_confirmation_is_taken_over(workers):
    asleep, awake = (workers(make_task(C=2560), trials=1) for _ in range(2))
    asleep.tell(asleep.propose(), OK)
    assert asleep.claim_confirmation()
    fall_silent(asleep)
    awake.sync()
    wait_for(lambda: not awake.confirmed_elsewhere, awake)
    assert awake.claim_confirmation()
    assert not asleep.confirm({"entry": {"late": True}})
    assert awake.confirm({"entry": {}})
    assert asleep.confirmation == {"entry": {}, "count": 1, "rounds": 0}


def test_brute_force_tries_every_configuration(storage):
    search = Search(make_task("pre_bwd", C=2560), storage, 2, seed=0, sampler="brute-force")
    tried = drain(search)
    assert {config_key(cfg) for cfg in tried} == {config_key(cfg) for cfg in search.space.listed}
    assert len(tried) == search.trials


def test_what_is_known_not_to_compile_is_stored_without_being_proposed(storage):
    bad = Result("compile_error", reason="no layout", stage="compile")
    key = config_key(make_task(C=2560).spec.default(make_task(C=2560).p))
    search = Search(make_task(C=2560), storage, 100, seed=0, known=lambda k: bad if k == key else None)
    assert config_key(search.propose()) != key
    assert search.results[key][1] == bad


def test_the_funnel_counts_every_configuration_of_the_space_once(storage):
    search = Search(make_task("post_res", C=2560, arch="sm_90a"), storage, 100, seed=0)
    results = {
        "spills": Result("infeasible", rung="spills"),
        "roofline": Result("infeasible", rung="roofline"),
        "wrong": Result("wrong"),
        "slow": Result("slow", 2.0),
        "ok": OK,
    }
    for result in results.values():
        search.tell(search.propose(), result)
    funnel = search.funnel()
    assert [funnel[name] for name in results] == [1] * len(results)
    assert funnel["space"] - funnel["constraint"] == len(search.space.listed)
    drain(search)
    funnel = search.funnel()
    assert sum(funnel.values()) == 2 * funnel["space"], "each came to one end"


def test_hints_from_another_shape_come_with_this_shapes_held_knobs(storage):
    search = Search(make_task("pre_bwd", C=2560), storage, 8, seed=0, hints=lambda: [{"block_C": 1024, "threads": 32}])
    assert drain(search)[1] == {"block_C": 1024, "threads": search.default["threads"]}


def test_an_order_survives_the_storage():
    order = Order(make_task("post_res", C=2560, arch="sm_90a"), 7, EFFORT, 3, "gp")
    stored = json.loads(json.dumps(order.as_attr()))
    assert Order.from_attr(stored) == order
    assert Order.from_attr(stored).task.key == order.task.key
