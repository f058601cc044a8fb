"""The ways out of the streams."""

import pytest
import torch

import mhc
from tl_kernels import reference


@pytest.mark.parametrize("n", [1, 4])
def test_learned_head_and_gradients_match_float64(n, device):
    torch.manual_seed(0)
    head = mhc.HyperHead(32, n).to(device)
    with torch.no_grad():
        head.hc_base.normal_()
        head.hc_scale.fill_(0.8)
    x = torch.randn(2, 3, n, 32, device=device, requires_grad=True)
    h = head(x)
    assert h.shape == (2, 3, 32)
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, head.hc_fn, head.hc_base, head.hc_scale)]
    flat = exact[0].reshape(6, n, 32)
    z, rinv = reference.project(flat, exact[1])
    H = torch.sigmoid(exact[3] * z * rinv[:, None] + exact[2]) + 1e-6
    want = reference.pre(flat, H).view(2, 3, 32)
    torch.testing.assert_close(h.double().cpu(), want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(h)
    got = torch.autograd.grad(h, [x, *head.parameters()], grad)
    for name, g, w in zip(("x", "fn", "base", "scale"), got, torch.autograd.grad(want, exact, grad.double().cpu()), strict=True):
        assert (g.double().cpu() - w).norm() <= 1e-5 * w.norm() + 1e-9, name


@pytest.mark.usefixtures("reference_backend")
def test_it_starts_as_the_mean():
    torch.manual_seed(0)
    x = torch.randn(16, 4, 64)
    difference = mhc.HyperHead(64, 4)(x) - mhc.reduce_mean(x)
    assert difference.norm() < 0.02 * mhc.reduce_mean(x).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mean_and_sum(dtype):
    x = torch.randn(2, 3, 4, 32).to(dtype)
    for reduce, want in ((mhc.reduce_mean, x.double().mean(-2)), (mhc.reduce_sum, x.double().sum(-2))):
        got = reduce(x)
        assert got.dtype is dtype
        # one rounding, not one for each stream
        assert torch.allclose(got.double(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_mean_undoes_expand():
    h = torch.randn(5, 8)
    torch.testing.assert_close(mhc.reduce_mean(mhc.expand(h, 4)), h)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 9}, "n: got 9"), ({"dim": 0}, "dim: got 0"), ({"dtype": torch.float16}, "dtype: got torch.float16")],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        mhc.HyperHead(**{"dim": 32, **options})


def test_bad_streams():
    with pytest.raises(ValueError, match=r"x: got shape \(5, 3, 32\), wanted"):
        mhc.HyperHead(32, 4)(torch.zeros(5, 3, 32))
