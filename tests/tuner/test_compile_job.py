"""tuner/compile_job.py: what cannot launch is known before nvcc, what spills after it, and both from the cache too."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tl_kernels import KERNELS
from tuner import compile_job as module
from tuner.compile_job import (
    MOST_STACK,
    _before_nvcc,
    _WillNotRun,
    cached_shared_bytes,
    compile_job,
    lowered_shared_bytes,
    refuse,
    shared_limit,
)
from tuner.errors import one_line


def test_limits_by_architecture():
    assert shared_limit("sm_90a") == 227 * 1024
    assert shared_limit("sm_89") == 99 * 1024
    assert shared_limit("cpu") is None
    assert shared_limit("sm_77") is None


@pytest.fixture
def no_codegen(monkeypatch):
    """What would generate code, and then call nvcc, fails."""

    def generate(device_mod, context):
        raise AssertionError("code is being generated")

    monkeypatch.setattr(importlib.import_module("tilelang.engine.lower"), "device_codegen", generate)


@pytest.mark.usefixtures("no_codegen")
def test_too_much_shared_memory_is_refused_before_nvcc_and_what_fits_goes_on():
    kernel = KERNELS["project"]
    p = kernel.problem(4, 1000)
    result = compile_job("project", p, {**kernel.default(p), "block_T": 128, "block_K": 256, "stages": 4}, "sm_90a")
    assert result["rung"] == "shared"
    assert result["shared_bytes"] > shared_limit("sm_90a") == 232448
    assert result["infeasible"] == f"{result['shared_bytes']} bytes of shared memory, a block has 232448"
    assert result["threads"] == 256, "the knob's 128, and as many that TileLang adds to fetch"
    assert result["registers"] is result["stack"] is None
    kernel = KERNELS["activate"]
    p = kernel.problem(1, 8)
    with pytest.raises(AssertionError, match="code is being generated"):
        compile_job("activate", p, kernel.default(p), "sm_90a")


def device_mod(threads, shared=0):
    """A lowered program with that many threads, in two dimensions."""
    extents = {"blockIdx.x": object(), "threadIdx.x": threads // 2, "threadIdx.y": 2}
    return SimpleNamespace(functions={"k": SimpleNamespace(attrs={"thread_extent": extents, "dyn_shared_memory_buf": shared})})


@pytest.mark.usefixtures("no_codegen")
def test_too_many_threads_are_refused_before_nvcc():
    with _before_nvcc("sm_90a") as lowered:
        lower = importlib.import_module("tilelang.engine.lower")
        with pytest.raises(_WillNotRun, match="2048 threads, a block has 1024") as e:
            lower.device_codegen(device_mod(2048), None)
        assert (e.value.rung, e.value.threads) == ("launch", 2048)
        with pytest.raises(AssertionError, match="code is being generated"):
            lower.device_codegen(device_mod(1024, shared=64), None)
    assert lowered == [(64, 1024)]


@pytest.mark.parametrize(
    ("resources", "rung"),
    [
        ({"shared": 232448, "threads": 1024, "registers": 64, "stack": MOST_STACK}, None),
        ({"shared": 232449}, "shared"),
        ({"threads": 1025}, "launch"),
        ({"threads": 512, "registers": 128}, None),
        ({"threads": 512, "registers": 129}, "launch"),
        ({"stack": MOST_STACK + 1}, "spills"),
    ],
)
def test_each_rung_by_its_limit(resources, rung):
    asked = {"shared": None, "threads": None, "registers": None, "stack": None, **resources}
    found = refuse("sm_90a", **asked)
    assert (found and found[0]) == rung
    if rung:
        assert str(next(iter(resources.values()))) in found[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_resources_of_a_program_compiled_and_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    kernel = KERNELS["sum_parts"]
    p = kernel.problem(1, 48)
    cfg = {**kernel.default(p), "block_K": 128, "threads": 64}
    assert cfg != kernel.default(p)
    first = compile_job("sum_parts", p, cfg, "sm_90a")
    (folder,) = {path.parent for path in tmp_path.rglob("executable.so")}
    assert first["infeasible"] is first["rung"] is None
    assert first["shared_bytes"] == lowered_shared_bytes(kernel, kernel.build(p, cfg), cfg, "sm_90a") == cached_shared_bytes(folder) > 0
    assert first["threads"] == 64
    assert 16 <= first["registers"] <= 255
    assert first["stack"] == 0

    from tilelang.cache.kernel_cache import KernelCache

    for cache in KernelCache.__subclasses__():
        cache._memory_cache.clear()
    monkeypatch.setattr(importlib.import_module("tilelang.engine.lower"), "device_codegen", None)
    again = compile_job("sum_parts", p, cfg, "sm_90a")
    assert {**again, "seconds": 0} == {**first, "seconds": 0}

    monkeypatch.setattr(module, "MOST_STACK", -1)
    spilled = compile_job("sum_parts", p, cfg, "sm_90a")
    assert (spilled["rung"], spilled["infeasible"]) == ("spills", "0 bytes of stack a thread, more than -1 cannot win")
    monkeypatch.setattr(type(kernel), "default", property(lambda self: lambda p: cfg), raising=False)
    assert compile_job("sum_parts", p, cfg, "sm_90a")["rung"] is None


@pytest.mark.parametrize(
    ("device", "host", "found"),
    [
        ("extern __shared__ uchar a[];", "x.v_int64) = ((int64_t)64);\nx.v_int64) = ((int64_t)512);\nif (k_kernel_packed == NULL) {", 512),
        ("extern __shared__ uchar a[];", "x.v_int64) = ((int64_t)n);\nif (k_kernel_packed == NULL) {", None),
        ("__shared__ uchar a[8];", "", 0),
    ],
)
def test_shared_memory_from_the_host_code(tmp_path: Path, device, host, found):
    (tmp_path / "device_kernel.cu").write_text(device)
    (tmp_path / "host_kernel.cu").write_text(host)
    assert cached_shared_bytes(tmp_path) == found


@pytest.mark.slow
def test_a_configuration_compiles_for_the_cpu():
    kernel = KERNELS["pre"]
    p = kernel.problem(2, 64)
    result = compile_job("pre", p, kernel.default(p), "cpu")
    assert result["seconds"] > 0
    assert {k for k, v in result.items() if v is None} == {"shared_bytes", "threads", "registers", "stack", "infeasible", "rung"}


def test_what_the_cpus_compiler_says_is_the_reason(tmp_path, monkeypatch, capfd):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++: fatal error: Killed signal terminated program cc1plus' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr("tilelang.contrib.cc.get_cplus_compiler", lambda: str(compiler))
    kernel = KERNELS["sinkhorn"]
    p = kernel.problem(1, 8, iters=7)  # nobody has compiled it
    with pytest.raises(RuntimeError) as e:
        compile_job("sinkhorn", p, kernel.default(p), "cpu")
    assert one_line(e.value) == "RuntimeError: g++: fatal error: Killed signal terminated program cc1plus"
    assert "Killed signal" in capfd.readouterr().err, "the log has all of it"
