"""DeepSeek TileKernels: TileLang kernels, forward and backward. Needs TileLang 0.1.9 to 0.1.11, so an environment of its own,
with libz3 in the same folder of packages.

Its function is ours to the last eps: fn [M,K] float32 with the streams outermost, rows pre, post, comb [source,target], columns first.
Without autograd ``mhc_pre`` takes its fused path; with it, one launch a step. Its backward adds into the gradient of the streams in place,
through an attribute of their storage.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from tuner.bench_case import GRADIENTS, Case
from tuner.bench_rivals import Boundary, Rival
from tuner.rivals._checks import only_four_bf16_streams

NEEDS = "tile-kernels==1.0.0 tilelang==0.1.11 apache-tvm-ffi==0.1.11 z3-solver==4.15.4.0"
BACKWARD = True


def make(case: Case) -> Boundary:
    mhc = importlib.import_module("tile_kernels.modeling.mhc")
    ops = importlib.import_module("tile_kernels.modeling.mhc.ops")
    _, C = only_four_bf16_streams(case, "TileKernels")
    if C % 64:
        raise ValueError(f"TileKernels: got C={C}, wanted a multiple of 64")  # its projection takes 256 columns of K = 4 C at a time
    x, fn, base, scale = (t.detach().requires_grad_() for t in (case.x, case.fn, case.base, case.scale))

    def step(streams: Tensor) -> Tensor:
        wide = streams.unsqueeze(0)  # [sequences, tokens, n, C]
        u, (H_post, H_comb) = mhc.mhc_pre(wide, fn, scale, base, post_mult_value=2.0, sinkhorn_repeat=20)
        return ops.mhc_post(u, wide, H_post, H_comb).squeeze(0)

    def canonical(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(GRADIENTS, grads, strict=True))

    return Boundary(lambda: step(x), (x, fn, base, scale), canonical, step, x, case.dy)


RIVAL = Rival("TileKernels", make, note="tf32 projection")
