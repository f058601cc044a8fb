"""Compiling and calling: one launcher a configuration, other devices, poisoned outputs handed in."""

import ctypes
import os
import platform
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.tl_kernels.checks import launcher
from tl_kernels import KERNELS, launch
from tl_kernels.launch import device_arch, get_launcher
from tuner.inputs import make_inputs


def test_a_configuration_is_compiled_once():
    assert launcher("pre", "cpu", 4, 64) is launcher("pre", "cpu", 4, 64)


def test_threads_that_ask_for_the_same_share_one_compile():
    with ThreadPoolExecutor(4) as pool:
        launchers = list(pool.map(lambda _: launcher("pre", "cpu", 4, 192), range(4)))
    assert len({id(one) for one in launchers}) == 1


def test_cpu_is_a_target():
    assert device_arch(torch.device("cpu")) == "cpu"


def test_outputs_have_the_dtypes_of_the_spec():
    run = launcher("pre_bwd", "cpu", 4, 64)
    dx, dH = run(*make_inputs(run.kernel, run.p, 3, 0))
    assert (dx.dtype, dH.dtype) == (torch.bfloat16, torch.float32)


def test_a_two_stage_sum_is_bitwise_repeatable():
    run = launcher("project_bwd", "cpu", 4, 64)
    inputs = make_inputs(run.kernel, run.p, 300, 0)
    assert torch.equal(run(*inputs)[1], run(*inputs)[1])


@pytest.mark.gpu
def test_launchers_work_in_a_cuda_graph():
    run = launcher("post_res", "cuda", 4, 256)
    inputs = make_inputs(run.kernel, run.p, 64, 0, "cuda")
    (eager,) = run(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = run(*inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["coefficients", "pre", "project"])  # splits, none, and a flat argument
def test_a_bound_call_is_the_call(name):
    run = launcher(name, "cuda", 4, 256)
    inputs = make_inputs(run.kernel, run.p, 64, 0, "cuda")
    bound = run.bind(64)
    assert bound is not run
    for got, want in zip(bound(*inputs), run(*inputs), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


@pytest.mark.gpu
def test_launchers_follow_the_current_stream():
    kernel = KERNELS["pre"]
    p = kernel.problem(4, 256)
    run = get_launcher(kernel, p, kernel.default(p), device_arch(torch.device("cuda")))
    inputs = make_inputs(kernel, p, 4096, 0, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        inputs[0].zero_()
        (u,) = run(*inputs)
    stream.synchronize()
    assert not u.any()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_that_lowering_freed_goes_back_to_the_system(monkeypatch):
    """glibc keeps what lies below a block still in use, however much it is."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    pinned, held = [], []

    def resident():
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    def lowers(*args, **kwargs):
        blocks = [libc.malloc(1000) for _ in range(200_000)]
        for block in blocks:
            ctypes.memset(block, 1, 1000)
        for block in blocks[:-1]:
            libc.free(block)
        pinned.append(blocks[-1])
        held.append(resident())

    kernel = KERNELS["pre"]
    p = kernel.problem(4, 64)
    monkeypatch.setattr("tilelang.compile", lowers)
    launch.compile_kernel(kernel, p, kernel.default(p), "sm_90a")
    assert resident() < held[0] - 100
    libc.free(pinned[0])


def test_ctrl_c_ends_a_wait_after_a_program_was_lowered(monkeypatch, request):
    kernel = KERNELS["pre"]
    p = kernel.problem(4, 64)
    # as TileLang 0.1.15 leaves it
    monkeypatch.setattr("tilelang.compile", lambda *args, **kwargs: signal.siginterrupt(signal.SIGINT, False))
    request.addfinalizer(lambda: signal.siginterrupt(signal.SIGINT, True))
    launch.compile_kernel(kernel, p, kernel.default(p), "sm_90a")
    lock, main = threading.Lock(), threading.main_thread().ident
    lock.acquire()
    end = threading.Timer(20.0, lock.release)
    for timer in (threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)), end):
        timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    end.cancel()
    assert time.monotonic() - start < 10
