"""HyperConnection: numbers, start, dtype rules, wrapping, compile, copies; and expand."""

import copy
import math

import pytest
import torch
from torch import nn

import mhc
from mhc.module import INIT_ALPHA
from tl_kernels import reference


def trained(dim=32, n=4, layer=None, **options):
    """A connection whose coefficients are nothing special."""
    torch.manual_seed(0)
    hc = mhc.HyperConnection(dim, n, layer, **options)
    with torch.no_grad():
        hc.base.normal_()
        hc.scale.copy_(torch.tensor([0.7, 1.3, 0.9]))
    return hc


def reference_coefficients(hc, x, fn, base, scale):
    z, rinv = reference.project(x, fn, hc.norm_eps)
    H_pre, H_post, h_res = reference.activate(z, rinv, scale, base, hc.pre_eps, hc.post_mult)
    return H_pre, H_post, reference.sinkhorn(h_res, hc.sinkhorn_iters, hc.sinkhorn_eps, hc.order)


def reference_block(hc, x, layer, fn, base, scale):
    """The whole boundary in the precision of its inputs."""
    H_pre, H_post, H_res = reference_coefficients(hc, x, fn, base, scale)
    return reference.post_res(x, layer(reference.pre(x, H_pre)), H_post, H_res)


@pytest.mark.parametrize(("n", "fused"), [(1, True), (4, True), (7, True), (4, False)])
def test_block_and_gradients_match_the_reference(n, fused, device):
    hc = trained(32, n, sinkhorn_iters=5, fused=fused).to(device)
    hc.layer = lambda u: torch.tanh(u)
    x = torch.randn(2, 3, n, 32, device=device, requires_grad=True)
    y = hc(x)
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, hc.fn, hc.base, hc.scale)]
    want = reference_block(hc, exact[0].reshape(6, n, 32), torch.tanh, *exact[1:]).view(y.shape)
    torch.testing.assert_close(y.double().cpu(), want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, hc.fn, hc.base, hc.scale], grad)
    wanted = torch.autograd.grad(want, exact, grad.double().cpu())
    for name, g, w in zip(("x", "fn", "base", "scale"), got, wanted, strict=True):
        assert (g.double().cpu() - w).norm() <= 1e-5 * w.norm() + 1e-9, name


def test_pre_and_post_are_the_call(device):
    layer = nn.Linear(32, 32)
    hc = trained(32, 4, layer).to(device)
    x = torch.randn(5, 4, 32, device=device)
    u, ctx = hc.pre(x)
    assert u.shape == (5, 32)
    assert torch.equal(hc.post(hc.layer(u), ctx), hc(x))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_any_leading_dimensions(lead, device):
    hc = trained(32, 4, nn.Identity()).to(device)
    x = torch.randn(*lead, 4, 32, device=device)
    H_pre, H_post, H_res = hc.coefficients(x)
    assert (H_pre.shape, H_post.shape, H_res.shape) == ((*lead, 4), (*lead, 4), (*lead, 4, 4))
    assert hc(x).shape == x.shape
    assert torch.equal(hc(x).reshape(-1, 4, 32), hc(x.reshape(-1, 4, 32)))


def test_coefficients_are_on_the_manifold(device):
    hc = trained().to(device)
    H_pre, H_post, H_res = hc.coefficients(torch.randn(64, 4, 32, device=device))
    assert ((H_pre > 0) & (H_pre < 1 + 1e-5)).all()
    assert ((H_post > 0) & (H_post < 2)).all()
    assert (H_res >= 0).all()
    torch.testing.assert_close(H_res.sum(-1), torch.ones(64, 4, device=device), rtol=0, atol=1e-5)
    torch.testing.assert_close(H_res.sum(-2), torch.ones(64, 4, device=device), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["zeros", "huge", "one huge token", "sharp logits"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "steps"])
def test_extreme_inputs_stay_finite(fused, case, dtype, device):
    hc = trained(32, 4, torch.tanh, sinkhorn_iters=20, fused=fused).to(device)
    x = torch.randn(6, 4, 32)
    if case == "zeros":
        x.zero_()
    elif case == "huge":
        x *= 1e30  # its square overflows
    elif case == "one huge token":
        x[2] *= 1e30
    else:
        with torch.no_grad():
            hc.base[8:] *= 1e4
            hc.scale.fill_(1e3)
    x = x.to(device, dtype).requires_grad_()
    y = hc(x)
    (y * 1e-6).sum().backward()
    for name, t in (("y", y), ("x", x.grad), ("fn", hc.fn.grad), ("base", hc.base.grad), ("scale", hc.scale.grad)):
        assert t.isfinite().all(), name


