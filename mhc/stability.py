"""How far the residual mixing is from what the paper promises: doubly stochastic matrices, and a signal that neither explodes nor dies."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sum_errors(H_res: torch.Tensor) -> tuple[float, float]:
    """Largest distance from 1 of a row sum and of a column sum of H_res [..., n, n]; 0, 0 for no matrices."""
    if H_res.numel() == 0:
        return 0.0, 0.0
    H = H_res.double()
    return (H.sum(-1) - 1).abs().max().item(), (H.sum(-2) - 1).abs().max().item()


def composite_gain(H_res: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Amax gain of the residual path through consecutive layers (arXiv 2512.24880, section 3.1): forward and backward.

    With P = H_res[L-1] ... H_res[0], the forward gain is the largest absolute row sum of P, the backward gain its largest absolute column
    sum, each the largest over tokens. Both are 1 for doubly stochastic matrices.

    Args:
        H_res: one tensor [..., n, n] a layer, first layer first, all of the same shape.

    Raises:
        ValueError: no layers, or shapes that differ.
    """
    shapes = [tuple(H.shape) for H in H_res]
    if len(set(shapes)) != 1 or len(shapes[0]) < 2 or shapes[0][-1] != shapes[0][-2]:
        raise ValueError(f"H_res: got shapes {shapes}, wanted one [..., n, n] a layer, all the same")
    product = H_res[0].double()
    for H in H_res[1:]:
        product = H.double() @ product
    if product.numel() == 0:
        return 1.0, 1.0
    return product.abs().sum(-1).max().item(), product.abs().sum(-2).max().item()
