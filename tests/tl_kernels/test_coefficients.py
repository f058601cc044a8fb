"""``coefficients`` and ``coefficients_bwd`` against the float64 reference, and against the kernels they fuse."""

import pytest
import torch

from tests.conftest import assert_close
from tests.tl_kernels.checks import COEFFICIENTS, FEW_COEFFICIENTS, check, launcher, problems
from tl_kernels import reference
from tuner.inputs import make_inputs


@problems(FEW_COEFFICIENTS, COEFFICIENTS)
@pytest.mark.parametrize("name", ["coefficients", "coefficients_bwd"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype, tokens=(1, 37, 1000))


@pytest.mark.parametrize("options", [{"order": "rows_first", "iters": 3, "eps": 1e-3, "post_mult": 3.0}, {"iters": 1}], ids=str)
@pytest.mark.parametrize("name", ["coefficients", "coefficients_bwd"])
def test_options_reach_the_program(name, options, device):
    check(name, device.type, 4, 64, **options)


def test_forward_options_reach_the_program(device):
    check("coefficients", device.type, 4, 64, norm_eps=0.5, pre_eps=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize(("block_T", "threads"), [(32, 32), (32, 256), (64, 64), (64, 128)])
def test_every_block_shape(n, block_T, threads):
    check("coefficients", "cuda", n, 64, cfg={"block_T": block_T, "threads": threads})
    if n < 8 or block_T == 32:  # shared memory
        check("coefficients_bwd", "cuda", n, 64, cfg={"block_T": block_T, "threads": threads, "splits": 7}, tokens=(1, 37, 1000))


@pytest.mark.parametrize("name", ["coefficients", "coefficients_bwd"])
def test_no_mixing_is_the_identity(name, device):
    check(name, device.type, 4, 64, iters=0)
    run = launcher(name, device.type, 4, 64, iters=0)
    out = dict(zip([t.name for t in run.kernel.outputs], run(*make_inputs(run.kernel, run.p, 5, 0, device)), strict=True))
    if name == "coefficients":
        assert torch.equal(out["H_res"], torch.eye(4, device=device).expand(5, 4, 4))
    else:
        assert not out["dzs"][8:-1].any()
        assert not out["dab"][:, 2].any()
        assert not out["dab"][:, 3 + 8 :].any()


@pytest.mark.parametrize("splits", [1, 2, 5, 9])
def test_any_number_of_parts(splits, device):
    run = launcher("coefficients", device.type, 4, 64)
    parts, alpha, b = make_inputs(run.kernel, run.p, 37, 0, device)
    parts = parts[:1] * torch.linspace(0.5, 1.5, splits, device=device)[:, None, None]
    expected = reference.coefficients(parts.double(), alpha.double(), b.double())
    for tensor, got, want in zip(run.kernel.outputs, run(parts.contiguous(), alpha, b), expected, strict=True):
        assert_close(tensor.name, got, want, 2e-6)


@pytest.mark.parametrize("order", ["columns_first", "rows_first"])
def test_sharp_logits_agree_with_float64(order, device):
    """Logits of std 6: the scalings span ten decades and the projection is still one."""
    run = launcher("coefficients", device.type, 4, 64, order=order)
    parts, alpha, b = make_inputs(run.kernel, run.p, 500, 0, device)
    H_pre, H_post, H_res, zs = run(parts, alpha, 6 * b)
    expected = reference.coefficients(parts.double(), alpha.double(), 6 * b.double(), order=order)
    for name, got, want in zip(("H_pre", "H_post", "H_res", "zs"), (H_pre, H_post, H_res, zs), expected, strict=True):
        assert_close(name, got, want, 5e-6)
    last = 2 if order == "columns_first" else 1
    assert (H_res.sum(last) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("n", [2, 4, 8])
def test_backward_of_sharp_logits_agrees_with_float64(n, device):
    run = launcher("coefficients_bwd", device.type, n, 64)
    *grads, zs, alpha, b = make_inputs(run.kernel, run.p, 500, 0, device)
    dzs, dab = run(*grads, zs, 3 * alpha, b)
    expected = reference.coefficients_bwd(*(t.double() for t in (*grads, zs, 3 * alpha, b)))
    assert_close("dzs", dzs, expected[0], 2e-5)
    assert_close("dab", dab.double().sum(0), expected[1][0], 2e-5)


@pytest.mark.parametrize("name", ["coefficients", "coefficients_bwd"])
def test_extreme_logits_and_overflowed_norms_stay_finite(name, device):
    run = launcher(name, device.type, 4, 64)
    inputs = dict(zip([t.name for t in run.kernel.inputs], make_inputs(run.kernel, run.p, 8, 0, device), strict=True))
    forward = name == "coefficients"
    z = inputs["parts"][0] if forward else inputs["zs"]
    z[:-1, 0], z[:-1, 1] = 1e30, -1e30
    z[:-1, 2], z[-1, 2] = torch.inf, torch.inf if forward else 0.0  # a row so large that its norm overflowed
    z[8, 3], z[8:-1, 4], z[12:16, 5] = 300.0, -500.0, 80.0
    z[:-1, 6] = torch.tensor([1e4, -1e4], device=device).repeat(12)
    out = dict(zip([t.name for t in run.kernel.outputs], run(*inputs.values()), strict=True))
    if forward:
        assert torch.isfinite(out["zs"][:, [0, 1, 3, 4, 5, 6, 7]]).all()
        assert out["zs"][-1, 2] == 0
        n, b = 4, inputs["b"].double()
        assert_close("H_pre", out["H_pre"][2], torch.sigmoid(b[:n]) + 1e-6, 2e-6)
        for H in ("H_pre", "H_post", "H_res"):
            assert torch.isfinite(out[H]).all(), H
        assert (out["H_res"].sum(2) - 1).abs().max() < 1e-5
    else:
        assert torch.isfinite(out["dzs"]).all()
        assert not out["dzs"][:, 2].any()
        assert torch.isfinite(out["dab"][:, 3:]).all()


def test_agrees_with_the_kernels_it_fuses(device):
    run = launcher("coefficients", device.type, 4, 64)
    parts, alpha, b = make_inputs(run.kernel, run.p, 131, 0, device)
    H_pre, H_post, H_res, zs = run(parts, alpha, b)
    z, rinv = zs[:-1].T.contiguous(), zs[-1].contiguous()
    one, two, h_res = launcher("activate", device.type, 4, 64)(z, rinv, alpha, b)
    (three,) = launcher("sinkhorn", device.type, 4, 64)(h_res)
    for name, got, want in (("H_pre", H_pre, one), ("H_post", H_post, two), ("H_res", H_res, three)):
        assert_close(name, got, want, 1e-6)
