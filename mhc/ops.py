"""The operators ``torch.ops.mhc.<kernel>``: five forwards and five backwards, with fake implementations and autograd.

Shapes and dtypes are in :mod:`mhc.signatures`, equations in ``tl_kernels/reference.py``. Streams (x, f, u, y and their gradients) are
bfloat16, float16 or float32; everything else is float32 and stays so under autocast. Arguments of a wrong shape or on another device
raise ValueError, of a wrong dtype TypeError. Arguments that are not contiguous are copied. There is no double backward.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from mhc import backend
from mhc.signatures import PAIRS, SIGNATURES, Signature

_LIBRARY = torch.library.Library("mhc", "DEF")
_MAX_PLANS = 4096
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class _Plan:
    """A checked call: what its arguments' shapes, dtypes and devices decided."""

    __slots__ = ("choice", "dtypes", "kernel", "launcher", "problem", "target", "tokens")

    def __init__(self, signature: Signature, args: tuple[torch.Tensor, ...], options: dict[str, Any], mode: str) -> None:
        size = signature.check(args)
        self.problem = signature.problem(args, size, options)
        self.tokens = size["T"]
        stream = args[signature.anchor].dtype
        self.dtypes = [stream if t.dtype == "stream" else torch.float32 for t in signature.outputs]
        self.kernel: Any = None
        self.choice: Any = None
        self.launcher: Any = None
        self.target = ""
        if backend.serves_tilelang(mode, args[0].device):
            from tl_kernels import KERNELS
            from tl_kernels.launch import device_arch

            self.kernel = KERNELS[signature.name]
            self.target = device_arch(args[0].device)

    def choose(self, device: torch.device, mode: str) -> Any:
        """The launcher for the profile's present choice, or None where the reference serves."""
        if self.kernel is None:
            return None
        choice = _choose()(self.kernel.name, self.problem, self.tokens, device)
        if choice is not self.choice:  # the first call, or another profile was loaded
            from tl_kernels.launch import get_launcher

            use_reference = choice.impl == "reference" and mode == "auto" and device.type == "cpu"
            self.launcher = None if use_reference else get_launcher(self.kernel, self.problem, choice.config, self.target)
            self.choice = choice
            if os.environ.get("MHC_DEBUG") == "1":
                _report(self.kernel.name, self.problem, self.target, str(choice))
        return self.launcher


@functools.cache
def _choose() -> Callable[..., Any]:
    from mhc import profile

    return profile.choose


@functools.cache  # once per kernel, problem and choice, not per token count
def _report(name: str, problem: Any, target: str, choice: str) -> None:
    print(f"mhc: {name} n={problem.n} C={problem.C} {problem.dtype} on {target}: {choice}", file=sys.stderr)


def _implementation(signature: Signature) -> Callable[..., Any]:
    plans: dict[Any, _Plan] = {}
    count = len(signature.inputs)
    names, defaults = tuple(signature.options), tuple(signature.options.values())
    single = len(signature.outputs) == 1

    def run(*args: Any) -> Any:
        tensors, options = args[:count], args[count:]
        mode = backend.current()
        key = (mode, options, *[(t.shape, t.dtype, t.device) for t in tensors])
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= _MAX_PLANS:  # many token counts: start over, the launchers stay cached
                plans.clear()
            # torch's dispatcher leaves out trailing options that equal their default
            given = dict(zip(names, (*options, *defaults[len(options) :]), strict=True))
            plan = plans[key] = _Plan(signature, tensors, given, mode)
        launcher = plan.choose(tensors[0].device, mode)
        tensors = tuple([t if t.is_contiguous() else t.contiguous() for t in tensors])
        if launcher is None:
            out = backend.run_reference(signature.name, tensors, dict(plan.problem.options), plan.dtypes)
        else:
            out = launcher(*tensors)
        return out[0] if single else out

    return run


def _fake(signature: Signature) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        tensors = args[: len(signature.inputs)]
        out = signature.empty(tensors, signature.check(tensors))
        return out[0] if len(out) == 1 else tuple(out)

    return fake


