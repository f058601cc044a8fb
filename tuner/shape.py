"""A shape as it is typed and shown: ``8192x4x2560``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tl_kernels.spec import MAX_N
from tuner.errors import TuneError


@dataclass(frozen=True)
class Shape:
    """T tokens, n streams, C channels."""

    T: int
    n: int
    C: int

    def __str__(self) -> str:
        return f"{self.T}x{self.n}x{self.C}"


def parse_shape(text: str, what: str = "shape") -> Shape:
    """``8192x4x2560``. Raises :class:`TuneError`."""
    match = re.fullmatch(r"([0-9]{1,12})x([0-9]{1,12})x([0-9]{1,12})", text.strip().lower())
    if match is None:
        raise TuneError(f"{what}: got {text!r}, wanted TxnxC such as 8192x4x2560")
    T, n, C = (int(number) for number in match.groups())
    if T < 1 or C < 1 or not 1 <= n <= MAX_N:
        raise TuneError(f"{what}: got {text!r}, wanted T and C of at least 1 and n in 1..{MAX_N}")
    return Shape(T, n, C)
