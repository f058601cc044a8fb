"""Registration with torch's dispatcher, and the way past it for calls that nobody else wants to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from mhc.signatures import Signature

_LIBRARY = torch.library.Library("mhc", "DEF")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

#: ``(keyset, args)`` -> results, below autograd.
Below = Callable[[Any, tuple[Any, ...]], Any]


def nobody_else_dispatches(args: Sequence[torch.Tensor]) -> bool:
    """True for plain tensors of a device we serve, outside tracing, torch_dispatch modes, functorch transforms and forward-mode AD."""
    first = args[0]
    return (
        (first.is_cpu or first.is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and _PLAIN.issuperset(map(type, args))
    )


def register(signature: Signature, implementation: Callable[..., Any]) -> Below:
    """Define ``torch.ops.mhc.<name>`` with its schema, CPU and CUDA implementation and fake; return its way below autograd."""
    _LIBRARY.define(signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(signature.name, implementation, key)
    torch.library.register_fake(f"mhc::{signature.name}", _fake(signature), lib=_LIBRARY)
    return _below_autograd(signature, implementation)


def register_autograd(signature: Signature, function: Any, below: Below) -> None:
    """``function`` (keyset, then the operator's arguments) as the autograd of an operator; ``below`` where nothing requires a gradient."""
    count, defaults = len(signature.inputs), tuple(signature.options.values())

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in args[:count]):
            raise NotImplementedError(f"mhc.{signature.name}: got a dual tensor; the mHC operators have no forward-mode derivative (jvp)")
        args = (*args, *defaults[len(args) - count :])  # the dispatcher leaves out trailing options that equal their default
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(keyset, *args)
        return below(keyset, args)

    _LIBRARY.impl(signature.name, kernel, "Autograd", with_keyset=True)


def register_no_double_backward(signature: Signature, below: Below) -> None:
    """The autograd kernel of a backward: an error for whoever differentiates its results."""

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            return below(keyset, args)

        @staticmethod
        def backward(ctx: Any, *grad: torch.Tensor) -> Any:
            raise RuntimeError(f"mhc.{signature.name} is not differentiable: the mHC operators have no double backward (create_graph=True)")

    register_autograd(signature, Refused, below)


def _fake(signature: Signature) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        tensors = args[: len(signature.inputs)]
        out = signature.empty(tensors, signature.check(tensors))
        return out[0] if len(out) == 1 else tuple(out)

    return fake


def _below_autograd(signature: Signature, implementation: Callable[..., Any]) -> Below:
    """Straight to the implementation where nobody else wants to see the call."""
    op = getattr(torch.ops.mhc, signature.name).default
    count = len(signature.inputs)

    def below(keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if nobody_else_dispatches(args[:count]):
                return implementation(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return below