@pytest.mark.usefixtures("reference_backend")
class TestStart:
    @pytest.mark.parametrize("n", [1, 2, 4, 8])
    def test_a_block_is_the_plain_residual(self, n):
        torch.manual_seed(0)
        hc = mhc.HyperConnection(64, n, nn.Linear(64, 64))
        h = torch.randn(16, 64)
        y = hc(mhc.expand(h, n))
        plain = h + hc.layer(h)
        assert ((y.mean(-2) - plain).norm() / plain.norm()).item() < 0.02

    @pytest.mark.parametrize("n", [2, 4, 8])
    def test_coefficients(self, n):
        torch.manual_seed(0)
        hc = mhc.HyperConnection(256, n)
        H_pre, H_post, H_res = hc.coefficients(torch.randn(64, n, 256))
        assert (H_pre - 1 / n).abs().max() < 0.02
        assert (H_post - 1).abs().max() < 0.05
        assert (H_res - torch.eye(n)).abs().max() < 3e-3

    def test_alpha_is_the_papers(self):
        assert torch.equal(mhc.HyperConnection(8).scale, torch.full((3,), INIT_ALPHA))
        assert INIT_ALPHA == 0.01

    def test_streams_do_not_stay_equal(self):
        """Equal streams with equal coefficients would stay equal for ever."""
        torch.manual_seed(0)
        hc = mhc.HyperConnection(64, 4, nn.Linear(64, 64))
        y = hc(mhc.expand(torch.randn(16, 64), 4))
        assert y.std(-2).mean() > 1e-3 * y.std()

    def test_differences_between_streams_survive_a_deep_stack(self):
        """120 boundaries keep most of it; a uniform H_res would keep nothing."""
        torch.manual_seed(0)
        _, _, H_res = mhc.HyperConnection(64, 4).coefficients(torch.randn(120, 4, 64))
        product = torch.linalg.multi_dot(list(H_res))
        difference = torch.tensor([1.0, -1.0, 0.0, 0.0])
        assert (product @ difference).norm() > 0.8 * difference.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_the_model_leaves_coefficients_float32(dtype, device):
    """Our parameters keep their dtype and their value; the layer inside is cast as usual."""
    model = nn.Sequential(trained(32, 4, nn.Linear(32, 32)), mhc.HyperHead(32, 4))
    before = [p.detach().clone() for p in (model[0].fn, model[0].base, model[0].scale, *model[1].parameters())]
    model.to(device).to(dtype)
    after = [model[0].fn, model[0].base, model[0].scale, *model[1].parameters()]
    assert model[0].layer.weight.dtype is dtype
    assert all(torch.equal(a.detach().cpu(), b) for a, b in zip(after, before, strict=True))
    assert all(a.device.type == device.type for a in after)
    out = model(torch.randn(3, 4, 32, device=device, dtype=dtype))
    assert out.dtype is dtype
    out.sum().backward()
    assert model[0].fn.grad.dtype is torch.float32


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting_methods(cast):
    hc = trained(32, 4, nn.Linear(32, 32))
    getattr(hc, cast)()
    assert {p.dtype for p in (hc.fn, hc.base, hc.scale)} == {torch.float32}
    assert hc.layer.weight.dtype is not torch.float32


