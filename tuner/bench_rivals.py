"""Implementations of one mHC boundary, each behind the same few calls. Those with an environment of their own are in tuner/rivals.

Imports torch and the PyTorch reference only; an implementation is imported when it is made.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.bench_case import GRADIENTS, Case, plain_boundary
from tuner.errors import TuneError, unknown

if TYPE_CHECKING:
    from mhc import HyperConnection

__all__ = ["GRADIENTS", "RIVALS", "Boundary", "Case", "Rival", "plain_boundary", "rival", "rival_names"]


@dataclass(frozen=True)
class Boundary:
    """``forward()`` gives y from ``leaves``, the streams first; a rival without a backward has no leaves. ``canonical`` puts gradients of
    the leaves into this project's layout, keyed by GRADIENTS.

    ``step``, ``start`` and ``end`` let boundaries be stacked: one boundary from streams to streams in the rival's own layout, what it takes
    for x (the first leaf, where there is one), and the gradient of what it gives.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    canonical: Callable[[tuple[Tensor, ...]], dict[str, Tensor]]
    step: Callable[[Tensor], Tensor] | None = None
    start: Tensor | None = None
    end: Tensor | None = None

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
    """``order`` and ``rounds_fn`` say where it computes another function than ours by design; the check takes both into account.

    ``chain`` makes a whole stack at once, for what spans sublayers. ``isolated``: in a process of its own. ``costly``: a minute to compile,
    so only single boundaries, decode at one shape only, and every shape is compiled beside the others.
    """

    label: str
    make: Callable[[Case], Boundary]
    order: str = "columns_first"
    rounds_fn: bool = False
    note: str = ""
    chain: Callable[[list[Case]], Chain] | None = None
    isolated: bool = True
    costly: bool = False
    stacks: bool = True


@dataclass(frozen=True)
class Chain:
    """A stack as one function: ``forward(x)`` from streams to streams, and per layer fn, base and scale in this project's layout."""

    forward: Callable[[Tensor], Tensor]
    leaves: tuple[tuple[Tensor, Tensor, Tensor], ...]


def _require_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leaves of their own on the same memory."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def _own_layout(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(GRADIENTS, grads, strict=True))


def _boundary(case: Case, x: Tensor, step: Callable[[Tensor], Tensor], parameters: tuple[Tensor, ...]) -> Boundary:
    """A boundary in this project's layout."""
    return Boundary(lambda: step(x), (x, *parameters), _own_layout, step, x, case.dy)


def _connections(cases: list[Case]) -> list[HyperConnection]:
    import mhc

    made = []
    for case in cases:
        hc = mhc.HyperConnection(case.sizes[2], n=case.sizes[1]).to(case.x.device)
        with torch.no_grad():
            hc.fn.copy_(case.fn)
            hc.base.copy_(case.base)
            hc.scale.copy_(case.scale)
        made.append(hc)
    return made


def _ours(case: Case) -> Boundary:
    (hc,) = _connections([case])
    (x,) = _require_grad(case.x)

    def step(streams: Tensor) -> Tensor:
        u, ctx = hc.pre(streams)
        return hc.post(u, ctx)

    return _boundary(case, x, step, (hc.fn, hc.base, hc.scale))


def _ours_chain(cases: list[Case]) -> Chain:
    """The leave of one sublayer fused with the enter of the next, as a model chains them."""
    connections = _connections(cases)
    first, *others = connections
    if not hasattr(first, "cross"):
        raise NotImplementedError("HyperConnection has no cross() in this version")

    def forward(x: Tensor) -> Tensor:
        u, ctx = first.pre(x)
        for hc in others:
            u, ctx = hc.cross(u, ctx)
        return connections[-1].post(u, ctx)

    return Chain(forward, tuple((hc.fn, hc.base, hc.scale) for hc in connections))


def _eager(case: Case) -> Boundary:
    x, fn, base, scale = _require_grad(case.x, case.fn, case.base, case.scale)
    return _boundary(case, x, lambda streams: plain_boundary(streams, fn, base, scale), (fn, base, scale))


@functools.cache
def _compiled_boundary(T: int, n: int, C: int) -> Callable[..., Tensor]:
    """One compilation a shape, kept; token counts above 1 of a decode share one."""
    return torch.compile(plain_boundary, fullgraph=True, dynamic=False if T == 1 or T > DECODE_MOST else None)


#: Token counts up to this one are decoding.
DECODE_MOST = 256


def _compiled(case: Case) -> Boundary:
    T, n, C = case.sizes
    x, fn, base, scale = _require_grad(case.x, case.fn, case.base, case.scale)
    decode = 1 < T <= DECODE_MOST
    compiled = _compiled_boundary(2 if decode else T, n, C)

    def step(streams: Tensor) -> Tensor:
        if decode:
            torch._dynamo.maybe_mark_dynamic(streams, 0)
        return compiled(streams, fn, base, scale)

    return _boundary(case, x, step, (fn, base, scale))


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

    def step(streams: Tensor) -> Tensor:
        H_pre, H_post, H_res = liger_mhc_coeffs(streams, phi, b, *alphas, allow_fp32=wide, pre_eps=1e-6)
        return liger_mhc_post_res(streams, liger_mhc_pre(streams, H_pre), H_post, H_res)

    def canonical(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        dx, dphi, db, *dalpha = grads
        return {"x": dx, "fn": dphi.T[swap], "base": db[swap], "scale": torch.stack(dalpha)}

    return Boundary(lambda: step(x), (x, phi, b, *alphas), canonical, step, x, case.dy)


RIVALS: Mapping[str, Rival] = {
    "ours": Rival("mhc (this project)", _ours, chain=_ours_chain, isolated=False),
    "liger": Rival("Liger", _liger, "rows_first", True, "starts Sinkhorn with rows; phi in the stream dtype, as it advises"),
    "compile": Rival("torch.compile", _compiled, costly=True, stacks=False),
    "eager": Rival("PyTorch eager", _eager, isolated=False, stacks=False),
}


def rival_names() -> list[str]:
    """Every rival there is code for, installed or not: those above, between ours and PyTorch's those of tuner/rivals."""
    try:
        package = importlib.import_module("tuner.rivals")
    except ModuleNotFoundError:
        return list(RIVALS)
    others = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return ["ours", *others, *(name for name in RIVALS if name != "ours")]


def check_rivals(names: Iterable[str], known: Collection[str]) -> None:
    """Raise :class:`TuneError` for a name, ``-`` and ``_`` alike, that is not among the known."""
    for name in names:
        if name.replace("-", "_") not in known:
            raise unknown("rival", name, known)


def rival(name: str) -> Rival:
    """The rival of that name, ``-`` and ``_`` alike. Raises :class:`TuneError` where there is none."""
    name = name.replace("-", "_")
    if name in RIVALS:
        return RIVALS[name]
    if name not in rival_names():
        raise unknown("rival", name, rival_names())
    found = importlib.import_module(f"tuner.rivals.{name}").RIVAL
    if not isinstance(found, Rival):
        raise TuneError(f"tuner/rivals/{name}.py: RIVAL is a {type(found).__name__}, wanted a Rival")
    return found
