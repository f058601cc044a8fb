"""The model that step_time.py times: transformer blocks with the layer shape of the paper's 27B model, one stack for every residual.

The shape (defaults of :class:`Shape`), of which only C = 2560 and n = 4 could be looked up (configs/workloads.yaml; stored pages about
arXiv 2512.24880 end before its table of hyper-parameters). From memory, not checked against the paper: 30 layers, 32 heads (multi-head
latent attention), 6 active of 72 routed experts and 2 shared ones, SwiGLU, 1536 wide each, sequences of 4096 tokens, about 4.1 B active
parameters. What stands in for it here:

- the active experts: one dense SwiGLU as wide as all eight, 8 x 1536 = 12288. Router and grouped products are left out.
- latent attention: ordinary multi-head attention, 32 heads of 128, causal, without rotary positions.

That makes 136 M parameters a layer, so 4.09 B for 30 layers, without embedding and head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhc
from tl_kernels import reference

VARIANTS = ("plain", "mhc", "formulas")

# Shapes: B sequences, S tokens, n streams, C channels; layers see u [B,S,C], streams are x [B,S,n,C].


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    dim: int = 2560
    heads: int = 32
    head_dim: int = 128
    ffn: int = 12288
    batch: int = 2
    seq: int = 4096
    n: int = 4

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def flops(self) -> float:
        """Of the layers' matrix products, forward and backward: 6 a weight and token; causal attention has half of its S x S products."""
        inner = self.heads * self.head_dim
        weights = 4 * self.dim * inner + 3 * self.dim * self.ffn
        return self.layers * (6.0 * weights * self.tokens + 6.0 * self.batch * self.seq**2 * inner)


