"""Converters: same mathematics, other storage."""

import pytest
import torch

import mhc
from mhc.convert import fold_norm_weight, from_huggingface, to_huggingface, transpose_residual
from tests.mhc.test_module import trained
from tl_kernels import reference

pytestmark = pytest.mark.usefixtures("reference_backend")


def untransposed_H_res(hc, state, x):
    """How an implementation gets H_res that applies comb as stored, its softmax over the last dimension."""
    z, rinv = reference.project(x, state["fn"], hc.norm_eps)
    comb = (hc.scale[2] * z[:, 8:] * rinv[:, None] + state["base"][8:]).unflatten(-1, (4, 4))
    return reference.sinkhorn(comb, order="rows_first")  # sums over the last dimension first


def test_transposed_rows_serve_a_checkpoint_that_applies_comb_untransposed():
    hc = trained(32, 4, order="rows_first")
    theirs = {k: v.detach().clone() for k, v in hc.state_dict().items()}
    x = torch.randn(6, 4, 32)
    hc.load_state_dict(transpose_residual(theirs, 4))
    torch.testing.assert_close(hc.coefficients(x)[2], untransposed_H_res(hc, theirs, x))


def test_transposition_is_its_own_inverse_and_spares_the_rest():
    state = trained().state_dict()
    once = transpose_residual(state, 4)
    assert not torch.equal(once["fn"], state["fn"])
    assert torch.equal(once["fn"][:8], state["fn"][:8])
    twice = transpose_residual(once, 4)
    assert all(torch.equal(twice[k], state[k]) for k in state)


@pytest.mark.parametrize("shared", [False, True])
def test_folded_norm_weight(shared):
    hc = trained()
    weight = torch.rand(32 if shared else 128) + 0.5
    x = torch.randn(6, 4, 32)
    v = x.flatten(1)
    normed = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + hc.norm_eps) * weight.repeat(4 if shared else 1)
    h_pre = hc.scale[0] * (normed @ hc.fn.T)[:, :4] + hc.base[:4]
    hc.load_state_dict(fold_norm_weight(hc.state_dict(), weight))
    torch.testing.assert_close(hc.coefficients(x)[0], torch.sigmoid(h_pre) + hc.pre_eps)


@pytest.mark.parametrize("module", [lambda: trained(32, 4, torch.nn.Linear(32, 32)), lambda: mhc.HyperHead(32)])
def test_into_a_model_and_out_of_it(module):
    state = module().state_dict()
    model = {"model.norm.weight": torch.ones(32), **to_huggingface(state, "model.layers.3.attn_hc")}
    back = from_huggingface(model, "model.layers.3.attn_hc")
    assert list(back) == [k for k in state if not k.startswith("layer")]
    assert all(torch.equal(back[k], state[k]) for k in back)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: transpose_residual(s, 3), r"fn: got shape \(24, 128\), wanted 15 rows for n=3"),
        (lambda s: transpose_residual({"base": s["base"]}, 4), "state: has no 'fn' among base"),
        *[
            (lambda s, w=w: fold_norm_weight(s, torch.ones(w)), r"weight: got shape \(.*\), wanted \[n\*dim=128\] or \[dim=32\]")
            for w in (33, 16, 64, 1, (4, 32))
        ],
        (lambda s: fold_norm_weight({"fn": s["fn"][:9]}, torch.ones(32)), r"fn: got shape \(9, 128\), wanted \[n\*n \+ 2\*n, n\*dim\]"),
        (lambda s: from_huggingface(s, "attn_hc"), "prefix: got 'attn_hc', wanted one with fn, base, scale or hc_fn"),
        (lambda s: fold_norm_weight({}, torch.ones(32)), "state: has no 'fn' among nothing"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(mhc.HyperConnection(32).state_dict())
