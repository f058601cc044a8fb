"""tuner/rivals/flashinfer.py against stand-ins that want of their operands what DeepGEMM and FlashInfer assert."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from tl_kernels import reference
from tuner.bench_case import Case, finite_error, plain_boundary
from tuner.rivals import flashinfer

T, C = 96, 64


def gemm(a, b, d, sqr_sum, num_splits=None):
    S, (m, k), (n, _) = num_splits or 1, a.shape, b.shape
    lead = () if num_splits is None else (num_splits,)
    assert (a.shape, b.shape, d.shape, sqr_sum.shape) == ((m, k), (n, k), (*lead, m, n), (*lead, m))
    assert [t.dtype for t in (a, b, d, sqr_sum)] == [torch.bfloat16, *[torch.float32] * 3]
    assert all(t.is_contiguous() for t in (a, b, d, sqr_sum))
    assert n in (8, 16, 24, 32)
    parts = list(zip(a.float().chunk(S, 1), b.chunk(S, 1), strict=True))
    d.copy_(torch.stack([x @ w.T for x, w in parts]).view_as(d))
    sqr_sum.copy_(torch.stack([x.square().sum(1) for x, _ in parts]).view_as(sqr_sum))


def pre(dot_mix, sqrsum, residual, scale, base, k, *, mhc_post_mult_value, sinkhorn_repeat, num_splits):
    lead = () if num_splits == 1 else (num_splits,)
    tokens, n, _ = residual.shape
    assert (dot_mix.shape, sqrsum.shape) == ((*lead, tokens, 2 * n + n * n), (*lead, tokens))
    z, squares = (dot_mix.sum(0), sqrsum.sum(0)) if lead else (dot_mix, sqrsum)
    rinv = torch.rsqrt(squares / k + 1e-6)
    H_pre, H_post, h_res = reference.activate(z, rinv, scale, base, post_mult=mhc_post_mult_value)
    comb = reference.sinkhorn(h_res, iters=sinkhorn_repeat).transpose(1, 2)
    return H_post.unsqueeze(-1), comb, reference.pre(residual.float(), H_pre).bfloat16()


def post(x, residual, post_layer_mix, comb_res_mix):
    assert post_layer_mix.shape == (*residual.shape[:2], 1)
    return reference.post_res(residual.float(), x.float(), post_layer_mix.squeeze(-1), comb_res_mix.transpose(1, 2)).bfloat16()


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_operands_are_what_the_packages_assert(monkeypatch, multiprocessors):
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(tf32_hc_prenorm_gemm=gemm))
    monkeypatch.setattr(flashinfer, "kernels", lambda: SimpleNamespace(mhc_pre_big_fuse=pre, mhc_post=post))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=multiprocessors))
    case = Case.random(T, 4, C, torch.bfloat16, torch.device("cpu"))
    boundary = flashinfer.make(case)
    assert finite_error(boundary.forward_only(), plain_boundary(case.x, case.fn, case.base, case.scale).double()) < 5e-3
    assert boundary.leaves == ()


@pytest.mark.parametrize(
    ("tokens", "multiprocessors", "want"), [(1, 132, 16), (512, 132, 16), (1024, 132, 8), (8192, 132, 1), (65536, 132, 1)]
)
def test_splits_fit_the_gpu_at_once(tokens, multiprocessors, want):
    assert flashinfer.splits(tokens, multiprocessors) == want
