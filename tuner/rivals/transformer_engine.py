"""NVIDIA TransformerEngine: Triton kernels, forward and backward, for streams kept innermost, [T,C,n].

Its Sinkhorn is ours in the log domain without an eps, in our order; H_pre gets no eps and the norm's is float32's (1.2e-7): differences
near 1e-6. phi [M,K] in float32 with columns c*n + s. Only its Triton files are used. Where its C++ library is not installed, the packages
above them are stood in for, and the one thing they take from it, cuBLAS's tf32 product for the gradient of phi, is PyTorch's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from typing import Any

import torch
from torch import Tensor

from tuner.bench_case import Case
from tuner.bench_rivals import Boundary, Rival
from tuner.rivals._checks import only_four_bf16_streams

NEEDS = "transformer-engine==2.20.2"
BACKWARD = True
PACKAGE = "transformer_engine"


def _gemm(a: Tensor, b: Tensor, out_dtype: torch.dtype, layout: str) -> tuple[Tensor]:
    """``general_gemm`` as the mHC backward calls it: a [M,K], b [M,N] in float32 give b^T a [N,K], in tf32 as cuBLAS does it there."""
    if layout != "NT" or out_dtype is not torch.float32:
        raise NotImplementedError(f"stand-in for general_gemm: got layout {layout} and {out_dtype}")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return (b.T @ a,)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _stand_in(name: str, path: str | None = None, **contents: Any) -> None:
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [path]
    module.__dict__.update(contents)
    sys.modules[name] = module


def kernels() -> types.ModuleType:
    """``transformer_engine.pytorch.triton.mhc``. Raises ImportError where the package is not there."""
    name = f"{PACKAGE}.pytorch.triton.mhc"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no {PACKAGE}; pip install --no-deps {NEEDS}")
    if importlib.util.find_spec(f"{PACKAGE}_torch") is None:
        (root, *_) = found.submodule_search_locations
        _stand_in(PACKAGE, root)
        _stand_in(f"{PACKAGE}.common", os.path.join(root, "common"))
        _stand_in(f"{PACKAGE}.pytorch", os.path.join(root, "pytorch"))
        _stand_in(f"{PACKAGE}.pytorch.cpp_extensions", "")
        _stand_in(f"{PACKAGE}.pytorch.cpp_extensions.gemm", general_gemm=_gemm)
    return importlib.import_module(name)


class _InnermostStreams(Boundary):
    """y is a view [T,n,C] of [T,C,n]; the gradient of y comes in that layout too, so that nothing is copied."""

    def forward_backward(self, dy: Tensor) -> tuple[Tensor, ...]:
        assert self.end is not None
        return super().forward_backward(self.end.transpose(1, 2))


def make(case: Case, *, use_split_k: bool = False, one_buffer: bool = False, norm_weight: bool = False) -> Boundary:
    """``use_split_k``: projection with atomic adds, not deterministic. ``one_buffer``: the backward adds up the gradient of the streams in
    a float32 buffer. ``norm_weight``: an RMSNorm weight of ones that is not trained, which makes the gradient of phi a fused kernel.
    """
    te = kernels()
    _, C = only_four_bf16_streams(case, "TransformerEngine")
    n = 4
    weight = torch.ones(n * C, device=case.x.device) if norm_weight else None

    def innermost(t: Tensor) -> Tensor:
        return t.detach().transpose(1, 2).contiguous()

    x = innermost(case.x).requires_grad_()
    phi = innermost(case.fn.view(-1, n, C)).view(-1, n * C).requires_grad_()
    beta = case.base.detach()[None].clone().requires_grad_()
    alpha = case.scale.detach().clone().requires_grad_()

    def step(streams: Tensor) -> Tensor:
        wide = streams.unsqueeze(1)  # [tokens, sequences, C, n]
        acc = torch.empty_like(wide, dtype=torch.float32) if one_buffer and torch.is_grad_enabled() else None
        options = {"fused_grad_x_acc_buffer": acc}
        u, H_post, H_res = te.mhc_generate_mix_and_aggregate(wide, phi, alpha, beta, weight, use_split_k=use_split_k, **options)
        return te.mhc_fused_expand_combine(u, None, H_post, wide, H_res, n, **options).squeeze(1)

    def canonical(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        dx, dphi, dbeta, dalpha = grads
        return {"x": dx.transpose(1, 2), "fn": dphi.view(-1, C, n).transpose(1, 2).flatten(1), "base": dbeta[0], "scale": dalpha}

    return _InnermostStreams(lambda: step(x).transpose(1, 2), (x, phi, beta, alpha), canonical, step, x, innermost(case.dy))


RIVAL = Rival("TransformerEngine", make, note="streams innermost; tf32 projection; no eps in Sinkhorn")