def test_default_dtype_does_not_reach_parameters():
    torch.set_default_dtype(torch.bfloat16)
    try:
        hc = mhc.HyperConnection(8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert hc.fn.dtype is torch.float32


def test_meta_device_then_to_empty():
    hc = mhc.HyperConnection(8, device="meta")
    assert hc.fn.is_meta
    hc.to_empty(device="cpu").reset_parameters()
    assert hc.fn.dtype is torch.float32
    assert hc.base[3].item() == pytest.approx(-math.log(3))


@pytest.mark.usefixtures("reference_backend")
def test_parameters_narrowed_by_others_are_an_error_that_float_mends():
    """FSDP's mixed precision or load_state_dict(assign=True) can replace them."""
    hc = trained()
    hc.load_state_dict({k: v.bfloat16() for k, v in hc.state_dict().items()}, assign=True)
    with pytest.raises(TypeError, match=r"phi: got torch.bfloat16, wanted torch.float32"):
        hc.pre(torch.randn(3, 4, 32))
    hc.float().pre(torch.randn(3, 4, 32))


def test_autocast(device):
    """bf16 layer output joins float32 streams; the coefficients are computed as without autocast."""
    hc = trained(32, 4, nn.Linear(32, 32)).to(device)
    x = torch.randn(5, 4, 32, device=device)
    want = hc.coefficients(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = hc.coefficients(x)
        y = hc(x)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert y.dtype is torch.float32
    y.sum().backward()
    torch.testing.assert_close(y, hc(x), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("reference_backend")
class TestOptions:
    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "steps"])
    def test_no_residual_mixing(self, fused):
        hc = trained(32, 4, nn.Linear(32, 32), residual_mixing=False, fused=fused)
        x = torch.randn(5, 4, 32)
        H_pre, H_post, H_res = hc.coefficients(x)
        assert torch.equal(H_res, torch.eye(4).expand(5, 4, 4))
        f = hc.layer((H_pre[..., None] * x).sum(-2))
        y = hc(x)
        torch.testing.assert_close(y, x + H_post[..., None] * f[:, None])
        y.sum().backward()
        assert hc.fn.grad[8:].abs().max() == 0
        assert hc.fn.grad[:8].abs().max() > 0
        trained().load_state_dict({k: v for k, v in hc.state_dict().items() if "layer" not in k})

    def test_the_fused_path_takes_the_options_too(self):
        x = torch.randn(5, 4, 32)
        options = {"sinkhorn_iters": 3, "norm_eps": 1e-2, "pre_eps": 0.1, "sinkhorn_eps": 1e-2, "post_mult": 3.0, "order": "rows_first"}
        hc = trained(**options)
        H_pre, H_post, H_res = hc.coefficients(x)
        u, ctx = hc.pre(x)
        for got, want in ((u, reference.pre(x, H_pre)), (ctx.H_post, H_post), (ctx.H_res, H_res)):
            torch.testing.assert_close(got, want)

    def test_order_iterations_and_epsilons_reach_the_kernels(self):
        x = torch.randn(5, 4, 32)
        options = {"sinkhorn_iters": 3, "norm_eps": 1e-2, "pre_eps": 0.1, "sinkhorn_eps": 1e-2, "post_mult": 3.0, "order": "rows_first"}
        hc = trained(**options)
        got = hc.coefficients(x)
        for g, w in zip(got, reference_coefficients(hc, x, hc.fn, hc.base, hc.scale), strict=True):
            torch.testing.assert_close(g, w)
        for name, value in options.items():  # each option matters, so none was dropped on the way
            other = trained(**{k: v for k, v in options.items() if k != name})
            assert any((g - o).abs().max() > 1e-4 for g, o in zip(got, other.coefficients(x), strict=True)), (name, value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n": 0}, "n: got 0, wanted 1..8"),
            ({"n": 9}, "n: got 9, wanted 1..8"),
            ({"dim": 0}, "dim: got 0"),
            ({"sinkhorn_iters": 0}, "iters: got 0"),
            ({"order": "rows"}, "order: got 'rows'"),
            ({"dtype": torch.bfloat16}, r"dtype: got torch.bfloat16, wanted torch.float32"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            mhc.HyperConnection(**{"dim": 32, **options})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n": 4.0}, "n: got 4.0"),
            ({"dim": "64"}, "dim: got '64'"),
            ({"n": True}, "n: got True"),
            ({"dim": torch.tensor(64.0)}, r"dim: got tensor\(64\.\)"),
        ],
    )
    def test_sizes_that_are_no_whole_numbers(self, options, message):
        for module in (mhc.HyperConnection, mhc.HyperHead):
            with pytest.raises(TypeError, match=f"{message}, wanted a whole number"):
                module(**{"dim": 32, **options})

    @pytest.mark.parametrize("shape", [(5, 32), (5, 3, 32), (5, 4, 31), (32,)], ids=str)
    def test_bad_streams(self, shape):
        with pytest.raises(ValueError, match=r"x: got shape .*wanted \[\.\.\., n=4, dim=32\]"):
            mhc.HyperConnection(32).pre(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(5, 31), (4, 32), (5, 4, 32)], ids=str)
    def test_bad_layer_output(self, shape):
        hc = mhc.HyperConnection(32)
        _, ctx = hc.pre(torch.zeros(5, 4, 32))
        with pytest.raises(ValueError, match=r"f: got shape .*wanted \[\.\.\., dim=32\]"):
            hc.post(torch.zeros(shape), ctx)

    @pytest.mark.parametrize("nothing", [None, [torch.zeros(5, 32)]])
    def test_a_layer_output_that_is_no_tensor(self, nothing):
        hc = mhc.HyperConnection(32, layer=lambda u: nothing)
        with pytest.raises(TypeError, match=r"f: got \w+, wanted the layer's output, a tensor \[\.\.\., dim=32\]"):
            hc(torch.zeros(5, 4, 32))

    def test_a_context_before_the_layer_output(self):
        hc = mhc.HyperConnection(32)
        u, ctx = hc.pre(torch.zeros(5, 4, 32))
        for call in (hc.post, hc.cross):
            with pytest.raises(TypeError, match=r"ctx: got Tensor, wanted the Context of pre\(\) or cross\(\), after the layer's output"):
                call(ctx, u)

    def test_a_context_of_other_streams(self):
        _, ctx = mhc.HyperConnection(32, 2).pre(torch.zeros(5, 2, 32))
        with pytest.raises(ValueError, match=r"ctx: got streams of shape \(5, 2, 32\), wanted \[T, n=4, dim=32\]"):
            mhc.HyperConnection(32, 4).post(torch.zeros(5, 32), ctx)

    def test_calling_without_a_layer(self):
        with pytest.raises(TypeError, match="layer: got None"):
            mhc.HyperConnection(32)(torch.zeros(5, 4, 32))

    def test_arguments_and_further_results_pass_through(self):
        hc = trained(32, 4, lambda u, scale, *, shift: (u * scale + shift, "weights"))
        x = torch.randn(5, 4, 32)
        y, rest = hc(x, 2.0, shift=1.0)
        u, ctx = hc.pre(x)
        assert rest == "weights"
        assert torch.equal(y, hc.post(u * 2.0 + 1.0, ctx))

    def test_repr_names_what_matters(self):
        assert "dim=32, n=4, sinkhorn_iters=20, order=columns_first" in repr(mhc.HyperConnection(32))
        assert "residual_mixing=False" in repr(mhc.HyperConnection(32, residual_mixing=False))
        assert "fused" not in repr(mhc.HyperConnection(32))
        assert "fused=False" in repr(mhc.HyperConnection(32, fused=False))

    def test_deepcopy_and_state_dict(self):
        hc = trained(32, 4, nn.Linear(32, 32))
        x = torch.randn(5, 4, 32)
        assert torch.equal(copy.deepcopy(hc)(x), hc(x))
        fresh = mhc.HyperConnection(32, 4, nn.Linear(32, 32))
        assert list(fresh.state_dict()) == ["fn", "base", "scale", "layer.weight", "layer.bias"]
        fresh.load_state_dict(hc.state_dict())
        assert torch.equal(fresh(x), hc(x))


