"""The module training code uses: one hyper-connection around one layer, and the way into the streams.

Shapes: x [..., n, dim] streams, u and f [..., dim]; T is the product of the leading dimensions, M = n*n + 2*n.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from mhc import ops
from mhc.signatures import STREAM_DTYPES, check_sinkhorn, new_ticket
from tl_kernels.spec import MAX_N

#: Logit of the diagonal of H_res at the start, against 0 beside it; see HyperConnection on why.
INIT_DIAGONAL = 8.0
#: alpha at the start (the paper, table of hyper-parameters).
INIT_ALPHA = 0.01

# numpy's are Integral, torch.export's symbolic ones are neither
_WHOLE = (int, numbers.Integral, torch.SymInt)


class Context(NamedTuple):
    """What :meth:`HyperConnection.pre` keeps for :meth:`HyperConnection.post`: the flattened streams and their coefficients.

    Read what you like and pass it on as it is. With a ticket (:mod:`mhc.fused`; None on the path of single steps) ``x`` is detached, for
    its gradient comes by the ticket: another x or H_res put beside it would get wrong gradients. Where something else wants a gradient
    of the streams, an auxiliary loss say, end the chain there with ``post`` and start anew with ``pre``.
    """

    x: torch.Tensor  # [T, n, dim]
    H_post: torch.Tensor  # [T, n] float32
    H_res: torch.Tensor  # [T, n, n] float32
    ticket: torch.Tensor | None = None  # [T, n, dim] without storage


def check_sizes(n: int, dim: int) -> None:
    """Raise ValueError for sizes no kernel serves, TypeError for what is no whole number."""
    for name, size in (("n", n), ("dim", dim)):
        if isinstance(size, bool) or not isinstance(size, _WHOLE):
            raise TypeError(f"{name}: got {size!r}, wanted a whole number")
    if not 1 <= n <= MAX_N:
        raise ValueError(f"n: got {n}, wanted 1..{MAX_N} streams")
    if dim < 1:
        raise ValueError(f"dim: got {dim}, wanted at least 1 channel")


def initial_pre_logit(n: int) -> float:
    """b with sigmoid(b) = 1/n; one stream needs 1, which sigmoid only nears."""
    return -math.log(n - 1) if n > 1 else INIT_DIAGONAL


def flatten_streams(x: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    """[..., n, dim] -> contiguous [T, n, dim]. Raises ValueError naming x."""
    if x.dim() < 2 or x.shape[-2] != n or x.shape[-1] != dim:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., n={n}, dim={dim}]; mhc.expand(h, {n}) makes streams of [..., dim]")
    return (x if x.dim() == 3 else x.reshape(math.prod(x.shape[:-2]), n, dim)).contiguous()


class Float32Parameters(nn.Module):
    """A module whose own parameters stay float32 when the model around it is cast: .to(dtype), .bfloat16(), .half() move, not cast.

    Coefficients in bfloat16 raise the row-sum error of H_res from 1e-5 to 3e-3. Child modules are cast as usual.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float32Parameters:
        def move(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return out if out.dtype in (t.dtype, torch.float32) else t.to(out.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(move, recurse=False)
        return self

    def float32_parameter(self, *shape: int, device: Any, dtype: torch.dtype) -> nn.Parameter:
        """An uninitialised parameter. Raises ValueError for another dtype than float32."""
        if dtype is not torch.float32:
            raise ValueError(f"dtype: got {dtype}, wanted torch.float32: coefficients stay float32 whatever dtype the streams have")
        return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))


