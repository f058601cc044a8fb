"""tuner/bench_entrant.py and bench_rivals.py: same function before same clock, alone, stacked and chained; failures as rows."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from mhc import use_backend
from tl_kernels import reference
from tuner.bench_case import GRADIENTS, Case
from tuner.bench_entrant import HOST_SAMPLES, Entrant, Spec, capture, release
from tuner.bench_rivals import RIVALS, Boundary, Rival, rival, rival_names
from tuner.errors import TuneError
from tuner.timing import Clock

CLOCK = Clock("cpu")
TINY = Spec("eager", T=6, n=3, C=16, dtype="float32", seed=3)


@pytest.fixture(autouse=True)
def _quick(request):
    """Ours by the PyTorch reference where no GPU is asked for: what is tested is the benchmark. Nothing is kept from test to test."""
    with use_backend("auto" if request.node.get_closest_marker("gpu") else "reference"):
        yield
    release()


def failing(case: Case) -> Boundary:
    raise RuntimeError("first line\nno such function on this machine")


def test_every_rival_is_known_by_either_spelling():
    assert set(RIVALS) <= set(rival_names())
    assert rival_names()[0] == "ours"
    for name in rival_names():
        assert rival(name).label
        assert rival(name.replace("_", "-")) is rival(name)
    with pytest.raises(TuneError, match="did you mean 'liger'"):
        rival("ligre")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["ours", "eager"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_rivals_compute_the_boundary_of_the_specification(name, dtype, limit, layers):
    entrant = Entrant(replace(TINY, rival=name, dtype=dtype, layers=layers), CLOCK)
    assert not entrant.row["failures"]
    assert set(entrant.row["errors"]) == {"y", *GRADIENTS}
    assert max(entrant.row["errors"].values()) < limit
    assert entrant.row["agrees"]
    assert entrant.keys == ["forward_eager", "forward_backward_eager"]


def test_our_chain_is_the_stack():
    entrant = Entrant(replace(TINY, rival="ours", layers=3, chained=True), CLOCK)
    assert not entrant.row["failures"]
    assert max(entrant.row["errors"].values()) < 1e-5


def test_a_rival_without_a_chain_says_so():
    assert "no way to chain" in Entrant(replace(TINY, layers=2, chained=True), CLOCK).row["failures"][0]


def test_liger_parameters_go_into_its_layout_and_back(monkeypatch):
    # what its documentation says it computes, in PyTorch: H_res starts with rows and is stored [target, source]
    def coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res, *, allow_fp32, pre_eps):
        assert allow_fp32
        n = x.shape[1]
        z, rinv = reference.project(x, phi.T)
        scale = torch.stack([alpha_pre, alpha_post, alpha_res])
        H_pre, H_post, h_res = reference.activate(z, rinv, scale, b, pre_eps=pre_eps)
        assert h_res.shape[1:] == (n, n)
        return H_pre, H_post, reference.sinkhorn(h_res.transpose(1, 2), order="rows_first")

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_mhc_coeffs = coeffs
    functional.liger_mhc_pre = reference.pre
    functional.liger_mhc_post_res = reference.post_res
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    for layers in (1, 2):
        entrant = Entrant(replace(TINY, rival="liger", layers=layers), CLOCK)
        assert not entrant.row["failures"]
        assert max(entrant.row["errors"].values()) < 1e-5


def test_a_rival_with_streams_innermost_and_no_backward_is_stacked_all_the_same():
    def make(case: Case) -> Boundary:
        inner = RIVALS["eager"].make(case)
        start = case.x.transpose(1, 2).contiguous()

        def step(streams):
            return inner.step(streams.transpose(1, 2)).detach().transpose(1, 2).contiguous()

        return Boundary(lambda: step(start).transpose(1, 2), (), lambda grads: {}, step, start)

    for layers in (1, 2):
        entrant = Entrant(replace(TINY, layers=layers), CLOCK, Rival("innermost", make))
        assert not entrant.row["failures"]
        assert entrant.row["note"] == "forward only"
        assert set(entrant.row["errors"]) == {"y"}
        assert entrant.row["agrees"]
        assert entrant.keys == ["forward_eager"]
        assert set(entrant.host()) == {"forward"}


def test_a_rival_that_fails_is_a_row():
    row = Entrant(TINY, CLOCK, Rival("broken one", failing)).row
    assert row["failures"] == ["RuntimeError: no such function on this machine"]
    assert row["label"] == "broken one"
    assert not row["agrees"]


def test_a_rival_that_is_not_installed_is_missing_not_broken():
    def make(case: Case) -> Boundary:
        import no_such_package_at_all  # noqa: F401

    row = Entrant(TINY, CLOCK, Rival("absent", make)).row
    assert "no_such_package_at_all" in row["missing"]
    assert not row["failures"]


def test_a_rival_that_computes_something_else_is_marked():
    def twice(case: Case) -> Boundary:
        boundary = RIVALS["eager"].make(case)
        return replace(boundary, forward=lambda: boundary.forward() * 2)

    row = Entrant(TINY, CLOCK, Rival("doubled", twice)).row
    assert row["errors"]["y"] == pytest.approx(1)
    assert not row["agrees"]


def test_a_wrong_gradient_of_one_layer_is_seen():
    made = []

    def make(case: Case) -> Boundary:
        boundary = RIVALS["eager"].make(case)
        made.append(boundary)
        if len(made) < 2:
            return boundary
        return replace(boundary, canonical=lambda grads: {k: v * (1.5 if k == "base" else 1) for k, v in boundary.canonical(grads).items()})

    row = Entrant(replace(TINY, layers=2), CLOCK, Rival("wrong db", make)).row
    assert row["errors"]["base"] > 0.1
    assert row["errors"]["fn"] < 1e-5
    assert not row["agrees"]


def test_times_are_per_boundary():
    class Fixed(Clock):
        def interleaved(self, calls, rounds):
            return [[30.0] * len(calls)] * rounds

    entrant = Entrant(replace(TINY, layers=3), Fixed("cpu"))
    assert entrant.sample() == {"forward_eager": 10.0, "forward_backward_eager": 10.0}


def test_decode_is_forward_only_and_has_the_hosts_time_of_both():
    entrant = Entrant(replace(TINY, rival="ours", T=1, decode=True), CLOCK)
    assert not entrant.row["failures"]
    assert entrant.keys == ["forward_eager"]
    host = entrant.host()
    assert set(host) == {"forward", "record", "forward_backward"}
    assert all(us > 0 for us in host.values())


def test_the_hosts_time_is_per_boundary_and_the_median_of_its_calls(monkeypatch):
    entrant = Entrant(replace(TINY, rival="ours", layers=3), CLOCK)
    taken: dict[object, int] = {}

    def wall_us(call):
        taken[call] = taken.get(call, 0) + 1
        interrupted = taken[call] == 2
        return 3.0 * (1000.0 if interrupted else 10.0 + len(taken))

    monkeypatch.setattr("tuner.bench_entrant.wall_us", wall_us)
    assert entrant.host() == {"forward": 11.0, "record": 12.0, "forward_backward": 13.0}
    assert set(taken.values()) == {HOST_SAMPLES}


def test_untimed_entrants_run_once_and_are_not_checked():
    entrant = Entrant(replace(TINY, timed=False), CLOCK)
    assert not entrant.keys
    assert not entrant.row["errors"]
    assert not entrant.row["failures"]
    assert entrant.launches() == {}


@pytest.mark.gpu
def test_graph_replay_follows_its_inputs():
    x = torch.ones(4, device="cuda")
    replay, out = capture(lambda: x * 2)
    x.fill_(3)
    replay()
    assert out.tolist() == [6.0] * 4


@pytest.mark.gpu
def test_captures_survive_a_failed_one_and_a_new_stage():
    x = torch.ones(4, device="cuda")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            capture(lambda: x.sum().item())  # a synchronisation cannot be captured
        torch.cuda.synchronize()
        replay, out = capture(lambda: x + 1)
        replay()
        assert out.tolist() == [2.0] * 4
        del replay, out
        release()


@pytest.mark.gpu
@pytest.mark.parametrize("chained", [False, True])
def test_entrants_on_the_gpu(chained):
    spec = Spec("ours", T=64, n=4, C=256, dtype="bfloat16", layers=2, chained=chained)
    entrant = Entrant(spec, Clock("cuda"))
    assert not entrant.row["failures"]
    assert entrant.row["agrees"], entrant.row["errors"]
    assert set(entrant.keys) == {f"{p}_{kind}" for p in ("forward", "forward_backward") for kind in ("graph", "eager")}
    assert all(us > 0 for us in entrant.sample().values())
    assert entrant.row["peak_mib"] > 0
    counts = entrant.launches()["forward"]
    assert counts is None or counts["launches"] >= 2
