"""Which design serves an operator: the first, unless the profile has times at this shape that speak for another."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mhc
from mhc import backend, plan, profile
from mhc.schema import Entry
from tests.conftest import relative_error
from tests.mhc.test_fused import chained, make_inputs
from tests.mhc.test_schema import ENTRY
from tl_kernels import KERNELS, WHOLE
from tl_kernels.cpu import available

PIECES = ["project_parts", "coefficients", "pre", "post_res_project", "coefficients", "pre", "post_res"]
APART = [*PIECES[:3], "post_res", "project_parts", "coefficients", "pre", "post_res"]
SHORTCUTS = ["project_pre", "coefficients", "post_res_project_pre", "coefficients", "post_res"]
SMALL = {"block_T": 16, "block_C": 64, "groups": 2, "threads": 128, "ahead": 1, "levels": 1, "slack": 0}
SMALL |= {"early": 0, "word": 4, "widen": 3, "roles": 3}


def tuned(times, impl="reference", n=4, C=64):
    """A stand-in for ``profile.choose``: kernels of ``times`` were tuned at this shape, the others were not."""
    choose = profile.choose

    def chosen(kernel, p, T, device):
        config = SMALL if kernel in WHOLE else choose(kernel, p, T, device).config
        if kernel not in times:
            return profile.Choice(config, impl, "default")
        entry = Entry.model_validate({**ENTRY, "kernel": kernel, "n": n, "C": C, "config": dict(config), "time_us": times[kernel]})
        return profile.Choice(config, impl, "exact", entry)

    return chosen


@pytest.fixture
def served(monkeypatch):
    """Names of the kernels that the reference stood in for, in order."""
    names, run_reference = [], backend.run_reference
    monkeypatch.setattr(backend, "run_reference", lambda name, *rest: names.append(name) or run_reference(name, *rest))
    profile.reset()
    yield names
    profile.reset()


FAST = {"project_pre": 1.0, "post_res_project_pre": 1.0}
BACKWARD = ["pre_grad", "coefficients_bwd", "streams_grad", "sum_parts"]
WHOLE_BACKWARD = ["post_res_coefficients_bwd", "pre_streams_grad", "sum_parts"]
FAST_BACKWARD = {"post_res_coefficients_bwd": 0.2, "pre_streams_grad": 2.0}
SLOW_TOGETHER = {"post_res": 0.5, "project_parts": 0.6, "post_res_project": 1.2}


@pytest.mark.parametrize(
    ("times", "C", "expected"),
    [
        ({}, 64, PIECES),
        (FAST, 64, SHORTCUTS),
        ({**FAST, "project_parts": 0.5, "pre": 0.4, "post_res_project": 0.5}, 64, PIECES),
        ({**FAST, "project_parts": 0.5, "pre": 0.6, "post_res_project": 0.5}, 64, SHORTCUTS),
        ({"project_pre": 1.0, "project_parts": 0.5, "pre": 0.6}, 64, [*SHORTCUTS[:2], *PIECES[3:]]),
        (FAST, 128, PIECES),  # tuned at another C
        ({**FAST, "coefficients": 9.0}, 64, SHORTCUTS),  # both designs run it
        (SLOW_TOGETHER, 64, APART),
        ({**SLOW_TOGETHER, "post_res_project": 1.0}, 64, PIECES),
        ({**SLOW_TOGETHER, "post_res_project": 1.105}, 64, PIECES),  # no more than the noise
        ({"post_res": 0.5, "post_res_project": 1.2}, 64, PIECES),  # project_parts was not tuned
        ({**SLOW_TOGETHER, "pre": 0.6, "post_res_project_pre": 1.6}, 64, [*PIECES[:3], *SHORTCUTS[2:]]),
        ({**SLOW_TOGETHER, "pre": 0.4, "post_res_project_pre": 1.6}, 64, APART),
    ],
)
def test_the_fastest_design_serves(served, monkeypatch, times, C, expected):
    monkeypatch.setattr(profile, "choose", tuned(times))
    inputs = make_inputs(T=6, C=C, dtype=torch.bfloat16)
    with torch.no_grad(), mhc.use_backend("auto"):
        chained(inputs)
    assert served == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, BACKWARD),
        (FAST_BACKWARD, WHOLE_BACKWARD),
        ({"pre_streams_grad": 2.0}, BACKWARD),  # half of a design
        ({**FAST_BACKWARD, "pre_grad": 0.5, "coefficients_bwd": 0.2, "streams_grad": 1.4}, BACKWARD),
        ({**FAST_BACKWARD, "pre_grad": 0.7, "coefficients_bwd": 0.2, "streams_grad": 1.4}, WHOLE_BACKWARD),
    ],
)
def test_the_fastest_backward_serves(served, monkeypatch, times, expected):
    monkeypatch.setattr(profile, "choose", tuned(times, C=256))
    with mhc.use_backend("auto"):
        out = chained(make_inputs(T=6, C=256, dtype=torch.bfloat16))
        served.clear()
        out["next_y"].float().sum().backward()
    assert served == ["post_res_grads", *expected, "post_res_grads", *expected]


def test_a_design_whose_blocks_do_not_all_fit_the_gpu_beside_nccl_is_not_taken(monkeypatch):
    """They would wait for each other for ever, or for as long as NCCL has the multiprocessors they lack."""
    step = plan._Step.__new__(plan._Step)
    step.kernel, step.tokens, step.device = KERNELS["pre_streams_grad"], 64, torch.device("cuda")
    step.problem = step.kernel.problem(4, 7168)
    entry = {**ENTRY, "kernel": "pre_streams_grad", "n": 4, "C": 7168, "config": step.kernel.default(step.problem), "time_us": 9.0}
    choice = profile.Choice({}, "tilelang", "exact", Entry.model_validate(entry))
    monkeypatch.setattr(profile, "choose", lambda *_: choice)
    for multiprocessors, time in ((148, 9.0), (144, 9.0), (143, None), (78, None)):
        properties = SimpleNamespace(multi_processor_count=multiprocessors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert step.tuned_us() == time
    properties.multi_processor_count = 132
    for reserved, time in (("20", 9.0), ("0", 9.0), ("21", None), (" ", None)):
        monkeypatch.setenv("MHC_RESERVED_SMS", reserved)
        assert step.tuned_us() == time
    monkeypatch.setenv("MHC_RESERVED_SMS", "133")  # more than there are
    assert step.tuned_us() is None


@pytest.mark.parametrize("value", ["few", "-1", "1.5", "\u0663", "9" * 5000])
def test_what_is_no_number_of_multiprocessors_is_said(monkeypatch, value):
    monkeypatch.setenv("MHC_RESERVED_SMS", value)
    with pytest.raises(
        ValueError, match=r"MHC_RESERVED_SMS: got '.+', wanted a number of multiprocessors, 0 or more; 32 where it is not set"
    ):
        plan.reserved_sms()


@pytest.mark.skipif(not available(), reason="no C++ compiler")
def test_on_the_cpu_pytorch_serves_shapes_that_no_entry_does(served, monkeypatch):
    monkeypatch.setenv("MHC_PROFILE", "none")
    inputs = make_inputs(T=6, C=64)
    with torch.no_grad(), mhc.use_backend("auto"):
        chained(inputs)
    assert served == PIECES
    del served[:]
    with torch.no_grad(), mhc.use_backend("tilelang"):
        mhc.ops.pre(inputs[0], torch.ones(6, 4))
    assert served == []


@pytest.mark.parametrize(("n", "C", "dtype"), [(5, 64, torch.bfloat16), (4, 36, torch.bfloat16), (4, 64, torch.float32)])
def test_a_shortcut_that_does_not_serve_is_not_taken(served, monkeypatch, n, C, dtype):
    monkeypatch.setattr(profile, "choose", tuned(FAST, n=n, C=C))
    with torch.no_grad(), mhc.use_backend("auto"):
        chained(make_inputs(T=6, n=n, C=C, dtype=dtype))
    assert served == PIECES


@pytest.mark.usefixtures("served")
def test_all_designs_give_the_same(monkeypatch):
    grads = []
    for times in ({}, SLOW_TOGETHER, {**FAST, **FAST_BACKWARD}):
        monkeypatch.setattr(profile, "choose", tuned(times, C=256))
        profile.reset()
        inputs = make_inputs(T=6, C=256, dtype=torch.bfloat16)
        with mhc.use_backend("auto"):
            out = chained(inputs)
            out["next_y"].float().square().sum().backward()
        grads.append([*(t.detach() for t in out.values()), *(t.grad for t in inputs)])
    for first, *others in zip(*grads, strict=True):
        assert all(relative_error(other, first) < 2e-3 for other in others)


@pytest.mark.skipif(not available(), reason="no C++ compiler for the CPU target")
def test_the_whole_backward_on_the_cpu_target(served, monkeypatch):
    """Its kernels themselves; the reference for what they share with the other design."""
    grads, choose = [], {whole: tuned(FAST_BACKWARD if whole else {}, n=2, C=256) for whole in (False, True)}
    for whole in choose:

        def chosen(kernel, *shape, whole=whole):
            choice = choose[whole](kernel, *shape)
            return replace(choice, impl="tilelang") if kernel in FAST_BACKWARD else choice

        monkeypatch.setattr(profile, "choose", chosen)
        profile.reset()
        inputs = make_inputs(T=70, n=2, C=256, dtype=torch.bfloat16)
        with mhc.use_backend("auto"):
            out = chained(inputs)
            served.clear()
            out["next_y"].float().square().sum().backward()
        grads.append([t.grad for t in inputs])
    assert served == ["post_res_grads", "sum_parts"] * 2
    assert all(relative_error(b, a) < 4e-3 for a, b in zip(*grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 100, 1000])
def test_all_designs_give_the_same_on_a_gpu(monkeypatch, T):
    results = []
    for times in ({}, SLOW_TOGETHER, {**FAST, **FAST_BACKWARD}):
        monkeypatch.setattr(profile, "choose", tuned(times, "tilelang", C=256))
        profile.reset()
        inputs = make_inputs(T=T, C=256, dtype=torch.bfloat16, device="cuda")
        out = chained(inputs)
        out["next_y"].float().square().sum().backward()
        results.append([*(t.detach() for t in out.values()), *(t.grad for t in inputs)])
    profile.reset()
    for first, *others in zip(*results, strict=True):
        assert all(relative_error(other, first) < 4e-3 for other in others)


@pytest.mark.gpu
def test_shortcuts_under_reduce_overhead(monkeypatch):
    """torch.compile's CUDA graphs: a call that warms up, one that is recorded, then replays."""
    monkeypatch.setattr(profile, "choose", tuned({**FAST, **FAST_BACKWARD}, "tilelang", C=256))
    profile.reset()
    inputs = make_inputs(T=100, C=256, dtype=torch.bfloat16, device="cuda")

    def forward(*inputs):
        return chained(inputs)["next_y"]

    def step(forward):
        y = forward(*inputs)
        return [t.detach().clone() for t in (y, *torch.autograd.grad(y, inputs, torch.ones_like(y)))]

    want, compiled = step(forward), torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    try:
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert all(torch.equal(g, w) for g, w in zip(step(compiled), want, strict=True))
    finally:
        torch._dynamo.reset()  # which keeps the graphs
        profile.reset()


