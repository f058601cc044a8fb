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


def _autograd(forward: Signature, backward: Signature) -> tuple[Callable[..., Any], Callable[..., None]]:
    """``backward`` and ``setup_context`` for register_autograd: the backward operator, on what its signature asks for."""
    grads = len(forward.outputs)
    in_names = [t.name for t in forward.inputs]
    saved_names = [t.name for t in backward.inputs[grads:]]
    # where setup_context finds them in (*inputs, *options, *outputs)
    everything = [*in_names, *forward.options, *(t.name for t in forward.outputs)]
    saved_at = [everything.index(name) for name in saved_names]
    option_at = [len(in_names) + list(forward.options).index(k) for k in backward.options]
    padding = (None,) * len(forward.options)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        every = (*inputs, *output) if isinstance(output, tuple) else (*inputs, output)
        ctx.set_materialize_grads(False)
        ctx.options = [inputs[k] for k in option_at]
        ctx.save_for_backward(*[every[k] for k in saved_at])

    def run(ctx: Any, *grad: torch.Tensor | None) -> Any:
        if all(g is None for g in grad):
            return (None,) * len(in_names) + padding
        saved = ctx.saved_tensors
        if None in grad:
            like = dict(zip(saved_names, saved, strict=True))
            inputs = [like[name] for name in in_names]
            zeros = forward.empty(inputs, forward.sizes(inputs))
            grad = tuple(z.zero_() if g is None else g for g, z in zip(grad, zeros, strict=True))
        out = getattr(torch.ops.mhc, backward.name).default(*grad, *saved, *ctx.options)
        return (*(out if isinstance(out, tuple) else (out,)), *padding)

    return run, setup_context


def _no_double_backward(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(f"mhc.{name} is not differentiable: the mHC operators have no double backward (create_graph=True)")

    return refuse


def _register() -> None:
    for signature in SIGNATURES.values():
        _LIBRARY.define(signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
        implementation = _implementation(signature)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(signature.name, implementation, key)
        torch.library.register_fake(f"mhc::{signature.name}", _fake(signature), lib=_LIBRARY)
    for forward, backward in PAIRS.values():
        run, setup_context = _autograd(forward, backward)
        torch.library.register_autograd(f"mhc::{forward.name}", run, setup_context=setup_context, lib=_LIBRARY)
        torch.library.register_autograd(f"mhc::{backward.name}", _no_double_backward(backward.name), lib=_LIBRARY)


_register()

project = torch.ops.mhc.project.default
activate = torch.ops.mhc.activate.default
sinkhorn = torch.ops.mhc.sinkhorn.default
pre = torch.ops.mhc.pre.default
post_res = torch.ops.mhc.post_res.default
