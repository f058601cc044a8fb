"""Random inputs of realistic scale for any kernel, by tensor name. Legend in tl_kernels/spec.py."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from tl_kernels.spec import Kernel, Problem, Tensor

Shape = tuple[int, ...]
Make = Callable[[torch.Generator, Shape, torch.device, Problem], torch.Tensor]


def _normal(generator: torch.Generator, shape: Shape, device: torch.device, p: Problem) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=device)


def _uniform(low: float, high: float) -> Make:
    def make(generator: torch.Generator, shape: Shape, device: torch.device, p: Problem) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    return make


def _phi(generator: torch.Generator, shape: Shape, device: torch.device, p: Problem) -> torch.Tensor:
    # keeps z = phi x at the scale of the logits a trained model has
    return torch.randn(shape, generator=generator, device=device) / p.K**0.5


def _projections(generator: torch.Generator, shape: Shape, device: torch.device, p: Problem) -> torch.Tensor:
    # the last row is positive: a mean of squares in parts, 1/r in zs
    value = torch.randn(shape, generator=generator, device=device)
    value[..., -1, :] = torch.rand(value[..., -1, :].shape, generator=generator, device=device) * 1.5 + 0.5
    return value


#: Streams, logits, biases and every gradient are N(0, 1); what is named here is not.
SPECIAL: dict[str, Make] = {
    "phi": _phi,
    "rinv": _uniform(0.5, 2.0),
    "H_pre": _uniform(0.01, 0.99),
    "H_post": _uniform(0.02, 1.98),
    "H_res": _uniform(0.01, 0.99),
    "alpha": _uniform(0.5, 1.5),
    "parts": _projections,
    "zs": _projections,
}


#: Leading size of inputs that another program wrote once per split, by its name: dphi's and the projections' parts, and dab's, of which the
#: coefficient kernels write as many as they have blocks. Timed with three, ``sum_parts`` was tuned to take 17 us of a boundary instead of 3
#: (H200, C = 7168; results/notes.md, 2026-11-30, fifth session).
SPLITS = {"S": 3, "S2": 256}


def splits_of(tensor: Tensor) -> int:
    """Of an input; 1 where nobody wrote it in splits."""
    return SPLITS.get(tensor.dims.split()[0], 1)


def make_inputs(kernel: Kernel, p: Problem, T: int, seed: int, device: str | torch.device = "cpu") -> tuple[torch.Tensor, ...]:
    """Contiguous inputs in the spec's order. The same (kernel, p, T, seed, device type) gives the same values."""
    device = torch.device(device)
    values: dict[str, torch.Tensor] = {}
    for tensor in kernel.inputs:
        generator = torch.Generator(device=device)
        generator.manual_seed(seed * 1_000_003 + zlib.crc32(f"{tensor.name}|{p.n}|{p.C}|{T}".encode()))
        value = SPECIAL.get(tensor.name, _normal)(generator, tensor.shape(p, T, splits_of(tensor)), device, p)
        values[tensor.name] = value.to(getattr(torch, tensor.dtype_name(p))).contiguous()
    if "rinv" in values and "x" in values:
        # a backward may use either rinv or x: they must belong together
        eps = dict(p.options).get("norm_eps", 1e-6)
        values["rinv"] = torch.rsqrt(values["x"].flatten(1).float().square().mean(-1) + eps)
    return tuple(values[tensor.name] for tensor in kernel.inputs)
