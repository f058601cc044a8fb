"""What the rivals of this folder ask of a case."""

from __future__ import annotations

import torch

from tuner.bench_case import Case


def only_four_bf16_streams(case: Case, who: str) -> tuple[int, int]:
    """T and C. Raises ValueError for what none of these rivals does."""
    T, n, C = case.sizes
    if n != 4 or case.x.dtype is not torch.bfloat16:
        raise ValueError(f"{who}: got n={n} and {case.x.dtype}, wanted n=4 and torch.bfloat16")
    return T, C