class HyperConnection(Float32Parameters):
    r"""One manifold-constrained hyper-connection (arXiv 2512.24880, Eq. 1 and 14-19).

    With r = ||vec(x)|| / sqrt(n dim) and z = phi vec(x), split in n, n and n*n:

        H_pre  = sigmoid(alpha_0 z_pre / r + b_pre) + pre_eps
        H_post = post_mult * sigmoid(alpha_1 z_post / r + b_post)
        H_res  = sinkhorn(alpha_2 z_res / r + b_res)            doubly stochastic
        u      = sum_j H_pre[j] x[j]                            what the layer gets
        y[i]   = sum_j H_res[i,j] x[j] + H_post[i] layer(u)

    Use it apart, ``u, ctx = hc.pre(x)`` and ``x = hc.post(layer(u), ctx)``, or around a layer, ``x = hc(x)``. Where one connection
    follows another, :meth:`cross` does the first one's post and the second one's pre together, which saves reading the streams once:

        u, ctx = hc0.pre(x)
        u, ctx = hc1.cross(layer0(u), ctx)
        x = hc1.post(layer1(u), ctx)

    :func:`mhc.chain` does this for a list of layers.

    Parameters, always float32 (casting the model moves them and leaves their dtype), named and laid out as in Hugging Face's
    ``DeepseekV4HyperConnection``, whose numbers the defaults give: ``fn`` [M, n*dim] is phi, rows H_pre [n], H_post [n], H_res [n*n]
    as (source j, target i), columns stream-major; ``base`` [M] is b; ``scale`` [3] is alpha.

    At the start (:meth:`reset_parameters`) a block is the plain residual x + layer(x) on n equal streams: H_pre = 1/n, H_post =
    post_mult/2 = 1, and H_res within 1.1e-3 of the identity for n = 4 (diagonal logit 8). Identity, not the uniform matrix, because the
    uniform one has rank 1: it would average away, at each boundary, what makes streams differ. Not closer to it, because a logit's gradient
    shrinks with the distance; at 8, differences between streams keep 85% over 120 boundaries (60 blocks). alpha = 0.01 as in the
    paper, and phi ~ N(0, 1/(n dim)), which gives z/r unit variance at any width: the coefficients start within about 1% of the static
    ones yet differ by token and stream, which breaks the symmetry of equal streams.

    Args:
        dim: channels C of a stream.
        n: streams, 1..8.
        layer: module or function from u [..., dim] to f [..., dim], for calling the connection itself; may return a tuple with f first.
        sinkhorn_iters: rounds of column and row normalisation, at least 1.
        norm_eps, pre_eps, sinkhorn_eps: added to mean(x^2), to H_pre, and to each Sinkhorn entry and sum.
        post_mult: range of H_post.
        order: ``columns_first`` (paper, DeepSeek-V4: rows sum to 1 exactly, columns nearly) or ``rows_first``.
        fused: False computes by the five operators of the paper one after the other: 18 instead of 14 passes over [T, dim] per boundary
            forward and more than twice the backward, the same numbers within rounding. For comparison, and for gradients of H_pre itself.
        residual_mixing: False fixes H_res to the identity. ``fn``, ``base`` and ``scale`` keep their shapes, so that a checkpoint fits
            both ways; the entries of H_res then have zero gradients.
        device, dtype: of the parameters; dtype must be float32.

    Raises:
        ValueError: an argument out of range, or x, f or a context of another shape.
        TypeError: parameters replaced by narrower ones, a layer's output that is no tensor, a ``dim``, ``n`` or ``sinkhorn_iters`` that is
            no whole number.
    """

    def __init__(
        self,
        dim: int,
        n: int = 4,
        layer: Callable[..., Any] | None = None,
        *,
        sinkhorn_iters: int = 20,
        norm_eps: float = 1e-6,
        pre_eps: float = 1e-6,
        sinkhorn_eps: float = 1e-6,
        post_mult: float = 2.0,
        order: str = "columns_first",
        residual_mixing: bool = True,
        fused: bool = True,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_sizes(n, dim)
        check_sinkhorn(sinkhorn_iters, order)
        self.dim, self.n, self.layer = int(dim), int(n), layer
        self.sinkhorn_iters, self.order, self.residual_mixing = int(sinkhorn_iters), order, residual_mixing
        self.norm_eps, self.pre_eps, self.sinkhorn_eps, self.post_mult = map(float, (norm_eps, pre_eps, sinkhorn_eps, post_mult))
        self.fused = fused
        M = n * n + 2 * n
        self.fn = self.float32_parameter(M, n * dim, device=device, dtype=dtype)
        self.base = self.float32_parameter(M, device=device, dtype=dtype)
        self.scale = self.float32_parameter(3, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start the class describes."""
        nn.init.normal_(self.fn, std=(self.n * self.dim) ** -0.5)
        nn.init.constant_(self.scale, INIT_ALPHA)
        b_pre, b_post, b_res = self.base.split([self.n, self.n, self.n * self.n])
        nn.init.constant_(b_pre, initial_pre_logit(self.n))
        nn.init.zeros_(b_post)
        b_res.view(self.n, self.n).copy_(INIT_DIAGONAL * torch.eye(self.n, device=b_res.device))

    def _coefficients(self, x_TnC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z, rinv = ops.project(x_TnC, self.fn, self.norm_eps)
        H_pre, H_post, h_res = ops.activate(z, rinv, self.scale, self.base, self.pre_eps, self.post_mult)
        if self.residual_mixing:
            return H_pre, H_post, ops.sinkhorn(h_res, self.sinkhorn_iters, self.sinkhorn_eps, self.order)
        eye = torch.eye(self.n, device=x_TnC.device, dtype=torch.float32)
        return H_pre, H_post, eye.expand(x_TnC.shape[0], self.n, self.n).contiguous()

    def coefficients(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """H_pre [..., n], H_post [..., n] and H_res [..., n, n] (row i makes output stream i), float32, for x [..., n, dim]."""
        lead = x.shape[:-2]
        H_pre, H_post, H_res = self._coefficients(flatten_streams(x, self.n, self.dim))
        return H_pre.reshape(*lead, self.n), H_post.reshape(*lead, self.n), H_res.reshape(*lead, self.n, self.n)

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The operators of :mod:`mhc.ops` that ``pre``, ``cross`` and ``post`` call in a step, each with its options in order."""
        if self.fused:
            options = self._weights()[3:]
            return [("enter", options), ("boundary", options), ("leave", ())]
        sinkhorn = [("sinkhorn", (self.sinkhorn_iters, self.sinkhorn_eps, self.order))] if self.residual_mixing else []
        return [("project", (self.norm_eps,)), ("activate", (self.pre_eps, self.post_mult)), *sinkhorn, ("pre", ()), ("post_res", ())]

    def _weights(self) -> tuple[Any, ...]:
        """phi, alpha, b and the options, as :func:`mhc.ops.enter` takes them."""
        iters = self.sinkhorn_iters if self.residual_mixing else 0
        return self.fn, self.scale, self.base, self.norm_eps, self.pre_eps, self.post_mult, iters, self.sinkhorn_eps, self.order

    def pre(self, x: torch.Tensor) -> tuple[torch.Tensor, Context]:
        """Streams x [..., n, dim] -> layer input u [..., dim] in x's dtype, and what :meth:`post` or :meth:`cross` needs."""
        x_TnC = flatten_streams(x, self.n, self.dim)
        if self.fused:
            u, _, H_post, H_res, _, ticket = ops.enter(x_TnC, *self._weights())
            if not x_TnC.requires_grad:
                ctx = Context(x_TnC, H_post, H_res, ticket)
            elif ticket.requires_grad:
                ctx = Context(x_TnC.detach(), H_post, H_res, ticket)
            else:  # under no_grad, which post() may be outside of
                ctx = Context(x_TnC, H_post, H_res)
        else:
            H_pre, H_post, H_res = self._coefficients(x_TnC)
            u = ops.pre(x_TnC, H_pre)
            ctx = Context(x_TnC, H_post, H_res)
        return u if x.dim() == 3 else u.view(*x.shape[:-2], self.dim), ctx

    def _check_context(self, ctx: Context) -> None:
        if not isinstance(ctx, Context):
            raise TypeError(f"ctx: got {type(ctx).__name__}, wanted the Context of pre() or cross(), after the layer's output")
        _, n, dim = ctx.x.shape
        if n != self.n or dim != self.dim:
            raise ValueError(f"ctx: got streams of shape {tuple(ctx.x.shape)}, wanted [T, n={self.n}, dim={self.dim}]")

    def _layer_output(self, f: torch.Tensor, ctx: Context) -> torch.Tensor:
        """f [..., dim] -> [T, dim] in the streams' dtype. Raises TypeError or ValueError naming f."""
        T = ctx.x.shape[0]
        if not isinstance(f, torch.Tensor):
            raise TypeError(f"f: got {type(f).__name__}, wanted the layer's output, a tensor [..., dim={self.dim}]")
        if f.shape == (T, self.dim) and f.dtype is ctx.x.dtype:
            return f
        if f.shape[-1:] != (self.dim,) or f.numel() != T * self.dim:
            raise ValueError(f"f: got shape {tuple(f.shape)}, wanted [..., dim={self.dim}] with {T} tokens, as u from pre()")
        return f.reshape(T, self.dim).to(ctx.x.dtype)

    def post(self, f: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Layer output f [..., dim] -> new streams [..., n, dim]. f is cast to the streams' dtype first, as under autocast."""
        self._check_context(ctx)
        f_TC = self._layer_output(f, ctx)
        if ctx.ticket is None:
            y = ops.post_res(ctx.x, f_TC, ctx.H_post, ctx.H_res)
        else:
            y = ops.leave(ctx.x, f_TC, ctx.H_post, ctx.H_res, ctx.ticket)
        return y if f.dim() == 2 else y.view(*f.shape[:-1], self.n, self.dim)

    def cross(self, f: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, Context]:
        """``self.pre(previous.post(f, ctx))`` in one: from the previous layer's output f [..., dim] to this one's input u [..., dim].

        ctx is the previous connection's, of as many streams and channels as this one; its other options may differ. The streams in
        between are ``x`` of the Context that comes back, without gradient.
        """
        self._check_context(ctx)
        ticket = ctx.ticket
        if self.fused and ticket is None and not torch.is_grad_enabled():
            ticket = new_ticket(ctx.x)  # a previous pre() under no_grad gives none; here too nothing gets a gradient
        if not self.fused or ticket is None:
            return self.pre(self.post(f, ctx))
        f_TC = self._layer_output(f, ctx)
        y, u, _, H_post, H_res, _, ticket = ops.boundary(ctx.x, f_TC, ctx.H_post, ctx.H_res, ticket, *self._weights())
        return u if f.dim() == 2 else u.view(f.shape), Context(y.detach(), H_post, H_res, ticket)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """``post(layer(u, *args, **kwargs), ctx)``. A layer that returns a tuple gives a tuple, its first element replaced."""
        if self.layer is None:
            raise TypeError("layer: got None, wanted HyperConnection(dim, n, layer) to call it; else use pre() and post()")
        u, ctx = self.pre(x)
        out = self.layer(u, *args, **kwargs)
        if isinstance(out, tuple):
            return (self.post(out[0], ctx), *out[1:])
        return self.post(out, ctx)

    def extra_repr(self) -> str:
        mixing = f"sinkhorn_iters={self.sinkhorn_iters}, order={self.order}" if self.residual_mixing else "residual_mixing=False"
        return f"dim={self.dim}, n={self.n}, {mixing}" + ("" if self.fused else ", fused=False")


def expand(h: torch.Tensor, n: int) -> torch.Tensor:
    """n equal streams from an embedding: [..., C] -> contiguous [..., n, C]. Raises ValueError, TypeError for another dtype."""
    if h.dtype not in STREAM_DTYPES:
        hint = "" if h.is_floating_point() else ": an embedding, not the ids of its tokens"
        raise TypeError(f"h: got {h.dtype}, wanted {' or '.join(map(str, STREAM_DTYPES))}{hint}")
    check_sizes(n, h.shape[-1] if h.dim() else 0)
    return h.unsqueeze(-2).expand(*h.shape[:-1], n, h.shape[-1]).contiguous()
