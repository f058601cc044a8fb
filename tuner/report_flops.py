"""Floating-point operations of every kernel, counted by hand from its definition in tl_kernels/reference.py, for the roofline.

What counts is the work that the definition asks for: a multiply-add is two, any other operation (exp, rsqrt, division, comparison) one.
What a program does beyond it does not count: a product in two or three bf16 or tf32 parts, padding, recomputation. So the intensity is a
lower bound of what runs, and the operations per second are useful ones. Counts of the small kernels (coefficients, Sinkhorn) are good to a
few percent. A second stage (``sum_parts``) adds every element it reads, with the one split that ``bytes_moved`` takes.
"""

from __future__ import annotations

from collections.abc import Callable

from tl_kernels.spec import Problem

SIGMOID = 3  # exp, add, reciprocal


def _project(p: Problem) -> int:
    """z = phi vec(x), the mean square and 1/r, a token."""
    return 2 * p.M * p.K + 2 * p.K + 3


def _activate(p: Problem) -> int:
    """z/r, alpha and b for each coefficient; the sigmoid and its eps or factor for H_pre and H_post."""
    return 3 * p.M + 2 * p.n * (SIGMOID + 1)


def _activate_bwd(p: Problem) -> int:
    """The logits and sigmoids again, their derivative (4), dz = dh alpha/r, d(1/r) = <dh alpha, z>, dalpha and db."""
    return 3 * p.M + 2 * p.n * (SIGMOID + 4) + 2 * p.M + 2 * p.M + 2 * p.M + 4


def _half_steps(p: Problem) -> int:
    """Divisions by sums, rows or columns, after the softmax."""
    return max(0, 2 * p.option("iters") - 1)


def _sinkhorn(p: Problem) -> int:
    """The softmax with its eps (maximum, difference, exp, sum, division, sum), then n*n additions and divisions and n eps a half step."""
    if p.option("iters") == 0:
        return 0
    return 6 * p.n**2 + _half_steps(p) * (2 * p.n**2 + p.n)


def _sinkhorn_bwd(p: Problem) -> int:
    """The forward again, then a half step and the softmax: the product with the iterate, its sum, the difference, the division."""
    if p.option("iters") == 0:
        return 0
    return _sinkhorn(p) + (_half_steps(p) + 1) * 4 * p.n**2


def _pre(p: Problem) -> int:
    return 2 * p.K


def _pre_weights(p: Problem) -> int:
    """H_pre from the sums, in the whole passes: rsqrt and eps, then each logit and sigmoid."""
    return 2 + p.n * (3 + SIGMOID + 1)


def _post_res(p: Problem) -> int:
    """H_res x and H_post f."""
    return 2 * p.n * p.K + 2 * p.K


def _post_res_grads(p: Problem) -> int:
    """df, dH_post and dH_res."""
    return 2 * p.K + 2 * p.K + 2 * p.n * p.K


def _gates_bwd(p: Problem) -> int:
    """H_pre's part of :func:`_activate_bwd`: n logits with what comes of them."""
    return p.n * (3 + SIGMOID + 4 + 2 + 2 + 2)


def _streams_grad(p: Problem) -> int:
    """H_res^T dy, H_pre du, dz phi and its sum, the norm's part, and dphi."""
    return 2 * p.n * p.K + 2 * p.K + 2 * p.M * p.K + p.K + 2 * p.K + 2 * p.M * p.K


#: Operations a token.
_A_TOKEN: dict[str, Callable[[Problem], int]] = {
    "project": _project,
    # dz phi, the norm's part of dx, and dphi
    "project_bwd": lambda p: 2 * p.M * p.K + 2 * p.K + 4 + 2 * p.M * p.K,
    "activate": _activate,
    "activate_bwd": _activate_bwd,
    "sinkhorn": _sinkhorn,
    "sinkhorn_bwd": _sinkhorn_bwd,
    "pre": _pre,
    "pre_bwd": lambda p: p.K + 2 * p.K,
    "post_res": _post_res,
    "post_res_bwd": lambda p: 2 * p.n * p.K + _post_res_grads(p),
    "project_parts": _project,
    "post_res_project": lambda p: _post_res(p) + _project(p),
    "coefficients": lambda p: 2 + _activate(p) + _sinkhorn(p),
    "pre_grad": lambda p: 2 * p.K,
    "coefficients_bwd": lambda p: _activate_bwd(p) + _sinkhorn_bwd(p),
    # the logits, sigmoids and their derivatives but for H_pre
    "post_res_coefficients_bwd": lambda p: _activate_bwd(p) - _gates_bwd(p) + _sinkhorn_bwd(p),
    "streams_grad": _streams_grad,
    "pre_streams_grad": lambda p: 2 * p.K + _gates_bwd(p) + _streams_grad(p),
    "post_res_grads": _post_res_grads,
    "project_pre": lambda p: _project(p) + _pre_weights(p) + _pre(p),
    "post_res_project_pre": lambda p: _post_res(p) + _project(p) + _pre_weights(p) + _pre(p),
}


def flops(kernel: str, p: Problem, T: int) -> int:
    """Operations of one launch at ``T`` tokens. Raises KeyError for a kernel that nobody counted."""
    if kernel == "sum_parts":
        return p.M * p.K + p.M + 3
    return _A_TOKEN[kernel](p) * T
