"""What each kernel and each operator takes and gives, and the check of its arguments. Free of TileLang, so that ``import mhc`` is too.

The same facts as in the specs of ``tl_kernels``, which a test compares with this table. Legend: T tokens, n streams, C channels,
M = n*n + 2*n, Q = M + 1, K = n*C, S splits, as many as the kernel that wrote them was configured for.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tl_kernels.reference import streams
from tl_kernels.spec import MAX_N, Problem, Tensor

STREAM_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

ORDERS = ("columns_first", "rows_first")

X, F, U = Tensor("x", "T n C", "stream"), Tensor("f", "T C", "stream"), Tensor("u", "T C", "stream")
PHI, ALPHA, B = Tensor("phi", "M K"), Tensor("alpha", "3"), Tensor("b", "M")
Z, RINV, LOGITS = Tensor("z", "T M"), Tensor("rinv", "T"), Tensor("h_res", "T n n")
H_PRE, H_POST, H_RES = Tensor("H_pre", "T n"), Tensor("H_post", "T n"), Tensor("H_res", "T n n")
Y, TICKET = Tensor("y", "T n C", "stream"), Tensor("ticket", "T n C", "stream")
ONE_PART = Tensor("parts", "1 Q T")
PARTS, ZS, DZS = Tensor("parts", "S Q T", split=True), Tensor("zs", "Q T"), Tensor("dzs", "Q T")
DPHI_PARTS, DAB_PARTS = Tensor("dphi", "S M K", split=True), Tensor("dab", "S2 M+3", split=True)


def check_sinkhorn(iters: int, order: str, least: int = 1) -> None:
    """Raise ValueError for options of the manifold projection that mean nothing, TypeError for rounds that are no whole number."""
    try:
        operator.index(iters)
    except TypeError:
        raise TypeError(f"sinkhorn iters: got {iters!r}, wanted a whole number") from None
    if iters < least:
        raise ValueError(f"sinkhorn iters: got {iters}, wanted at least {least}")
    if order not in ORDERS:
        raise ValueError(f"sinkhorn order: got {order!r}, wanted {' or '.join(map(repr, ORDERS))}")


def _grads(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(Tensor("d" + t.name, t.dims, t.dtype) for t in tensors)


@dataclass(frozen=True)
class Signature:
    """One operator. ``options`` are schema fragments such as ``float eps=1e-6`` with the names and defaults they declare.

    ``anchor`` is the index of the argument that decides T, n, C and the stream dtype; the others must agree with it. Arguments and results
    named in ``tickets`` are never read or written: they have a shape and a dtype and one element of storage (:mod:`mhc.fused`).
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    options: dict[str, Any]
    anchor: int = 0
    tickets: tuple[str, ...] = ()
    least_iters: int = 1

    @property
    def schema(self) -> str:
        """The operator's torch.library schema."""
        kinds = {float: "float", int: "int", str: "str"}
        options = [f'{kinds[type(v)]} {k}="{v}"' if isinstance(v, str) else f"{kinds[type(v)]} {k}={v}" for k, v in self.options.items()]
        results = ", ".join(["Tensor"] * len(self.outputs))
        returns = results if len(self.outputs) == 1 else f"({results})"
        return f"{self.name}({', '.join([f'Tensor {t.name}' for t in self.inputs] + options)}) -> {returns}"

    def fail(self, t: Tensor, got: object, wanted: str, error: type[Exception] = ValueError) -> Exception:
        """The one form every complaint about an argument takes."""
        return error(f"mhc.{self.name}: {t.name}: got {got}, wanted {wanted}")

    def sizes(self, args: Sequence[torch.Tensor]) -> dict[str, int]:
        """The sizes the anchor decides. C is 1 where the operator has no channels, T where it has no tokens. Raises ValueError."""
        t, value = self.inputs[self.anchor], args[self.anchor]
        names = t.dims.split()
        if value.dim() != len(names):
            raise self.fail(t, f"shape {tuple(value.shape)}", f"[{', '.join(names)}]")
        size = dict(zip(names, value.shape, strict=True))
        if "n" not in size:
            size["n"] = streams(size["M"] if "M" in size else size["Q"] - 1)
        n = size["n"]
        if not 1 <= n <= MAX_N:
            raise self.fail(t, f"shape {tuple(value.shape)}", f"[{', '.join(names)}] with n in 1..{MAX_N}")
        C = size["C"] if "C" in size else size["K"] // n if "K" in size else 1
        if C < 1:
            raise self.fail(t, f"shape {tuple(value.shape)}", f"[{', '.join(names)}] with at least 1 channel")
        M = n * n + 2 * n
        return {"T": size.get("T", 1), "n": n, "C": C, "M": M, "Q": M + 1, "M+3": M + 3, "K": n * C}

    def check(self, args: Sequence[torch.Tensor]) -> dict[str, int]:
        """Raise ValueError (shape, device) or TypeError (dtype) naming the argument; return the sizes."""
        size = self.sizes(args)
        stream, device = args[self.anchor].dtype, args[self.anchor].device
        for t, value in zip(self.inputs, args, strict=True):
            names = t.dims.split()
            # how many splits another kernel made is its own affair
            wanted = t.resolve({**size, names[0]: value.shape[0]} if t.split and value.dim() else size)
            if tuple(value.shape) != wanted:
                raise self.fail(t, f"shape {tuple(value.shape)}", f"{wanted} = [{', '.join(names)}]")
            if t.dtype != "stream":
                if value.dtype is not torch.float32:
                    why = "torch.float32: coefficients and their parameters stay float32 whatever autocast, FSDP or .to() cast"
                    raise self.fail(t, value.dtype, why, TypeError)
            elif stream not in STREAM_DTYPES:
                raise self.fail(t, stream, " or ".join(map(str, STREAM_DTYPES)), TypeError)
            elif value.dtype is not stream:
                raise self.fail(t, value.dtype, f"{stream}, the dtype of {self.inputs[self.anchor].name}", TypeError)
            if value.device != device:
                raise self.fail(t, f"device {value.device}", f"{device}, the device of {self.inputs[self.anchor].name}")
        return size

    def problem(self, size: dict[str, int], stream: torch.dtype, options: dict[str, Any]) -> Problem:
        """The static part of a checked call. Kernels without streams are the same program for every C: C=1, float32."""
        tensors = (*self.inputs, *self.outputs)
        channels = any({"C", "K"} & set(t.dims.split()) for t in tensors)
        dtype = STREAM_DTYPES[stream] if any(t.dtype == "stream" for t in tensors) else "float32"
        mine = {k: options[k] for k in self.options}
        return Problem(size["n"], size["C"] if channels else 1, dtype, tuple(sorted(mine.items())))

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError for an option that means nothing, TypeError for rounds that are no whole number."""
        check_sinkhorn(options.get("iters", 1), options.get("order", ORDERS[0]), self.least_iters)

    def empty(self, args: Sequence[torch.Tensor], size: dict[str, int]) -> list[torch.Tensor]:
        """Uninitialised results of a checked call."""
        stream, like = args[self.anchor].dtype, args[self.anchor]
        return [
            new_ticket(like)
            if t.name in self.tickets
            else like.new_empty(t.resolve(size), dtype=stream if t.dtype == "stream" else torch.float32)
            for t in self.outputs
        ]


def new_ticket(x: torch.Tensor) -> torch.Tensor:
    """Shape, dtype and device of x [T, n, C] over one element of storage that nobody reads or writes."""
    return x.new_empty_strided(x.shape, (0, 0, 0))


def _pair(
    name: str,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    bwd_options: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Signature, Signature]:
    """A forward, and its backward: gradients of the outputs and what is ``saved`` in, gradients of the inputs out."""
    kept = {k: options[k] for k in bwd_options}
    forward = Signature(name, inputs, outputs, options)
    backward_inputs = (*_grads(outputs), *saved)
    anchor = next(k for k, t in enumerate(backward_inputs) if t.name == inputs[0].name)
    return forward, Signature(name + "_bwd", backward_inputs, _grads(inputs), kept, anchor)


_SINKHORN = {"iters": 20, "eps": 1e-6, "order": "columns_first"}

#: Forward and backward of each operator.
PAIRS = {
    pair[0].name: pair
    for pair in (
        _pair("project", (X, PHI), (Z, RINV), (X, PHI, RINV), norm_eps=1e-6),
        _pair("activate", (Z, RINV, ALPHA, B), (H_PRE, H_POST, LOGITS), (Z, RINV, ALPHA, B), ("post_mult",), pre_eps=1e-6, post_mult=2.0),
        _pair("sinkhorn", (LOGITS,), (H_RES,), (LOGITS,), tuple(_SINKHORN), **_SINKHORN),
        _pair("pre", (X, H_PRE), (U,), (X, H_PRE)),
        _pair("post_res", (X, F, H_POST, H_RES), (Y,), (X, F, H_POST, H_RES)),
    )
}

#: The kernels of the five steps, each an operator of its own.
SIGNATURES = {signature.name: signature for pair in PAIRS.values() for signature in pair}

_COEFFICIENTS = {"norm_eps": 1e-6, "pre_eps": 1e-6, "post_mult": 2.0, **_SINKHORN}
_COEFFICIENTS_BWD = {"post_mult": 2.0, **_SINKHORN}
_WHOLE = {"norm_eps": 1e-6, "pre_eps": 1e-6}
_DY, _DX = Tensor("dy", "T n C", "stream"), Tensor("dx", "T n C", "stream")
_DU, _DF = Tensor("du", "T C", "stream"), Tensor("df", "T C", "stream")
_DAB = Tensor("dab", "S M+3", split=True)
_DH_PRE, _DH_POST, _DH_RES = _grads((H_PRE, H_POST, H_RES))
_WEIGHT_GRADS = _grads((PHI, ALPHA, B))

#: The kernels of the fused path. ``pre`` and ``post_res`` serve in it too. How many splits come out is known after a call only, so these
#: are no operators: :data:`mhc.fused.KERNEL_CALLS`.
FUSED_KERNELS = {
    signature.name: signature
    for signature in (
        Signature("project_parts", (X, PHI), (PARTS,), {}),
        Signature("post_res_project", (X, F, H_POST, H_RES, PHI), (Y, PARTS), {}),
        Signature("coefficients", (PARTS, ALPHA, B), (H_PRE, H_POST, H_RES, ZS), _COEFFICIENTS, least_iters=0),
        Signature("post_res_grads", (_DY, X, F, H_POST), (_DF, _DH_POST, _DH_RES), {}),
        Signature("pre_grad", (_DU, X), (_DH_PRE,), {}, anchor=1),
        Signature(
            "coefficients_bwd",
            (_DH_PRE, _DH_POST, _DH_RES, ZS, ALPHA, B),
            (DZS, _DAB),
            _COEFFICIENTS_BWD,
            least_iters=0,
        ),
        Signature("streams_grad", (_DY, _DU, X, DZS, H_PRE, H_RES, PHI), (_DX, DPHI_PARTS), {}),
        Signature(
            "post_res_coefficients_bwd",
            (_DH_POST, _DH_RES, ZS, ALPHA, B),
            (DZS, _DAB),
            _COEFFICIENTS_BWD,
            least_iters=0,
        ),
        Signature(
            "pre_streams_grad",
            (_DY, _DU, X, DZS, DAB_PARTS, ZS, ALPHA, B, H_PRE, H_RES, PHI),
            (_DX, DPHI_PARTS, _DAB),
            {},
        ),
        Signature("sum_parts", (DPHI_PARTS, DAB_PARTS), _WEIGHT_GRADS, {}),
        Signature("project_pre", (X, PHI, ALPHA, B), (U, ONE_PART), _WHOLE),
        Signature("post_res_project_pre", (X, F, H_POST, H_RES, PHI, ALPHA, B), (Y, U, ONE_PART), _WHOLE),
    )
}


def _next(t: Tensor) -> Tensor:
    """The same of the next connection."""
    return Tensor("next_" + t.name, t.dims, t.dtype)


_DTICKET = Tensor("dticket", "T n C", "stream")
_NEXT = tuple(_next(t) for t in (H_PRE, H_POST, H_RES))
_LEAVE_GRADS = (_DF, _DH_POST, _DH_RES)

#: Forward and backward of the operators that launch several kernels; what they compute is in :mod:`mhc.fused`.
COMPOSITES = {
    "enter": (
        Signature("enter", (X, PHI, ALPHA, B), (U, H_PRE, H_POST, H_RES, ZS, TICKET), _COEFFICIENTS, 0, ("ticket",), 0),
        Signature(
            "enter_bwd",
            (_DTICKET, _DU, _DH_POST, _DH_RES, X, PHI, ALPHA, B, H_PRE, H_RES, ZS),
            _grads((X, PHI, ALPHA, B)),
            _COEFFICIENTS_BWD,
            4,
            least_iters=0,
        ),
    ),
    "boundary": (
        Signature(
            "boundary",
            (X, F, H_POST, H_RES, TICKET, PHI, ALPHA, B),
            (Y, U, *_NEXT, ZS, _next(TICKET)),
            _COEFFICIENTS,
            0,
            ("ticket", "next_ticket"),
            0,
        ),
        Signature(
            "boundary_bwd",
            (_DTICKET, _DU, *_grads(_NEXT[1:]), X, F, H_POST, Y, PHI, ALPHA, B, _NEXT[0], _NEXT[2], ZS),
            (*_LEAVE_GRADS, _DTICKET, *_WEIGHT_GRADS),
            _COEFFICIENTS_BWD,
            4,
            least_iters=0,
        ),
    ),
    "leave": (
        Signature("leave", (X, F, H_POST, H_RES, TICKET), (Y,), {}, 0, ("ticket",)),
        Signature("leave_bwd", (_DY, X, F, H_POST), _LEAVE_GRADS, {}, 1),
    ),
}
