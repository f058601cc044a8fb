"""Devices and backends the tests of ``mhc`` run on, and inputs for every operator.

What the tests of the fused operators need on the CPU target is compiled ahead of them, on all cores, where they run in one process.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mhc
from mhc.signatures import FUSED_KERNELS, PAIRS, SIGNATURES
from tests.mhc.profiles import machine, said

__all__ = ["machine", "said"]  # fixtures

CASES = (
    pytest.param(("cpu", "reference"), id="cpu-reference"),
    pytest.param(("cpu", "tilelang"), id="cpu-tilelang"),
    pytest.param(("cuda", "tilelang"), id="cuda-tilelang", marks=pytest.mark.gpu),
)


_POOL = ThreadPoolExecutor(os.cpu_count())


def _compile(signature, dtype, iters):
    from tl_kernels import KERNELS
    from tl_kernels.launch import get_launcher

    options = {**signature.options, "iters": iters} if "iters" in signature.options else signature.options
    kernel, p = KERNELS[signature.name], signature.problem({"n": 4, "C": 32}, dtype, options)
    get_launcher(kernel, p, kernel.default(p), "cpu")


def pytest_collection_finish(session):
    from tl_kernels import KERNELS, cpu

    fused = any(item.path.name in ("test_chain.py", "test_fused.py") and "cpu-tilelang" in item.name for item in session.items)
    # under pytest-xdist every worker would compile everything: there tests compile side by side anyway
    if session.config.option.collectonly or os.environ.get("PYTEST_XDIST_WORKER") or not fused or not cpu.available():
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for signature in (*FUSED_KERNELS.values(), SIGNATURES["pre"], SIGNATURES["post_res"]):
            streams = any(t.dtype == "stream" for t in (*signature.inputs, *signature.outputs))
            if KERNELS[signature.name].shortcut:
                continue
            if streams or dtype is torch.float32:
                for iters in (20, 5) if "iters" in signature.options else (0,):
                    # a failure is the test's to report: it asks again
                    _POOL.submit(_compile, signature, dtype, iters)


def pytest_sessionfinish():
    _POOL.shutdown(wait=False, cancel_futures=True)


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


def make_inputs(name, T=5, n=4, C=32, dtype=torch.float32, device="cpu", seed=0):
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