def _nobody_else_dispatches(args: tuple[torch.Tensor, ...]) -> bool:
    """True for plain tensors of a device we serve, outside tracing, torch_dispatch modes and functorch transforms."""
    first = args[0]
    return (
        (first.is_cpu or first.is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and _PLAIN.issuperset(map(type, args))
    )


def _below_autograd(signature: Signature, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``(keyset, args)`` -> results, without autograd; straight to the implementation where nobody else wants to see the call."""
    op = getattr(torch.ops.mhc, signature.name).default
    count = len(signature.inputs)

    def below(keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if _nobody_else_dispatches(args[:count]):
                return implementation(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return below


def _autograd(forward: Signature, backward: Signature, below: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of a forward: its backward operator, on what that one's signature asks for.

    What ``torch.library.register_autograd`` would generate, but for the shortcut of ``below``, which halves the Python time of a call.
    """
    backward_op = getattr(torch.ops.mhc, backward.name).default
    grads, count = len(forward.outputs), len(forward.inputs)
    in_names = [t.name for t in forward.inputs]
    saved_names = [t.name for t in backward.inputs[grads:]]
    # where the forward finds them in (*inputs, *options, *outputs)
    everything = [*in_names, *forward.options, *(t.name for t in forward.outputs)]
    saved_at = [everything.index(name) for name in saved_names]
    option_at = [count + list(forward.options).index(k) for k in backward.options]
    defaults = tuple(forward.options.values())
    padding = (None,) * (1 + len(forward.options))

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            out = below(keyset, args)
            every = (*args, *out) if isinstance(out, tuple) else (*args, out)
            ctx.set_materialize_grads(False)
            ctx.options = [every[k] for k in option_at]
            ctx.save_for_backward(*[every[k] for k in saved_at])
            return out

        @staticmethod
        def backward(ctx: Any, *grad: torch.Tensor | None) -> Any:
            missing = [g is None for g in grad]  # never `None in grad`: that compares tensors
            if all(missing):
                return (None,) * count + padding
            saved = ctx.saved_tensors
            if any(missing):
                like = dict(zip(saved_names, saved, strict=True))
                inputs = [like[name] for name in in_names]
                zeros = forward.empty(inputs, forward.sizes(inputs))
                grad = tuple(z.zero_() if g is None else g for g, z in zip(grad, zeros, strict=True))
            out = backward_op(*grad, *saved, *ctx.options)
            return (None, *(out if isinstance(out, tuple) else (out,)), *padding[1:])

    Differentiable.__name__ = f"mhc_{forward.name}"

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        args = (*args, *defaults[len(args) - count :])  # the dispatcher leaves out trailing options that equal their default
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Differentiable.apply(keyset, *args)
        return below(keyset, args)

    return kernel


def _no_double_backward(signature: Signature, below: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of a backward: an error for whoever differentiates its results."""

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            return below(keyset, args)

        @staticmethod
        def backward(ctx: Any, *grad: torch.Tensor) -> Any:
            raise RuntimeError(f"mhc.{signature.name} is not differentiable: the mHC operators have no double backward (create_graph=True)")

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Refused.apply(keyset, *args)
        return below(keyset, args)

    return kernel


def _register() -> None:
    below = {}
    for signature in SIGNATURES.values():
        _LIBRARY.define(signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
        implementation = _implementation(signature)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(signature.name, implementation, key)
        torch.library.register_fake(f"mhc::{signature.name}", _fake(signature), lib=_LIBRARY)
        below[signature.name] = _below_autograd(signature, implementation)
    for forward, backward in PAIRS.values():
        _LIBRARY.impl(forward.name, _autograd(forward, backward, below[forward.name]), "Autograd", with_keyset=True)
        _LIBRARY.impl(backward.name, _no_double_backward(backward, below[backward.name]), "Autograd", with_keyset=True)


_register()

project = torch.ops.mhc.project.default
activate = torch.ops.mhc.activate.default
sinkhorn = torch.ops.mhc.sinkhorn.default
pre = torch.ops.mhc.pre.default
post_res = torch.ops.mhc.post_res.default
