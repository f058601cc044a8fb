"""The modules against the real ``DeepseekV4HyperConnection`` and ``DeepseekV4HyperHead`` of transformers."""

import pytest
import torch

import mhc
from tests.conftest import relative_error as relative

modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")

DIM, N = 32, 4
LEAD = (2, 9)

both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "steps"])


def config(**options):
    return configuration.DeepseekV4Config(hidden_size=DIM, hc_mult=N, **options)


def theirs(kind, device, seed=0):
    """A module of transformers with parameters large enough that every term matters."""
    torch.manual_seed(seed)
    module = kind(config())
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=(N * DIM) ** -0.5 if name.endswith("fn") else 1.0)
    return module.to(device)


def their_block(module, x, layer):
    """DeepseekV4DecoderLayer.forward around one of its two layers."""
    post, comb, collapsed = module(x)
    f = layer(collapsed)
    return post.to(x.dtype).unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.to(x.dtype).transpose(-1, -2), x)


class ExactConnection(torch.nn.Module):
    """Their module in float64: they call .float() inside, which this undoes by computing from our specification."""

    def __init__(self, module):
        super().__init__()
        self.hc = mhc.HyperConnection(DIM, N)
        for name in ("fn", "base", "scale"):
            self.hc.register_parameter(name, torch.nn.Parameter(getattr(module, name).detach().double().cpu()))

    def forward(self, x, layer):
        from tests.mhc.test_module import reference_block

        flat = x.reshape(-1, N, DIM)
        return reference_block(self.hc, flat, layer, self.hc.fn, self.hc.base, self.hc.scale).view(x.shape)


