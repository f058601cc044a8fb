"""One measurement of ``mhc-tune check`` as plain data, and its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """What is timed: one kernel at ``tokens`` x ``n`` x ``C`` with a configuration, or its PyTorch reference."""

    kernel: str
    n: int
    C: int
    dtype: str
    tokens: int
    config: dict[str, Any]
    impl: str = "tilelang"


def label(name: str, n: int, C: int, dtype: str, tokens: int) -> str:
    """``pre n=4 C=2560 bfloat16 T=8192``, without what the program has not: entries that differ in nothing else are one measurement."""
    from tl_kernels import KERNELS

    kernel = KERNELS[name]
    parts = [f"n={n}", f"C={C}" if kernel.has_channels else "", dtype if kernel.has_streams else ""]
    return " ".join([name, *filter(None, parts), *([f"T={tokens}"] if kernel.has_tokens else [])])
