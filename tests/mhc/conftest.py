"""Devices and backends the tests of ``mhc`` run on, and inputs for every operator."""

import pytest
import torch

import mhc
from mhc.signatures import PAIRS, SIGNATURES

CASES = (
    pytest.param(("cpu", "reference"), id="cpu-reference"),
    pytest.param(("cpu", "tilelang"), id="cpu-tilelang"),
    pytest.param(("cuda", "tilelang"), id="cuda-tilelang", marks=pytest.mark.gpu),
)


def _enter(device, backend):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (device, backend) == ("cpu", "tilelang"):
        from tl_kernels import cpu

        if not cpu.available():
            pytest.skip("no C++ compiler for the CPU target")
    return mhc.use_backend(backend)


@pytest.fixture(params=CASES)
def device(request):
    """A device, with one backend forced on it."""
    name, backend = request.param
    with _enter(name, backend):
        yield torch.device(name)


@pytest.fixture
def reference_backend():
    """The PyTorch reference: for tests of what does not depend on the kernels."""
    with mhc.use_backend("reference"):
        yield


def make_inputs(name, T=5, n=4, C=64, dtype=torch.float32, device="cpu", seed=0):
    """Random arguments of an operator, in its order; norms and saved results are such as a forward would have made."""
    generator = torch.Generator().manual_seed(seed)
    size = {"T": T, "n": n, "C": C, "M": n * n + 2 * n, "K": n * C}
    args = []
    for t in SIGNATURES[name].inputs:
        shape = [size[d] if d in size else int(d) for d in t.dims.split()]
        value = torch.randn(shape, generator=generator)
        if t.name == "phi":
            value = value / size["K"] ** 0.5
        elif t.name == "rinv":
            value = value.abs() + 0.5
        args.append(value.to(device, dtype if t.dtype == "stream" else torch.float32))
    if name == "project_bwd":  # its rinv belongs to its x
        args[4] = torch.rsqrt(args[2].float().flatten(1).square().mean(-1) + 1e-6)
    return args


FORWARDS = tuple(PAIRS)
OPERATORS = tuple(SIGNATURES)
