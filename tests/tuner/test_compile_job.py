"""tuner/compile_job.py: shared memory is known before nvcc."""

import pytest

from tl_kernels import KERNELS
from tuner.compile_job import _shared_bound, compile_job, lowered_shared_bytes, shared_limit


def test_limits_by_architecture():
    assert shared_limit("sm_90a") == 227 * 1024
    assert shared_limit("sm_89") == 99 * 1024
    assert shared_limit("cpu") is None
    assert shared_limit("sm_77") is None


def test_too_much_shared_memory_is_refused_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    kernel = KERNELS["project"]
    p = kernel.problem(4, 1280)
    cfg = {**kernel.default(p), "block_T": 128, "block_K": 256, "stages": 6}
    result = compile_job("project", p, cfg, "sm_90a")
    assert result["shared_bytes"] > shared_limit("sm_90a")
    assert "bytes of shared memory" in result["infeasible"]


def test_the_quick_bound_is_never_below_the_exact_size():
    kernel = KERNELS["project"]
    p = kernel.problem(4, 1280)
    for stages in (0, 2):
        cfg = {**kernel.default(p), "stages": stages}
        func = kernel.build(p, cfg)
        assert _shared_bound(func, cfg) >= lowered_shared_bytes(kernel, func, cfg, "sm_90a") > 0


@pytest.mark.slow
def test_a_configuration_compiles_for_the_cpu():
    kernel = KERNELS["pre"]
    p = kernel.problem(2, 64)
    assert compile_job("pre", p, kernel.default(p), "cpu")["infeasible"] is None
