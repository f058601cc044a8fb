"""What each operator takes and gives, and the check of its arguments. Free of TileLang, so that ``import mhc`` is too.

The same facts as in the specs of ``tl_kernels``, which a test compares with this table. Legend: T tokens, n streams, C channels,
M = n*n + 2*n, K = n*C.
"""

from __future__ import annotations

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


def check_sinkhorn(iters: int, order: str) -> None:
    """Raise ValueError for options of the manifold projection that mean nothing."""
    if iters < 1:
        raise ValueError(f"sinkhorn iters: got {iters}, wanted at least 1")
    if order not in ORDERS:
        raise ValueError(f"sinkhorn order: got {order!r}, wanted {' or '.join(map(repr, ORDERS))}")


def _grads(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(Tensor("d" + t.name, t.dims, t.dtype) for t in tensors)


@dataclass(frozen=True)
class Signature:
    """One operator. ``options`` are schema fragments such as ``float eps=1e-6`` with the names and defaults they declare.

    ``anchor`` is the index of the argument that decides T, n, C and the stream dtype; the others must agree with it.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    options: dict[str, Any]
    anchor: int = 0

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
        """T, n, C, M, K as the anchor has them. C is 1 where the operator has no channels. Raises ValueError."""
        t, value = self.inputs[self.anchor], args[self.anchor]
        names = t.dims.split()
        if value.dim() != len(names):
            raise self.fail(t, f"shape {tuple(value.shape)}", f"[{', '.join(names)}]")
        size = dict(zip(names, value.shape, strict=True))
        if "n" not in size:
            size["n"] = streams(size["M"])
        n, C = size["n"], size.get("C", 1)
        if not 1 <= n <= MAX_N:
            raise self.fail(t, f"shape {tuple(value.shape)}", f"[{', '.join(names)}] with n in 1..{MAX_N}")
        if C < 1:
            raise self.fail(t, f"shape {tuple(value.shape)}", f"[{', '.join(names)}] with at least 1 channel")
        return {"T": size["T"], "n": n, "C": C, "M": n * n + 2 * n, "K": n * C}

    def check(self, args: Sequence[torch.Tensor]) -> dict[str, int]:
        """Raise ValueError (shape, device) or TypeError (dtype) naming the argument; return the sizes."""
        size = self.sizes(args)
        stream, device = args[self.anchor].dtype, args[self.anchor].device
        for t, value in zip(self.inputs, args, strict=True):
            names = t.dims.split()
            wanted = t.resolve(size)
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

    def problem(self, args: Sequence[torch.Tensor], size: dict[str, int], options: dict[str, Any]) -> Problem:
        """The static part of a checked call. Operators without streams are the same program for every C: C=1, float32."""
        check_sinkhorn(options.get("iters", 1), options.get("order", ORDERS[0]))
        dtype = STREAM_DTYPES[args[self.anchor].dtype] if self.inputs[self.anchor].dtype == "stream" else "float32"
        return Problem(size["n"], size["C"], dtype, tuple(sorted(options.items())))

    def empty(self, args: Sequence[torch.Tensor], size: dict[str, int]) -> list[torch.Tensor]:
        """Uninitialised results of a checked call."""
        stream, like = args[self.anchor].dtype, args[self.anchor]
        return [like.new_empty(t.resolve(size), dtype=stream if t.dtype == "stream" else torch.float32) for t in self.outputs]


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
        _pair("post_res", (X, F, H_POST, H_RES), (Tensor("y", "T n C", "stream"),), (X, F, H_POST, H_RES)),
    )
}

SIGNATURES = {signature.name: signature for pair in PAIRS.values() for signature in pair}
