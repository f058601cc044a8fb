"""cross() and chain(): the numbers of one connection after the other, fused or step by step; checkpointing; no stray kernel on a GPU."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhc
from mhc import backend
from tests.conftest import relative_error
from tests.mhc.test_module import trained

DIM, N, DEPTH = 32, 4, 3


def connections(fused=True, device="cpu", **options):
    """DEPTH connections with layers, every parameter large enough to matter; the same for the same options."""
    modules = nn.ModuleList()
    for k in range(DEPTH):
        torch.manual_seed(k)
        modules.append(trained(DIM, N, nn.Linear(DIM, DIM), fused=fused, **options))
        with torch.no_grad():
            modules[k].base.add_(0.1 * k)
    return modules.to(device)


def one_by_one(modules, x):
    for hc in modules:
        x = hc(x)
    return x


def crossed(modules, x):
    u, ctx = modules[0].pre(x)
    for hc, following in pairwise(modules):
        u, ctx = following.cross(hc.layer(u), ctx)
    return modules[-1].post(modules[-1].layer(u), ctx)


def checkpointed(modules, x):
    """The loop of chain()'s docstring."""
    u, ctx = modules[0].pre(x)
    for hc, following in pairwise(modules):

        def body(u, ctx, layer=hc.layer, following=following):
            return following.cross(layer(u), ctx)

        u, ctx = checkpoint(body, u, ctx, use_reentrant=False)
    return modules[-1].post(modules[-1].layer(u), ctx)


def run(path, modules, x):
    """The result and every gradient."""
    x = x.detach().requires_grad_()
    y = path(modules, x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *modules.parameters()], grad)]


def streams(*lead, device="cpu", dtype=torch.float32):
    return torch.randn(*lead, N, DIM, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def assert_same(got, want, tolerance):
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype is w.dtype
        assert relative_error(g, w) <= tolerance, k


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"residual_mixing": False}], ids=["plain", "no mixing"])
def test_chained_unchained_and_five_steps_agree(options, lead, device):
    x = streams(*lead, device=device)
    want = run(one_by_one, connections(fused=False, device=device, **options), x)
    modules = connections(device=device, **options)
    for path in (one_by_one, crossed, mhc.chain):
        got = run((lambda m, x: mhc.chain(x, m)) if path is mhc.chain else path, modules, x)
        assert_same(got, want, 1e-5)


def test_bfloat16_streams(device):
    """float32 layers under autocast between bfloat16 streams."""
    x = streams(5, device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        want = run(one_by_one, connections(fused=False, device=device), x)
        for path in (one_by_one, crossed):
            assert_same(run(path, connections(device=device), x), want, 2e-2)


@pytest.mark.usefixtures("reference_backend")
class TestChain:
    def test_other_options(self):
        test_chained_unchained_and_five_steps_agree({"order": "rows_first", "sinkhorn_iters": 3, "post_mult": 1.5}, (2, 3), "cpu")

    def test_pairs_and_functions(self):
        modules, x = connections(), streams(2, 3)
        pairs = [(hc, lambda u, hc=hc: (hc.layer(u), "weights")) for hc in modules]
        assert torch.equal(mhc.chain(x, pairs), mhc.chain(x, modules))
        assert torch.equal(mhc.chain(x, iter(modules)), mhc.chain(x, modules))

    def test_one_block_and_none(self):
        modules, x = connections(), streams(5)
        assert torch.equal(mhc.chain(x, modules[:1]), modules[0](x))
        assert mhc.chain(x, []) is x

    @pytest.mark.parametrize("block", [nn.Identity(), (nn.Identity(), mhc.HyperConnection(DIM, N)), (mhc.HyperConnection(DIM, N),)])
    def test_what_is_no_block(self, block):
        with pytest.raises(TypeError, match=r"block: got \w+, wanted a HyperConnection or a pair \(HyperConnection, layer\)"):
            mhc.chain(streams(5), [block])

    def test_a_connection_without_a_layer(self):
        with pytest.raises(TypeError, match="layer: got None"):
            mhc.chain(streams(5), [mhc.HyperConnection(DIM, N)])

    def test_connections_that_go_step_by_step_in_between(self):
        x = streams(5)
        want = run(crossed, connections(), x)
        for odd in range(DEPTH):
            modules = connections()
            modules[odd].fused = False
            assert_same(run(crossed, modules, x), want, 1e-5)

    def test_options_may_differ_from_one_connection_to_the_next(self):
        modules = connections()
        modules[1].residual_mixing, modules[2].order, modules[2].post_mult = False, "rows_first", 1.0
        x = streams(5)
        assert_same(run(crossed, modules, x), run(one_by_one, modules, x), 1e-5)

    def test_other_streams_are_an_error(self):
        _, ctx = trained(DIM, N).pre(streams(5))
        with pytest.raises(ValueError, match=r"ctx: got streams of shape \(5, 4, 32\), wanted \[T, n=2, dim=32\]"):
            trained(DIM, 2).cross(torch.zeros(5, DIM), ctx)
        with pytest.raises(ValueError, match=r"f: got shape \(4, 32\), wanted \[\.\.\., dim=32\] with 5 tokens"):
            trained(DIM, N).cross(torch.zeros(4, DIM), ctx)

    def test_the_streams_in_between_can_be_read(self):
        modules, x = connections(), streams(2, 3)
        u, ctx = modules[0].pre(x)
        f = modules[0].layer(u)
        want = modules[0].post(f, ctx)
        _, ctx = modules[1].cross(f, ctx)
        assert torch.equal(ctx.x, want.reshape(6, N, DIM))
        assert not ctx.x.requires_grad

    def test_pre_under_no_grad(self):
        """x has its gradient through H_res all the same, as in five steps."""
        results = []
        for fused in (True, False):
            hc, x = connections(fused)[0], streams(5).requires_grad_()
            with torch.no_grad():
                u, ctx = hc.pre(x)
            results.append(torch.autograd.grad(hc.post(torch.tanh(u), ctx).square().sum(), x)[0])
        assert_same(results[:1], results[1:], 1e-6)

    def test_frozen_connections(self):
        x = streams(5)
        wanted = run(crossed, connections(), x)
        modules = connections()
        for hc in modules:
            hc.fn.requires_grad_(False)
            hc.base.requires_grad_(False)
            hc.scale.requires_grad_(False)
        x = x.detach().requires_grad_()
        y = crossed(modules, x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], wanted[1])

    def test_two_layers_on_one_context(self):
        """Parallel attention and FFN with their sum as a residual of its own: a Context may serve twice."""
        results = []
        for fused in (True, False):
            hc, x = connections(fused)[0], streams(5).requires_grad_()
            u, ctx = hc.pre(x)
            y = hc.post(torch.tanh(u), ctx) * 2.0 + hc.post(torch.sin(u), ctx)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, hc.fn, hc.base, hc.scale])])
        assert_same(*results, 1e-5)


