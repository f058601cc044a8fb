"""The operators ``torch.ops.mhc.<name>``, with fake implementations and autograd: the five steps of the paper, one kernel each, and
:func:`enter`, :func:`boundary` and :func:`leave`, which launch what a boundary needs (:mod:`mhc.fused`).

Shapes and dtypes are in :mod:`mhc.signatures`, equations in ``tl_kernels/reference.py``. Streams (x, f, u, y and their gradients) are
bfloat16, float16 or float32; everything else is float32 and stays so under autocast. Arguments of a wrong shape or on another device
raise ValueError, of a wrong dtype TypeError. Arguments that are not contiguous are copied. There is no double backward.
"""

from __future__ import annotations

from typing import Any

import torch

from mhc.dispatch import Below, register, register_autograd, register_no_double_backward
from mhc.fused import boundary, enter, leave
from mhc.plan import single
from mhc.signatures import PAIRS, Signature


def _autograd(forward: Signature, backward: Signature, below: Below) -> Any:
    """The autograd of a forward: its backward operator, on what that one's signature asks for.

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
    return Differentiable


def _register() -> None:
    for forward, backward in PAIRS.values():
        below_forward, below_backward = (register(signature, single(signature)) for signature in (forward, backward))
        register_autograd(forward, _autograd(forward, backward, below_forward), below_forward)
        register_no_double_backward(backward, below_backward)


_register()

__all__ = ["activate", "boundary", "enter", "leave", "post_res", "pre", "project", "sinkhorn"]

project = torch.ops.mhc.project.default
activate = torch.ops.mhc.activate.default
sinkhorn = torch.ops.mhc.sinkhorn.default
pre = torch.ops.mhc.pre.default
post_res = torch.ops.mhc.post_res.default