def gradients(y, inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad(y, inputs, grad.to(y))


def streams(device, dtype, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*LEAD, N, DIM, generator=generator).to(device, dtype).requires_grad_()


def test_state_dicts_load_both_ways(device):
    connection, head = theirs(modeling.DeepseekV4HyperConnection, device), theirs(modeling.DeepseekV4HyperHead, device)
    ours, our_head = mhc.HyperConnection(DIM, N).to(device), mhc.HyperHead(DIM, N).to(device)
    ours.load_state_dict(connection.state_dict())
    our_head.load_state_dict(head.state_dict())
    back = theirs(modeling.DeepseekV4HyperConnection, device, seed=5)
    back_head = theirs(modeling.DeepseekV4HyperHead, device, seed=5)
    back.load_state_dict(ours.state_dict())
    back_head.load_state_dict(our_head.state_dict())
    for a, b in ((connection, back), (head, back_head)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@both_paths
def test_coefficients_and_layer_input_float32(fused, device):
    module = theirs(modeling.DeepseekV4HyperConnection, device)
    ours = mhc.HyperConnection(DIM, N, fused=fused).to(device)
    ours.load_state_dict(module.state_dict())
    x = streams(device, torch.float32)
    post, comb, collapsed = module(x)
    _, H_post, H_res = ours.coefficients(x)
    u, _ = ours.pre(x)
    for name, got, want in (("post", H_post, post), ("comb", H_res, comb.transpose(-1, -2)), ("collapsed", u, collapsed)):
        assert got.shape == want.shape, name
        assert relative(got.detach(), want.detach()) <= 1e-5, name


@both_paths
def test_block_and_gradients_float32(fused, device):
    """Outputs and gradients of x, fn, base, scale and of the layer's output f, 1e-5 relative."""
    module = theirs(modeling.DeepseekV4HyperConnection, device)
    ours = mhc.HyperConnection(DIM, N, fused=fused).to(device)
    ours.load_state_dict(module.state_dict())
    names = ("x", "fn", "base", "scale", "f")
    results = []
    for hc in (module, ours):
        x, shift = streams(device, torch.float32), torch.zeros(*LEAD, DIM, device=device, requires_grad=True)
        layer = lambda u, shift=shift: torch.tanh(u) + shift  # noqa: E731  (the gradient of shift is that of f)
        if hc is module:
            y = their_block(module, x, layer)
        else:
            u, ctx = ours.pre(x)
            y = ours.post(layer(u), ctx)
        results.append((y, gradients(y, (x, hc.fn, hc.base, hc.scale, shift))))
    (want, wanted), (got, grads) = results
    assert relative(got.detach(), want.detach()) <= 1e-5
    for name, g, w in zip(names, grads, wanted, strict=True):
        assert relative(g, w) <= 1e-5, name


@both_paths
def test_block_and_gradients_bfloat16_are_no_worse_than_theirs(fused, device):
    """Against float64 from the same bf16 streams, no slack.

    Over 40 draws: the error of a gradient with three numbers (scale) in one draw is the luck of a few roundings. Ours is larger in 15 of
    40 draws although its rms over all of them is 0.70 of theirs.
    """
    module = theirs(modeling.DeepseekV4HyperConnection, device)
    ours = mhc.HyperConnection(DIM, N, fused=fused).to(device)
    ours.load_state_dict(module.state_dict())
    exact = ExactConnection(module)
    names = ("y", "dx", "dfn", "dbase", "dscale")
    error = {who: dict.fromkeys(names, 0.0) for who in ("theirs", "ours")}
    for seed in range(40):
        x = streams(device, torch.bfloat16, seed)
        x_exact = x.detach().double().cpu().requires_grad_()
        x_ours = x.detach().clone().requires_grad_()
        u, ctx = ours.pre(x_ours)
        runs = {
            "exact": (exact(x_exact, torch.tanh), x_exact, exact.hc),
            "theirs": (their_block(module, x, torch.tanh), x, module),
            "ours": (ours.post(torch.tanh(u), ctx), x_ours, ours),
        }
        results = {who: (y.detach(), *gradients(y, (x, hc.fn, hc.base, hc.scale), seed)) for who, (y, x, hc) in runs.items()}
        for who, total in error.items():
            for name, got, want in zip(names, results[who], results["exact"], strict=True):
                total[name] += (got.double().cpu() - want.cpu()).square().sum().item()
    for name in names:
        assert error["ours"][name] <= error["theirs"][name], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_and_gradients(dtype, device):
    module = theirs(modeling.DeepseekV4HyperHead, device)
    ours = mhc.HyperHead(DIM, N).to(device)
    ours.load_state_dict(module.state_dict())
    results = []
    for head in (module, ours):
        x = streams(device, dtype)
        h = head(x)
        assert h.dtype is dtype
        results.append((h.detach(), *gradients(h, (x, *head.parameters()))))
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    for name, want, got in zip(("h", "dx", "dfn", "dbase", "dscale"), *results, strict=True):
        assert relative(got, want) <= tolerance, name


@both_paths
def test_options_of_their_config(fused, device):
    """rms_norm_eps, hc_eps and hc_sinkhorn_iters under our names."""
    torch.manual_seed(0)
    module = modeling.DeepseekV4HyperConnection(config(rms_norm_eps=1e-2, hc_eps=1e-3, hc_sinkhorn_iters=2)).to(device)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    ours = mhc.HyperConnection(DIM, N, norm_eps=1e-2, pre_eps=1e-3, sinkhorn_eps=1e-3, sinkhorn_iters=2, fused=fused).to(device)
    ours.load_state_dict(module.state_dict())
    x = streams(device, torch.float32)
    post, comb, collapsed = module(x)
    _, H_post, H_res = ours.coefficients(x)
    for name, got, want in (("post", H_post, post), ("comb", H_res.transpose(-1, -2), comb), ("collapsed", ours.pre(x)[0], collapsed)):
        assert relative(got.detach(), want.detach()) <= 1e-5, name


def test_the_state_of_a_whole_model(device):
    """Their names inside a decoder layer are the ones from_huggingface looks for."""
    if device.type != "cpu":
        pytest.skip("names only")
    from mhc.convert import from_huggingface

    with torch.device("meta"):
        layer = modeling.DeepseekV4DecoderLayer(config(), 0)
    for name in ("attn_hc", "ffn_hc"):
        state = from_huggingface(layer.state_dict(), name)
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in mhc.HyperConnection(DIM, N).state_dict().items()}
