"""What is benchmarked: one mHC boundary around the identity layer (f = u), or a stack of them, and its answer in float64.

Shapes as in tl_kernels/spec.py: x and y [T,n,C] in the stream dtype; fn [M,K], base [M], scale [3] in float32, in this project's layout.
Imports torch and the PyTorch reference only, so that a rival's own environment can run it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tl_kernels import reference
from tuner import shape
from tuner.errors import TuneError
from tuner.gate import relative_error

GRADIENTS = ("x", "fn", "base", "scale")
PASSES = ("forward", "forward_backward")

#: Bytes of float64 that one chunk of the answer may take; several rivals may ask for theirs at once.
CHUNK_BYTES = 1 << 30

#: Largest relative error against float64 that still counts as the same function.
TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 2e-3}


@dataclass(frozen=True)
class Shape(shape.Shape):
    """One whose boundaries are benchmarked; ``only`` narrows the rivals."""

    only: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.T} x {self.n} x {self.C}"

    @staticmethod
    def parse(text: str, option: str = "--shapes", narrow: bool = True) -> Shape:
        """``8192x4x2560`` or, where it may ``narrow``, ``8192x4x2560:ours+eager``. Raises :class:`TuneError` that names the option."""
        match = re.fullmatch(r"([^:]+):(\S+)", text.strip()) if narrow else None
        try:
            plain = shape.parse_shape(match[1] if match else text, option)
        except TuneError as e:
            raise TuneError(f"{e}{', or 8192x4x2560:ours+liger' if narrow else ''}") from None
        return Shape(plain.T, plain.n, plain.C, tuple(match[2].split("+")) if match else None)

    def unit_bytes(self, dtype: str) -> int:
        """u: one [T,C] tensor in the stream dtype."""
        return self.T * self.C * (4 if dtype == "float32" else 2)

    @property
    def floor_units(self) -> dict[str, int]:
        """Bytes a boundary must move, in u. Forward: read x and f, write u and y, 10u at n = 4.

        Backward: post_res without dx reads dy, x, f and writes df, 10u; one pass, the row on chip between its two uses, reads dy, du, x and
        writes dx, 13u.
        """
        return {"forward": 2 * self.n + 2, "forward_backward": 7 * self.n + 5}


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
        x, dy = (torch.randn((T, n, C), generator=draw, device=device).to(dtype) for _ in range(2))
        return Case(x, dy, *_parameters(n, C, draw))

    @staticmethod
    def stack(T: int, n: int, C: int, dtype: torch.dtype, device: torch.device, seed: int = 0, layers: int = 1) -> list[Case]:
        """Boundaries one after the other, each with parameters of its own; x is the first one's, dy the last one's."""
        first = Case.random(T, n, C, dtype, device, seed)
        cases = [first]
        for k in range(1, layers):
            fn, base, scale = _parameters(n, C, torch.Generator(device=device).manual_seed(seed * 1009 + k))
            cases.append(replace(first, fn=fn, base=base, scale=scale))
        return cases

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, n, C."""
        T, n, C = self.x.shape
        return T, n, C

    def fingerprint(self) -> list[float]:
        """Sums that are the same wherever the same numbers were drawn."""
        return [float(t.double().sum()) for t in (self.x, self.dy, self.fn, self.base)]


def _parameters(n: int, C: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base and scale."""
    device = draw.device
    M, K = n * n + 2 * n, n * C
    fn = torch.randn((M, K), generator=draw, device=device) / K**0.5
    base = torch.randn((M,), generator=draw, device=device) / 2
    return fn, base, torch.tensor([0.8, 1.0, 1.2], device=device)


def plain_boundary(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, order: str = "columns_first") -> Tensor:
    """The specification's boundary, computed in fn's dtype; u and y are rounded to the dtype of x, as every implementation stores them."""
    wide = x.to(fn.dtype)
    z, rinv = reference.project(wide, fn)
    H_pre, H_post, h_res = reference.activate(z, rinv, scale, base)
    H_res = reference.sinkhorn(h_res, order=order)
    f = reference.pre(wide, H_pre).to(x.dtype)
    return reference.post_res(wide, f.to(fn.dtype), H_post, H_res).to(x.dtype)


def expected(
    cases: Sequence[Case], order: str = "columns_first", rounds_fn: bool = False
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """y, dx and per layer the gradients of fn, base and scale, in float64 and nothing rounded in between, in chunks of tokens.

    ``order`` and ``rounds_fn`` are what a rival computes otherwise by design: the Sinkhorn order, and fn in the stream dtype.
    """
    first = cases[0]
    T, n, C = first.sizes
    parameters = []
    for case in cases:
        fn = case.fn.to(case.x.dtype) if rounds_fn else case.fn
        parameters.append([t.double().detach().requires_grad_() for t in (fn, case.base, case.scale)])
    totals = [[torch.zeros_like(t) for t in layer] for layer in parameters]
    rows = max(1, min(T, CHUNK_BYTES // (len(cases) * 10 * n * C * 8)))  # about ten [T,n,C] a layer are kept for the backward
    all_y = torch.empty((T, n, C), dtype=torch.float64, device=first.x.device)
    all_dx = torch.empty_like(all_y)
    for start in range(0, T, rows):
        here = slice(start, start + rows)
        x = y = first.x[here].double().requires_grad_()
        for fn, base, scale in parameters:
            y = plain_boundary(y, fn, base, scale, order)
        leaves = [x, *(t for layer in parameters for t in layer)]
        all_dx[here], *grads = torch.autograd.grad(y, leaves, first.dy[here].double())
        all_y[here] = y.detach()
        for total, grad in zip((t for layer in totals for t in layer), grads, strict=True):
            total += grad
    per_layer = [dict(zip(GRADIENTS[1:], layer, strict=True)) for layer in totals]
    return all_y, all_dx, per_layer


def finite_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite where a value is not finite."""
    error = relative_error(got, want)
    return error if error < float("inf") else float("inf")  # NaN compares false