class Attention(nn.Module):
    """Pre-norm causal self-attention."""

    def __init__(self, shape: Shape, **kind: Any) -> None:
        super().__init__()
        self.heads = shape.heads
        inner = shape.heads * shape.head_dim
        self.norm = nn.RMSNorm(shape.dim, eps=1e-6, **kind)
        self.qkv = nn.Linear(shape.dim, 3 * inner, bias=False, **kind)
        self.out = nn.Linear(inner, shape.dim, bias=False, **kind)

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(u)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(a.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Pre-norm gated MLP."""

    def __init__(self, shape: Shape, **kind: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.dim, eps=1e-6, **kind)
        self.up = nn.Linear(shape.dim, 2 * shape.ffn, bias=False, **kind)
        self.down = nn.Linear(shape.ffn, shape.dim, bias=False, **kind)

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.up(self.norm(u)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """The residual x + f with the methods of mhc.HyperConnection; there is one stream, without a dimension of its own."""

    n = None

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def cross(self, f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.pre(x + f)

    def post(self, f: Tensor, x: Tensor) -> Tensor:
        return x + f


class Formulas(nn.Module):
    """What mhc.HyperConnection computes, with its parameters and its defaults, by the formulas of tl_kernels/reference.py and autograd.

    ``compiled``: each of its two functions is under torch.compile; not for use inside another torch.compile.
    """

    def __init__(self, connection: mhc.HyperConnection, compiled: bool = False) -> None:
        super().__init__()
        self.connection, self.n = connection, connection.n
        self._pre, self._post = (_compiled(f) if compiled else f for f in (formulas_pre, formulas_post))

    def pre(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, H_post, H_res = self._pre(x, self.connection.fn, self.connection.scale, self.connection.base)
        return u, (x, H_post, H_res)

    def cross(self, f: Tensor, ctx: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.pre(self.post(f, ctx))

    def post(self, f: Tensor, ctx: tuple[Tensor, ...]) -> Tensor:
        return self._post(f, *ctx)


def formulas_pre(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, H_post and H_res; computed in float32, u rounded to the streams' dtype, as the kernels do."""
    wide = x.flatten(0, -3).float()
    H_pre, H_post, h_res = reference.activate(*reference.project(wide, fn), scale, base)
    u = reference.pre(wide, H_pre).to(x.dtype)
    return u.view(*x.shape[:-2], x.shape[-1]), H_post, reference.sinkhorn(h_res)


def formulas_post(f: Tensor, x: Tensor, H_post: Tensor, H_res: Tensor) -> Tensor:
    y = reference.post_res(x.flatten(0, -3).float(), f.flatten(0, -2).float(), H_post, H_res)
    return y.to(x.dtype).view(x.shape)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compilation for all layers, which are alike."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def enter(first: Any, h: Tensor) -> tuple[Tensor, Any]:
    """Into the streams."""
    return first.pre(h if first.n is None else mhc.expand(h, first.n))


def block(attention: nn.Module, ffn: nn.Module, middle: Any, following: Any, u: Tensor, ctx: Any) -> tuple[Tensor, Any]:
    """From the input of a block's attention to that of the next block's."""
    u, ctx = middle.cross(attention(u), ctx)
    return following.cross(ffn(u), ctx)


def leave(attention: nn.Module, ffn: nn.Module, middle: Any, u: Tensor, ctx: Any) -> Tensor:
    """The last block, and out of the streams."""
    u, ctx = middle.cross(attention(u), ctx)
    x = middle.post(ffn(u), ctx)
    return x if middle.n is None else mhc.reduce_mean(x)


class Stack:
    """Layers and as many connections, chained as by mhc.chain. ``compiled``: every block function is under torch.compile."""

    def __init__(self, layers: Sequence[nn.Module], connections: Sequence[nn.Module], compiled: bool = False) -> None:
        self.layers, self.connections = list(layers), list(connections)
        self.enter, self.block, self.leave = (_compiled(f) if compiled else f for f in (enter, block, leave))

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in (*self.layers, *self.connections):
            yield from module.parameters()

    def __call__(self, h: Tensor) -> Tensor:
        """h [B,S,C] -> [B,S,C]."""
        u, ctx = self.enter(self.connections[0], h)
        for k in range(0, len(self.layers) - 2, 2):
            u, ctx = self.block(*self.layers[k : k + 2], *self.connections[k + 1 : k + 3], u, ctx)
        return self.leave(*self.layers[-2:], self.connections[-1], u, ctx)


class Model:
    """The layers in bfloat16 and the hyper-connections in float32, of which every stack is made: all share the same weights.

    What a layer adds is about as large as what it gets, or it would hide how it is added. ``trained``: coefficients far from their start,
    where H_res is nearly the identity and would hide a mistake in it. No time depends on either.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0, trained: bool = True) -> None:
        torch.manual_seed(seed)
        kind = {"device": device, "dtype": torch.bfloat16}
        self.layers = [m for _ in range(shape.layers) for m in (Attention(shape, **kind), SwiGLU(shape, **kind))]
        for weight in (p for m in self.layers for p in m.parameters() if p.ndim == 2):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.connections = [mhc.HyperConnection(shape.dim, shape.n, device=device) for _ in self.layers]
        if trained:
            for connection in self.connections:
                with torch.no_grad():
                    connection.base.normal_()
                    connection.scale.copy_(torch.tensor([0.8, 1.0, 1.2]))
        self.inputs = torch.randn(shape.batch, shape.seq, shape.dim, **kind).requires_grad_()

    def stack(self, variant: str, compiled: bool = False, compiled_formulas: bool = False) -> Stack:
        """``compiled``: whole blocks; ``compiled_formulas``: in ``formulas``, the connections alone."""
        make = {
            "plain": lambda _: Plain(),
            "mhc": lambda connection: connection,
            "formulas": lambda connection: Formulas(connection, compiled_formulas and not compiled),
        }[variant]
        return Stack(self.layers, [make(connection) for connection in self.connections], compiled)

    def parameters(self) -> dict[str, int]:
        """How many parameters the layers have, and the hyper-connections."""
        groups = {"layers": self.layers, "connections": self.connections}
        return {name: sum(p.numel() for m in modules for p in m.parameters()) for name, modules in groups.items()}


def step(stack: Stack, inputs: Tensor) -> Tensor:
    """One training step without an optimizer: gradients set to None, forward, mean of squares as the loss, backward. Returns the loss."""
    clear_gradients(stack, inputs)
    loss = stack(inputs).float().square().mean()
    loss.backward()
    return loss.detach()


def clear_gradients(stack: Stack, inputs: Tensor) -> None:
    inputs.grad = None
    for p in stack.parameters():
        p.grad = None
