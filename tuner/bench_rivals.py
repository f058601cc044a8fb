"""Implementations of one mHC boundary around the identity layer (f = u), each behind the same two calls.

Shapes as in tl_kernels/spec.py: x and y [T,n,C] in the stream dtype; fn [M,K], base [M], scale [3] in float32, in this project's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_kernels import reference

GRADIENTS = ("x", "fn", "base", "scale")


@dataclass(frozen=True)
class Case:
    """One boundary and its output gradient. ``random`` draws it; logits have a standard deviation near 1, so that nothing saturates."""

    x: Tensor
    dy: Tensor
    fn: Tensor
    base: Tensor
    scale: Tensor

    @staticmethod
    def random(T: int, n: int, C: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
        draw = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device)

        M, K = n * n + 2 * n, n * C
        scale = torch.tensor([0.8, 1.0, 1.2], device=device)
        return Case(normal(T, n, C).to(dtype), normal(T, n, C).to(dtype), normal(M, K) / K**0.5, normal(M) / 2, scale)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, n, C."""
        T, n, C = self.x.shape
        return T, n, C


@dataclass(frozen=True)
class Boundary:
    """``forward()`` gives y from ``leaves``; ``canonical`` puts gradients of the leaves into this project's layout, keyed by GRADIENTS."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    canonical: Callable[[tuple[Tensor, ...]], dict[str, Tensor]]

    def forward_only(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def forward_backward(self, dy: Tensor) -> tuple[Tensor, ...]:
        """y, then the gradients of the leaves."""
        y = self.forward()
        grads = torch.autograd.grad(y, self.leaves, dy)
        return (y.detach(), *grads)  # no graph may outlive the call: its leaves' streams would enter a CUDA graph captured later


@dataclass(frozen=True)
class Rival:
    """``order`` and ``rounds_fn`` say where it computes another function than ours by design; the check takes both into account."""

    label: str
    make: Callable[[Case], Boundary]
    order: str = "columns_first"
    rounds_fn: bool = False
    note: str = ""


def plain_boundary(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, order: str = "columns_first") -> Tensor:
    """The specification's boundary, computed in fn's dtype; u and y are rounded to the dtype of x, as every implementation stores them."""
    wide = x.to(fn.dtype)
    z, rinv = reference.project(wide, fn)
    H_pre, H_post, h_res = reference.activate(z, rinv, scale, base)
    H_res = reference.sinkhorn(h_res, order=order)
    f = reference.pre(wide, H_pre).to(x.dtype)
    return reference.post_res(wide, f.to(fn.dtype), H_post, H_res).to(x.dtype)


def expected(case: Case, rival: Rival) -> dict[str, Tensor]:
    """y and the gradients in float64, with the Sinkhorn order and the rounding of fn that the rival has by design."""
    fn = case.fn.to(case.x.dtype) if rival.rounds_fn else case.fn
    leaves = x, fn, base, scale = _require_grad(case.x.double(), fn.double(), case.base.double(), case.scale.double())
    y = plain_boundary(x, fn, base, scale, rival.order)
    grads = torch.autograd.grad(y, leaves, case.dy.double())
    return {"y": y.detach(), **dict(zip(GRADIENTS, grads, strict=True))}


def _own_layout(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(GRADIENTS, grads, strict=True))


def _require_grad(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves of their own on the same memory."""
    return x.detach().requires_grad_(), fn.detach().requires_grad_(), base.detach().requires_grad_(), scale.detach().requires_grad_()


def _ours(case: Case) -> Boundary:
    import mhc

    _, n, C = case.sizes
    hc = mhc.HyperConnection(C, n=n).to(case.x.device)
    with torch.no_grad():
        hc.fn.copy_(case.fn)
        hc.base.copy_(case.base)
        hc.scale.copy_(case.scale)
    x = case.x.detach().requires_grad_()

    def forward() -> Tensor:
        u, ctx = hc.pre(x)
        return hc.post(u, ctx)

    return Boundary(forward, (x, hc.fn, hc.base, hc.scale), _own_layout)


def _eager(case: Case) -> Boundary:
    leaves = x, fn, base, scale = _require_grad(case.x, case.fn, case.base, case.scale)
    return Boundary(lambda: plain_boundary(x, fn, base, scale), leaves, _own_layout)


def _compiled(case: Case) -> Boundary:
    leaves = x, fn, base, scale = _require_grad(case.x, case.fn, case.base, case.scale)
    compiled = torch.compile(plain_boundary, fullgraph=True, dynamic=False)
    return Boundary(lambda: compiled(x, fn, base, scale), leaves, _own_layout)


def _liger(case: Case) -> Boundary:
    from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

    n = case.x.shape[1]
    device, dtype = case.x.device, case.x.dtype
    # its rows of H_res are stored [target, source], ours [source, target]; each index is its own inverse
    swap = torch.cat([torch.arange(2 * n), 2 * n + torch.arange(n * n).view(n, n).T.flatten()]).to(device)
    x = case.x.detach().requires_grad_()
    phi = case.fn[swap].T.contiguous().to(dtype).requires_grad_()
    b = case.base[swap].clone().requires_grad_()
    alphas = tuple(a.clone().requires_grad_() for a in case.scale.unbind())
    wide = dtype is torch.float32

    def forward() -> Tensor:
        H_pre, H_post, H_res = liger_mhc_coeffs(x, phi, b, *alphas, allow_fp32=wide, pre_eps=1e-6)
        return liger_mhc_post_res(x, liger_mhc_pre(x, H_pre), H_post, H_res)

    def canonical(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        dx, dphi, db, *dalpha = grads
        return {"x": dx, "fn": dphi.T[swap], "base": db[swap], "scale": torch.stack(dalpha)}

    return Boundary(forward, (x, phi, b, *alphas), canonical)


RIVALS: Mapping[str, Rival] = {
    "ours": Rival("mhc (this project)", _ours),
    "liger": Rival("Liger", _liger, "rows_first", True, "starts Sinkhorn with rows; phi in the stream dtype, as it advises"),
    "compile": Rival("torch.compile", _compiled),
    "eager": Rival("PyTorch eager", _eager),
}
