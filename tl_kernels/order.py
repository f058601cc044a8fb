"""Which blocks run beside each other where a block owns a tile of tokens and a split of the columns.

- ``"channels"``: those of one split, all token tiles, before the next split's.
- ``"tokens"``: all splits of a token tile, each a run of columns.
- ``"rows"``: the same, and a split's tiles are spread: the blocks of a token tile walk over its rows together, so that what is read at a
  time lies together in memory.
"""

from collections.abc import Callable
from typing import Any

from tl_kernels.spec import Config

ORDERS = ("channels", "tokens", "rows")


def walk(cfg: Config, columns: int, per: int) -> tuple[Callable[[Any, Any], tuple[Any, Any]], int, int]:
    """For tiles of ``columns``, ``per`` of them a split: ``grid(tokens, splits)`` in the order blocks start in, and back again; from one
    split's first column to the next split's; from one tile of a split to its next.
    """

    def grid(tokens: Any, split: Any) -> tuple[Any, Any]:
        return (tokens, split) if cfg["order"] == "channels" else (split, tokens)

    return grid, (columns if cfg["order"] == "rows" else per * columns), (cfg["splits"] * columns if cfg["order"] == "rows" else columns)
