"""tl_kernels/scratch.py: who shares scratch with whom. Streams and captures are stood in for; on a GPU: test_whole.py."""

import importlib
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import here
from tl_kernels import KERNELS, launch
from tl_kernels import scratch as module
from tl_kernels.scratch import scratch
from tuner.inputs import make_inputs

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's present stream and capture, as the test sets them; its memory is the host's."""
    now = SimpleNamespace(stream=1, capture=0)
    zeros = torch.zeros
    monkeypatch.setattr(module, "_capture_id", lambda: lambda stream: now.capture)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: now.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capture != 0)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    return now


def test_a_stream_and_a_capture_have_their_own(gpu):
    mine, other = {}, {}
    eager = scratch(mine, CUDA, 8)
    assert eager.dtype is torch.uint32
    assert not eager.any()
    assert scratch(mine, CUDA, 8) is eager
    assert scratch(other, CUDA, 8) is not eager
    gpu.capture = 5
    captured = scratch(mine, CUDA, 8)
    assert captured is not eager
    assert scratch(mine, CUDA, 8) is captured
    gpu.capture = 6
    assert scratch(mine, CUDA, 8) is not captured
    gpu.capture = 0
    assert scratch(mine, CUDA, 8) is eager
    gpu.stream = 2
    assert scratch(mine, CUDA, 8) is not eager


@pytest.mark.parametrize("capture", [0, 7])
def test_nothing_stays_in_the_pool_of_inductors_graphs(gpu, monkeypatch, capture):
    """Where it warms up and records, a tensor that outlives the call is an error ("not tracked as outputs"), or is written over."""
    mine = {}
    manager = SimpleNamespace(stream=SimpleNamespace(cuda_stream=9))
    trees = SimpleNamespace(get_manager=lambda device, create_if_none_exists: manager)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    monkeypatch.setattr(torch._C, "_is_key_in_tls", lambda key: key == "tree_manager_containers")
    eager = scratch(mine, CUDA, 8)
    gpu.stream, gpu.capture = 9, capture
    first, second = scratch(mine, CUDA, 8), scratch(mine, CUDA, 8)
    assert first is not second
    assert all(t is eager for _, t in mine.values())
    gpu.stream, gpu.capture = 1, 0
    assert scratch(mine, CUDA, 8) is eager


def test_inductor_knows_the_stream_of_its_graphs_by_these_names():
    """scratch.py asks torch's own module."""
    trees = importlib.import_module("torch._inductor.cudagraph_trees")
    assert "tree_manager_containers" in Path(trees.__file__).read_text()
    assert not module._of_cudagraph_trees(0, -1)
    found = []

    def elsewhere():
        found.append(module._of_cudagraph_trees(0, -1))
        found.append(hasattr(trees.local, "tree_manager_containers"))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False, False]  # and asking leaves nothing behind
    assert "self.stream = torch.cuda.Stream()" in Path(trees.__file__).read_text()


def test_a_program_does_not_go_on_from_anothers(monkeypatch):
    """The tuner makes a launcher for every measurement and drops it; the next one may well lie at the same address."""
    seen = []

    def program(*tensors):
        seen.append(int(tensors[-1].long().sum()))
        tensors[-1].fill_(7)

    kernel = KERNELS["project_pre"]
    p = kernel.problem(4, 256)
    monkeypatch.setattr(launch, "_ready", here(lambda *_: program, lambda *_: None))
    for _ in range(3):
        run = launch.Launcher(kernel, p, kernel.default(p), "cpu")
        for _ in range(2):
            run(*make_inputs(kernel, p, 5, 0))
        del run
    assert [s > 0 for s in seen] == [False, True] * 3


def test_threads_of_the_cpu_have_their_own():
    kept, cpu, found = {}, torch.device("cpu"), []
    mine = scratch(kept, cpu, 4)
    thread = threading.Thread(target=lambda: found.append(scratch(kept, cpu, 4)))
    thread.start()
    thread.join()
    assert scratch(kept, cpu, 4) is mine
    assert found[0] is not mine
