"""The way out of the streams: [..., n, dim] -> [..., dim], learned as in DeepSeek-V4, or a plain mean or sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mhc import ops
from mhc.module import INIT_ALPHA, Float32Parameters, check_sizes, flatten_streams, initial_pre_logit


class HyperHead(Float32Parameters):
    """Learned collapse: h = sum_j H[j] x[j] with H = sigmoid(scale * (hc_fn vec(x)) / r + base) + eps.

    Parameters, always float32, as in Hugging Face's ``DeepseekV4HyperHead``: ``hc_fn`` [n, n*dim], ``hc_base`` [n], ``hc_scale`` [1].
    It starts as the mean: H = 1/n within about 1%.

    Args:
        dim: channels C of a stream.
        n: streams, 1..8.
        norm_eps, eps: added to mean(x^2) and to H.
        device, dtype: of the parameters; dtype must be float32.
    """

    def __init__(
        self, dim: int, n: int = 4, *, norm_eps: float = 1e-6, eps: float = 1e-6, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        check_sizes(n, dim)
        self.dim, self.n, self.norm_eps, self.eps = int(dim), int(n), float(norm_eps), float(eps)
        self.hc_fn = self.float32_parameter(n, n * dim, device=device, dtype=dtype)
        self.hc_base = self.float32_parameter(n, device=device, dtype=dtype)
        self.hc_scale = self.float32_parameter(1, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start the class describes."""
        nn.init.normal_(self.hc_fn, std=(self.n * self.dim) ** -0.5)
        nn.init.constant_(self.hc_base, initial_pre_logit(self.n))
        nn.init.constant_(self.hc_scale, INIT_ALPHA)

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The operators of :mod:`mhc.ops` that a call makes, each with its options in order."""
        return [("project", (self.norm_eps,)), ("activate", (self.eps,)), ("pre", ())]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Streams x [..., n, dim] -> [..., dim] in x's dtype. Raises ValueError for another shape."""
        x_TnC = flatten_streams(x, self.n, self.dim)
        # the head's n rows are the H_pre rows of a boundary's M: zeros for the others let it use the same kernels
        rest = self.n * self.n + self.n
        z, rinv = ops.project(x_TnC, nn.functional.pad(self.hc_fn, (0, 0, 0, rest)), self.norm_eps)
        H, _, _ = ops.activate(z, rinv, nn.functional.pad(self.hc_scale, (0, 2)), nn.functional.pad(self.hc_base, (0, rest)), self.eps)
        return ops.pre(x_TnC, H).view(*x.shape[:-2], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n={self.n}"


def reduce_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean of the streams: [..., n, C] -> [..., C], accumulated in float32, in x's dtype."""
    return x.mean(-2, dtype=torch.float32).to(x.dtype)


def reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of the streams (Hyper-Connections, arXiv 2409.19606): [..., n, C] -> [..., C], accumulated in float32, in x's dtype."""
    return x.sum(-2, dtype=torch.float32).to(x.dtype)
