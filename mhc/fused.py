"""A boundary in three launches: ``enter`` a sublayer, ``leave`` it, or ``boundary``, which leaves one and enters the next.

With x [T, n, C] the streams, f and u [T, C], coefficients float32 (legend in :mod:`mhc.signatures`):

    enter(x, phi, alpha, b) -> u, H_pre, H_post, H_res, zs, ticket
    leave(x, f, H_post, H_res, ticket) -> y
    boundary(x, f, H_post, H_res, ticket, phi, alpha, b) -> y, u, and of the next connection H_pre, H_post, H_res, zs, ticket

u and y are those of :func:`mhc.ops.pre` and :func:`mhc.ops.post_res`; ``boundary`` is ``leave``, then ``enter`` with y. zs holds z^T and
1/r for the backward.

**Tickets.** The gradient of x has two parts, through u and the coefficients and through y. Left to autograd each is written out and their
sum a third time. Here it is written once, by the backward of ``enter``. So ``leave`` takes x for its numbers only and gives it no gradient.
What links the two for autograd is the ticket, which has x's shape and no numbers (one element of storage, never read): its gradient is dy
as it is, and the backward of ``enter`` applies H_res^T to it in the pass that writes dx. Hence two rules: x and H_res reach ``leave``
unchanged from the ``enter`` that made the ticket, and whoever calls ``leave`` wants the gradient of that ``enter``'s x. A ticket used twice
is right too, autograd adds the two dy.

H_pre and zs are for the backward and carry no gradient themselves; take the operators of :mod:`mhc.ops` one by one for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mhc.dispatch import Below, nobody_else_dispatches, register, register_autograd, register_no_double_backward
from mhc.plan import Run, implementation, single
from mhc.signatures import COMPOSITES, FUSED_KERNELS, SIGNATURES, new_ticket

Tensor = torch.Tensor
Grad = torch.Tensor | None

#: Every kernel of the fused path as a function of its tensors, then its options; checked as the operators are.
KERNEL_CALLS: dict[str, Callable[..., Any]] = {name: single(signature) for name, signature in FUSED_KERNELS.items()}


def _enter(runs: list[Run], x: Tensor, phi: Tensor, alpha: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    project_parts, coefficients, pre = runs
    (parts,) = project_parts(x, phi)
    H_pre, H_post, H_res, zs = coefficients(parts, alpha, b)
    (u,) = pre(x, H_pre)
    return u, H_pre, H_post, H_res, zs, new_ticket(x)


def _boundary(
    runs: list[Run], x: Tensor, f: Tensor, H_post: Tensor, H_res: Tensor, phi: Tensor, alpha: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    post_res_project, coefficients, pre = runs
    y, parts = post_res_project(x, f, H_post, H_res, phi)
    next_H_pre, next_H_post, next_H_res, zs = coefficients(parts, alpha, b)
    (u,) = pre(y, next_H_pre)
    return y, u, next_H_pre, next_H_post, next_H_res, zs, new_ticket(y)


def _boundary_apart(
    runs: list[Run], x: Tensor, f: Tensor, H_post: Tensor, H_res: Tensor, phi: Tensor, alpha: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    post_res, *enter = runs
    (y,) = post_res(x, f, H_post, H_res)
    u, *rest = _enter(enter, y, phi, alpha, b)
    return y, u, *rest


def _enter_whole(runs: list[Run], x: Tensor, phi: Tensor, alpha: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    project_pre, coefficients = runs
    u, parts = project_pre(x, phi, alpha, b)
    return u, *coefficients(parts, alpha, b), new_ticket(x)


def _boundary_whole(
    runs: list[Run], x: Tensor, f: Tensor, H_post: Tensor, H_res: Tensor, phi: Tensor, alpha: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    post_res_project_pre, coefficients = runs
    y, u, parts = post_res_project_pre(x, f, H_post, H_res, phi, alpha, b)
    return y, u, *coefficients(parts, alpha, b), new_ticket(y)


def _leave(runs: list[Run], x: Tensor, f: Tensor, H_post: Tensor, H_res: Tensor) -> Tensor:
    return runs[0](x, f, H_post, H_res)[0]


def _enter_bwd(
    runs: list[Run],
    dticket: Tensor,
    du: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    b: Tensor,
    H_pre: Tensor,
    H_res: Tensor,
    zs: Tensor,
) -> tuple[Tensor, ...]:
    pre_grad, coefficients_bwd, streams_grad, sum_parts = runs
    (dH_pre,) = pre_grad(du, x)
    dzs, dab = coefficients_bwd(dH_pre, dH_post, dH_res, zs, alpha, b)
    dx, dphi = streams_grad(dticket, du, x, dzs, H_pre, H_res, phi)
    return (dx, *sum_parts(dphi, dab))


def _enter_bwd_whole(
    runs: list[Run],
    dticket: Tensor,
    du: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    b: Tensor,
    H_pre: Tensor,
    H_res: Tensor,
    zs: Tensor,
) -> tuple[Tensor, ...]:
    post_res_coefficients_bwd, pre_streams_grad, sum_parts = runs
    dzs, dab = post_res_coefficients_bwd(dH_post, dH_res, zs, alpha, b)
    dx, dphi, dab = pre_streams_grad(dticket, du, x, dzs, dab, zs, alpha, b, H_pre, H_res, phi)
    return (dx, *sum_parts(dphi, dab))


def _leave_bwd(runs: list[Run], dy: Tensor, x: Tensor, f: Tensor, H_post: Tensor) -> tuple[Tensor, ...]:
    return runs[0](dy, x, f, H_post)


def _boundary_bwd(
    enter_bwd: Callable[..., tuple[Tensor, ...]],
    runs: list[Run],
    dticket: Tensor,
    du: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    x: Tensor,
    f: Tensor,
    H_post: Tensor,
    y: Tensor,
    *rest: Tensor,
) -> tuple[Tensor, ...]:
    *mine, post_res_grads = runs
    dy, *weights = enter_bwd(mine, dticket, du, dH_post, dH_res, y, *rest)
    return (*post_res_grads(dy, x, f, H_post), dy, *weights)


_ENTER_BWD = ("pre_grad", "coefficients_bwd", "streams_grad", "sum_parts")
_ENTER_BWD_WHOLE = ("post_res_coefficients_bwd", "pre_streams_grad", "sum_parts")
_KERNELS = SIGNATURES | FUSED_KERNELS
#: The designs of each operator, a body and its kernels; the first serves everything.
_DESIGNS: dict[str, tuple[tuple[Callable[..., Any], tuple[str, ...]], ...]] = {
    "enter": ((_enter, ("project_parts", "coefficients", "pre")), (_enter_whole, ("project_pre", "coefficients"))),
    "enter_bwd": ((_enter_bwd, _ENTER_BWD), (_enter_bwd_whole, _ENTER_BWD_WHOLE)),
    "boundary": (
        (_boundary, ("post_res_project", "coefficients", "pre")),
        (_boundary_apart, ("post_res", "project_parts", "coefficients", "pre")),  # many streams: phi beside them leaves small tiles
        (_boundary_whole, ("post_res_project_pre", "coefficients")),
    ),
    "boundary_bwd": (
        (functools.partial(_boundary_bwd, _enter_bwd), (*_ENTER_BWD, "post_res_grads")),
        (functools.partial(_boundary_bwd, _enter_bwd_whole), (*_ENTER_BWD_WHOLE, "post_res_grads")),
    ),
    "leave": ((_leave, ("post_res",)),),
    "leave_bwd": ((_leave_bwd, ("post_res_grads",)),),
}
#: Every kernel that some design launches.
DESIGN_KERNELS = frozenset(name for designs in _DESIGNS.values() for _, kernels in designs for name in kernels)

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_BELOW: dict[str, Below] = {}
for _pair in COMPOSITES.values():
    for _signature in _pair:
        _designs = [(tuple(_KERNELS[k] for k in kernels), body) for body, kernels in _DESIGNS[_signature.name]]
        _IMPLEMENTATIONS[_signature.name] = implementation(_signature, *_designs)
        _BELOW[_signature.name] = register(_signature, _IMPLEMENTATIONS[_signature.name])


def _backward(name: str) -> Callable[..., Any]:
    """A backward operator, past the dispatcher where nobody else wants to see the call."""
    forward, backward = COMPOSITES[name.removesuffix("_bwd")]
    run, op, count = _IMPLEMENTATIONS[name], getattr(torch.ops.mhc, name).default, len(backward.inputs)
    grads = next(i for i, t in enumerate(backward.inputs) if t.name == forward.inputs[0].name)  # what comes before x
    batched = torch._C._functorch.is_legacy_batchedtensor

    def call(*args: Any) -> Any:
        # gradients of torch.autograd.grad(is_grads_batched=True) look plain
        if not torch.is_grad_enabled() and nobody_else_dispatches(args[:count]) and not any(map(batched, args[:grads])):
            return run(*args)
        return op(*args)

    return call


_call_enter_bwd, _call_boundary_bwd, _call_leave_bwd = (_backward(name) for name in ("enter_bwd", "boundary_bwd", "leave_bwd"))


def _filled(grads: tuple[Grad, Grad, Grad, Grad], x: Tensor, H_res: Tensor) -> tuple[Tensor, ...]:
    """dticket, du, dH_post, dH_res: zeros for those that nobody asked for. With all four there no kernel runs."""
    dticket, du, dH_post, dH_res = grads
    return (
        torch.zeros_like(x) if dticket is None else dticket,
        x.new_zeros(x.shape[0], x.shape[2]) if du is None else du,
        H_res.new_zeros(H_res.shape[:2]) if dH_post is None else dH_post,
        torch.zeros_like(H_res) if dH_res is None else dH_res,
    )


#: The gradients of a forward's options.
_NO_OPTIONS = (None,) * len(COMPOSITES["enter"][0].options)

# In all three: `keyset` is None where the caller has found that nobody else wants to see the call. Undefined gradients arrive as None.


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, phi: Tensor, alpha: Tensor, b: Tensor, *options: Any) -> Any:
        args = (x, phi, alpha, b, *options)
        out = _IMPLEMENTATIONS["enter"](*args) if keyset is None else _BELOW["enter"](keyset, args)
        _, H_pre, _, H_res, zs, _ = out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(H_pre, zs)
        ctx.options = options[2:]
        ctx.save_for_backward(x, phi, alpha, b, H_pre, H_res, zs)
        return out

    @staticmethod
    def backward(ctx: Any, du: Grad, dH_pre: None, dH_post: Grad, dH_res: Grad, dzs: None, dticket: Grad) -> Any:
        if du is None and dH_post is None and dH_res is None and dticket is None:
            return (None,) * 5 + _NO_OPTIONS
        x, phi, alpha, b, H_pre, H_res, zs = ctx.saved_tensors
        grads = _filled((dticket, du, dH_post, dH_res), x, H_res)
        return (None, *_call_enter_bwd(*grads, x, phi, alpha, b, H_pre, H_res, zs, *ctx.options), *_NO_OPTIONS)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, f: Tensor, H_post: Tensor, H_res: Tensor, ticket: Tensor) -> Any:
        args = (x, f, H_post, H_res, ticket)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, f, H_post)
        return _IMPLEMENTATIONS["leave"](*args) if keyset is None else _BELOW["leave"](keyset, args)

    @staticmethod
    def backward(ctx: Any, dy: Grad) -> Any:
        if dy is None:
            return (None,) * 6
        dy = dy.contiguous()  # once, not here and in the backward of enter
        return (None, None, *_call_leave_bwd(dy, *ctx.saved_tensors), dy)


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        x: Tensor,
        f: Tensor,
        H_post: Tensor,
        H_res: Tensor,
        ticket: Tensor,
        phi: Tensor,
        alpha: Tensor,
        b: Tensor,
        *options: Any,
    ) -> Any:
        args = (x, f, H_post, H_res, ticket, phi, alpha, b, *options)
        out = _IMPLEMENTATIONS["boundary"](*args) if keyset is None else _BELOW["boundary"](keyset, args)
        y, _, next_H_pre, _, next_H_res, zs, _ = out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(next_H_pre, zs)
        ctx.options = options[2:]
        ctx.save_for_backward(x, f, H_post, y, phi, alpha, b, next_H_pre, next_H_res, zs)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Grad, du: Grad, dH_pre: None, dH_post: Grad, dH_res: Grad, dzs: None, dticket: Grad) -> Any:
        x, f, H_post, y, phi, alpha, b, next_H_pre, next_H_res, zs = ctx.saved_tensors
        weights: tuple[Grad, ...] = (None, None, None)
        if not (du is None and dH_post is None and dH_res is None and dticket is None):
            grads = _filled((dticket, du, dH_post, dH_res), y, next_H_res)
            rest = (phi, alpha, b, next_H_pre, next_H_res, zs, *ctx.options)
            if dy is None:
                return (None, None, *_call_boundary_bwd(*grads, x, f, H_post, y, *rest), *_NO_OPTIONS)
            # y went elsewhere too, not only through the next ticket
            g, *weights = _call_enter_bwd(*grads, y, *rest)
            dy = g + dy
        if dy is None:
            return (None,) * 9 + _NO_OPTIONS
        dy = dy.contiguous()
        return (None, None, *_call_leave_bwd(dy, x, f, H_post), dy, *weights, *_NO_OPTIONS)


_FUNCTIONS: dict[str, Any] = {"enter": _Enter, "boundary": _Boundary, "leave": _Leave}


def _register_autograd(name: str) -> Callable[..., Any]:
    """Register autograd for a pair; return the forward for Python callers, without the dispatcher's share of the time."""
    forward, backward = COMPOSITES[name]
    function, run = _FUNCTIONS[name], _IMPLEMENTATIONS[name]
    op, count, defaults = getattr(torch.ops.mhc, name).default, len(forward.inputs), tuple(forward.options.values())
    every = count + len(defaults)

    register_autograd(forward, function, _BELOW[name])
    register_no_double_backward(backward, _BELOW[backward.name])

    # the C function below Function.apply, which first looks at every argument for functorch's sake
    apply = super(torch.autograd.Function, function).apply

    def call(*args: Any, **named: Any) -> Any:
        if named or not count <= len(args) <= every or torch.compiler.is_compiling() or not nobody_else_dispatches(args[:count]):
            return op(*args, **named)
        if len(args) < every:
            args = (*args, *defaults[len(args) - count :])
        # whether any of them requires a gradient, apply finds out as fast
        return apply(None, *args) if torch.is_grad_enabled() else run(*args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"``torch.ops.mhc.{forward.schema}``; see :mod:`mhc.fused`."
    return call


enter, boundary, leave = (_register_autograd(name) for name in ("enter", "boundary", "leave"))