def test_non_contiguous_streams(device):
    hc = trained(32, 4, nn.Identity()).to(device)
    x = torch.randn(4, 32, 5, device=device).permute(2, 0, 1)
    assert torch.equal(hc(x), hc(x.contiguous()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(backend, device):
    hc = trained(32, 4, nn.Linear(32, 32), sinkhorn_iters=5).to(device)  # Inductor compiles every iteration of the reference
    head = mhc.HyperHead(32, 4).to(device)

    def step(h):
        return head(hc(mhc.expand(h, 4)))

    h = torch.randn(2, 3, 32, device=device, requires_grad=True)
    inputs = [h, *hc.parameters(), *head.parameters()]
    want = step(h)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    got = torch.compile(step, backend=backend, fullgraph=True)(h)
    grads = torch.autograd.grad(got.square().sum(), inputs)
    torch.testing.assert_close((got, *grads), (want, *wanted), rtol=1e-5, atol=1e-5)


class TestExpand:
    @pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
    def test_equal_contiguous_streams(self, lead):
        h = torch.randn(*lead, 8)
        x = mhc.expand(h, 3)
        assert x.shape == (*lead, 3, 8)
        assert x.is_contiguous()
        assert torch.equal(x[..., 1, :], h)

    def test_gradient_is_the_sum_over_streams(self):
        h = torch.randn(5, 8, requires_grad=True)
        mhc.expand(h, 3).sum().backward()
        assert torch.equal(h.grad, torch.full((5, 8), 3.0))

    @pytest.mark.parametrize("n", [0, 9])
    def test_bad_n(self, n):
        with pytest.raises(ValueError, match=f"n: got {n}, wanted 1..8"):
            mhc.expand(torch.zeros(5, 8), n)

    def test_ids_of_tokens_are_no_embedding(self):
        with pytest.raises(TypeError, match=r"h: got torch\.int64, wanted torch\.bfloat16 or .*: an embedding, not the ids of its tokens"):
            mhc.expand(torch.zeros(5, 8, dtype=torch.int64), 4)
        with pytest.raises(TypeError, match=r"h: got torch\.float64, wanted torch\.bfloat16 or torch\.float16 or torch\.float32$"):
            mhc.expand(torch.zeros(5, 8, dtype=torch.float64), 4)

    def test_compiles_with_a_width_that_changes(self):
        expand = torch.compile(lambda h: mhc.expand(h, 3), backend="eager", fullgraph=True, dynamic=True)
        for C in (8, 12):
            h = torch.randn(5, C)
            assert torch.equal(expand(h), mhc.expand(h, 3))
