"""Converters between checkpoints that mean the same mathematics and store it differently. Each is explicit; none is applied by itself.

Shapes: fn [M, n*dim], base [M], scale [3], rows H_pre [n], H_post [n], H_res [n*n]; M = n*n + 2*n.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tl_kernels.reference import streams

#: Parameters of a HyperConnection and of a HyperHead, here as in transformers.
CONNECTION_NAMES = ("fn", "base", "scale")
HEAD_NAMES = ("hc_fn", "hc_base", "hc_scale")


def _entry(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state:
        raise ValueError(f"state: has no {name!r} among {', '.join(state) or 'nothing'}")
    return state[name]


def transpose_residual(state: Mapping[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """Exchange source and target in the H_res rows of ``fn`` and ``base``: for checkpoints that apply comb untransposed.

    Ours (and DeepSeek-V4's) row 2n + j*n + i weighs source j in target i; theirs row 2n + i*n + j does. The exchange is its own
    inverse. The order of normalisation is not in the state: where such a checkpoint began with a softmax over the last dimension of its
    comb, it normalised over sources, the rows of H_res, so build the module with ``order="rows_first"``.

    Args:
        state: has fn [M, n*dim] and base [M]; other entries are passed through.
        n: streams.

    Raises:
        ValueError: an entry of another shape.
    """
    out = dict(state)
    for name in ("fn", "base"):
        value = _entry(state, name)
        if value.shape[:1] != (n * n + 2 * n,):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {n * n + 2 * n} rows for n={n}")
        pre_post, res = value[: 2 * n], value[2 * n :]
        swapped = res.unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
        out[name] = torch.cat([pre_post, swapped])
    return out


def fold_norm_weight(state: Mapping[str, torch.Tensor], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Absorb the weight of an RMSNorm over vec(x) into ``fn``: phi' = phi diag(weight), since RMSNorm(v) = weight * v / r.

    Args:
        state: has fn [M, n*dim]; other entries are passed through.
        weight: [n*dim], stream-major, or [dim] for one weight shared by the streams.

    Raises:
        ValueError: the weight or fn has another shape.
    """
    fn = _entry(state, "fn")
    rows, wide = fn.shape if fn.dim() == 2 else (0, 0)
    n = streams(rows)
    if n < 1 or n * n + 2 * n != rows or wide % n:
        raise ValueError(f"fn: got shape {tuple(fn.shape)}, wanted [n*n + 2*n, n*dim]")
    if weight.shape not in ((wide,), (wide // n,)):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted [n*dim={wide}] or [dim={wide // n}]")
    return {**state, "fn": fn * weight.to(fn).repeat(wide // len(weight))}


def from_huggingface(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The state of one HyperConnection or HyperHead out of a model's, e.g. with prefix ``model.layers.3.attn_hc`` or ``model.hc_head``.

    Raises:
        ValueError: no entry of that module under the prefix.
    """
    start = f"{prefix}." if prefix else ""
    for names in (CONNECTION_NAMES, HEAD_NAMES):
        if all(start + name in state for name in names):
            return {name: state[start + name] for name in names}
    raise ValueError(
        f"prefix: got {prefix!r}, wanted one with {', '.join(CONNECTION_NAMES)} or {', '.join(HEAD_NAMES)} under it in the state"
    )


def to_huggingface(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The inverse: the entries of one of our modules under Hugging Face's names. A wrapped layer's entries are left out.

    Raises:
        ValueError: the state is of neither module.
    """
    start = f"{prefix}." if prefix else ""
    return {start + name: value for name, value in from_huggingface(state, "").items()}
