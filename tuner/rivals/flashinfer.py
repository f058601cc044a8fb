"""FlashInfer's mHC kernels (CUDA, compiled when first used) behind DeepGEMM's projection, as SGLang serves DeepSeek-V4. Forward only.

FlashInfer takes z and the sum of squares from elsewhere; ``tf32_hc_prenorm_gemm`` gives both in one pass over the streams, split over K
where there are few tokens. The function is ours: fn [M,K] float32, rows pre, post, comb [source,target], columns first, every eps 1e-6.

A wheel of DeepGEMM reads PyTorch's tensors at the offsets of the PyTorch it was compiled with and does not ask which one it meets.
0.1.5.post1 is SGLang's choice for PyTorch 2.11. Later ones (0.1.5.post3, 0.2.1) are laid out for 2.13 and fail under 2.11 with
«dim == 2 or dim == 3», whatever the operands.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import torch
from torch import Tensor

from tuner.bench_case import Case
from tuner.bench_rivals import Boundary, Rival
from tuner.rivals._checks import only_four_bf16_streams

NEEDS = "flashinfer-python==0.7.2.post1 sgl-deep-gemm==0.1.5.post1 apache-tvm-ffi==0.1.11"
BACKWARD = False
PACKAGE = "flashinfer"
#: Tokens of one block of the projection.
BLOCK = 64


def kernels() -> types.ModuleType:
    """``flashinfer.mhc`` alone: importing all of FlashInfer takes packages that mHC does not. Raises ImportError where it is not there."""
    name = f"{PACKAGE}.mhc"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no {PACKAGE}; pip install --no-deps {NEEDS}")
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = list(found.submodule_search_locations)
        sys.modules[PACKAGE] = package
    return importlib.import_module(name)


def splits(tokens: int, multiprocessors: int) -> int:
    """Of 1, 2, 4, 8, 16 the most that still fit the GPU at once, as SGLang splits the projection."""
    blocks = -(-tokens // BLOCK)
    return max([s for s in (1, 2, 4, 8, 16) if s * blocks <= multiprocessors], default=1)


def make(case: Case) -> Boundary:
    mhc = kernels()
    deep_gemm = importlib.import_module("deep_gemm")
    T, _ = only_four_bf16_streams(case, "FlashInfer")
    fn, base, scale = case.fn, case.base, case.scale
    M, K = fn.shape
    S = splits(T, torch.cuda.get_device_properties(case.x.device).multi_processor_count)
    partial = (S, T) if S > 1 else (T,)  # for one split FlashInfer wants no dimension of splits; DeepGEMM takes either

    def step(streams: Tensor) -> Tensor:
        z = streams.new_empty((*partial, M), dtype=torch.float32)
        squares = streams.new_empty(partial, dtype=torch.float32)
        deep_gemm.tf32_hc_prenorm_gemm(streams.view(T, K), fn, z, squares, num_splits=S if S > 1 else None)
        H_post, H_comb, u = mhc.mhc_pre_big_fuse(
            z, squares, streams, scale, base, K, mhc_post_mult_value=2.0, sinkhorn_repeat=20, num_splits=S
        )
        return mhc.mhc_post(u, streams, H_post, H_comb)

    return Boundary(lambda: step(case.x), (), lambda grads: {}, step, case.x)


RIVAL = Rival("FlashInfer + DeepGEMM", make, note="tf32 projection")
