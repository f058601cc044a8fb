"""A stack of connections and layers, each boundary between two of them in one operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

from mhc.module import HyperConnection

Block = HyperConnection | tuple[HyperConnection, Callable[[torch.Tensor], Any]]


def _split(block: Block) -> tuple[HyperConnection, Callable[[torch.Tensor], Any]]:
    pair = (block, block.layer) if isinstance(block, HyperConnection) else block
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], HyperConnection)):
        raise TypeError(f"block: got {type(block).__name__}, wanted a HyperConnection or a pair (HyperConnection, layer)")
    connection, layer = pair
    if layer is None:
        raise TypeError("layer: got None, wanted HyperConnection(dim, n, layer) or a pair (connection, layer)")
    return connection, layer


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def chain(x: torch.Tensor, blocks: Iterable[Block]) -> torch.Tensor:
    """Streams x [..., n, dim] through every block: ``for hc in blocks: x = hc(x)``, but with :meth:`HyperConnection.cross` in between.

    A block is a HyperConnection with its layer or a pair (connection, layer); of a layer that returns a tuple the first element counts.
    A layer that takes more than u goes in as a function of u. Connections with ``fused=False`` take their own path inside.
    Without blocks x comes back.

    With FSDP2 shard connection and layer apart, for the layer is called here, outside the connection's forward, and register the
    connection's methods: ``register_fsdp_forward_method(connection, method)`` for "pre", "cross" and "post".

    To recompute activations sublayer by sublayer, write the loop and checkpoint its body, whose inputs u and ctx then are what is kept:

        u, ctx = connections[0].pre(x)
        for layer, following in zip(layers[:-1], connections[1:]):
            body = lambda u, ctx, layer=layer, following=following: following.cross(layer(u), ctx)
            u, ctx = torch.utils.checkpoint.checkpoint(body, u, ctx, use_reentrant=False)
        x = connections[-1].post(layers[-1](u), ctx)
    """
    pairs = [_split(block) for block in blocks]
    if not pairs:
        return x
    u, ctx = pairs[0][0].pre(x)
    for (_, layer), (following, _) in pairwise(pairs):
        u, ctx = following.cross(_first(layer(u)), ctx)
    last, layer = pairs[-1]
    return last.post(_first(layer(u)), ctx)