def test_what_begins_anywhere_is_copied(monkeypatch):
    """Parameters in one flat buffer, as optimizers keep them: phi behind alpha begins 12 bytes off, and programs read 16 at a time."""
    begins, run_reference = [], backend.run_reference

    def recorded(name, tensors, *rest):
        begins.extend(t.data_ptr() % 16 for t in tensors)
        return run_reference(name, tensors, *rest)

    monkeypatch.setattr(backend, "run_reference", recorded)
    inputs = make_inputs(C=64)
    flat = torch.cat([torch.zeros(3), *(t.detach().flatten() for t in inputs)])
    views = [v.view_as(t) for v, t in zip(flat[3:].split([t.numel() for t in inputs]), inputs, strict=True)]
    assert any(v.data_ptr() % 16 for v in views)
    with mhc.use_backend("reference"):
        want, got = chained(inputs), chained([v.requires_grad_() for v in views])
        assert torch.equal(got["next_y"], want["next_y"])
        got["next_y"].square().sum().backward()
    assert set(begins) == {0}


@pytest.mark.usefixtures("reference_backend")
def test_a_shortcut_called_by_itself_checks_its_arguments():
    from mhc.fused import KERNEL_CALLS

    x, phi, alpha, b, *_ = make_inputs(C=64)
    u, parts = KERNEL_CALLS["project_pre"](x, phi, alpha, b)
    assert u.shape == (5, 64)
    assert parts.shape == (1, 25, 5)
    with pytest.raises(ValueError, match=r"mhc\.project_pre: b: got shape \(3,\), wanted \(24,\)"):
        KERNEL_CALLS["project_pre"](x, phi, alpha, b[:3])


def test_a_shortcut_called_by_itself_says_what_it_does_not_serve():
    from mhc.fused import KERNEL_CALLS

    x, phi, alpha, b, *_ = make_inputs(C=64)
    with mhc.use_backend("tilelang"), pytest.raises(ValueError, match=r"mhc\.project_pre: n=4, C=64, float32: wanted at most 4 bfloat16"):
        KERNEL_CALLS["project_pre"](x, phi, alpha, b)