def test_checkpointing_sublayer_by_sublayer(device):
    x = streams(2, 3, device=device)
    modules = connections(device=device)
    got, want = run(checkpointed, modules, x), run(crossed, modules, x)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_whole_connections(reentrant):
    x, modules = streams(5), connections()

    def path(modules, x):
        for hc in modules:
            x = checkpoint(hc, x, use_reentrant=reentrant)
        return x

    def backward(path):
        y = path(modules, (start := x.detach().requires_grad_()))
        modules.zero_grad()
        y.square().sum().backward()  # a reentrant checkpoint refuses autograd.grad
        return [start.grad, *(p.grad for p in modules.parameters())]

    assert all(torch.equal(g, w) for g, w in zip(backward(path), backward(one_by_one), strict=True))


@pytest.mark.parametrize("path", [crossed, checkpointed])
def test_compiles_without_graph_break(path, device):
    x = streams(2, 3, device=device)
    modules = connections(device=device)
    want = run(path, modules, x)
    compiled = torch.compile(lambda x: path(modules, x), backend="aot_eager", fullgraph=True)
    got = run(lambda _, x: compiled(x), modules, x)
    assert_same(got, want, 1e-6)


def graphed(modules, x):
    """A CUDA graph of forward and backward: the graph, what it reads, what it writes."""
    x = x.detach().requires_grad_()
    parameters = list(modules.parameters())

    def step():
        y = crossed(modules, x)
        return [y, *torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, x, out, step


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 130])
def test_cuda_graph_replay_is_bitwise_the_eager_call(T):
    modules = connections(device="cuda")
    graph, x, out, step = graphed(modules, streams(T, device="cuda", dtype=torch.float32))
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        got = [t.clone() for t in out]
        assert all(torch.equal(g, w) for g, w in zip(got, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(dtype):
    modules, x = connections(device="cuda"), streams(513, device="cuda", dtype=dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        first = run(crossed, modules, x)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(run(crossed, modules, x), first, strict=True))


@pytest.mark.gpu
def test_no_kernel_of_pytorch_in_the_backward():
    """Nothing for autograd to add, copy, cast or zero. The layer is the identity, so that every kernel seen is ours."""
    modules = [trained(128, N, nn.Identity()).to("cuda") for _ in range(DEPTH)]
    x = torch.randn(64, N, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    crossed(modules, x).backward(grad)
    for p in (x, *(p for hc in modules for p in hc.parameters())):
        p.grad = None
    y = crossed(modules, x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        y.backward(grad)
        torch.cuda.synchronize()
    seen = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = ("pre_grad", "coefficients_bwd", "streams_grad", "sum_parts", "post_res_grads", "boundary_grad")
    assert len(seen) >= 4 * DEPTH + 1
    assert [name for name in seen if not name.startswith(ours)] == []


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_grad_every_boundary_is_crossed_in_one(monkeypatch, requires_grad):
    """Also where x is a leaf that requires a gradient, which pre() gives no ticket for: found by a benchmark, half of whose chain broke."""
    served = []
    run_reference = backend.run_reference
    monkeypatch.setattr(backend, "run_reference", lambda name, *rest: served.append(name) or run_reference(name, *rest))
    modules, x = connections(), torch.randn(7, N, DIM, requires_grad=requires_grad)
    with mhc.use_backend("reference"):
        want = crossed(modules, x).detach()
        served.clear()
        with torch.no_grad():
            got = crossed(modules, x)
    assert served == ["project_parts", "coefficients", "pre", *["post_res_project", "coefficients", "pre"] * (DEPTH - 1), "post_res"]
    assert torch.equal(got, want)


@pytest.mark.usefixtures("reference_backend")
def test_pre_under_no_grad_and_the_rest_outside_still_gives_x_its_gradient():
    modules, x = connections(), torch.randn(7, N, DIM, requires_grad=True)
    with torch.no_grad():
        u, ctx = modules[0].pre(x)
    u, ctx = modules[1].cross(modules[0].layer(u), ctx)
    (grad,) = torch.autograd.grad(modules[1].post(u, ctx).sum(), x)
    assert grad.abs().sum() > 0
