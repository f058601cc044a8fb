"""One check for every program: against its float64 reference, outputs poisoned, token counts ragged, two runs bitwise equal."""

import pytest
import torch

from tests.conftest import here
from tl_kernels import KERNELS, launch
from tl_kernels.cpu import available, compile_cpu
from tl_kernels.launch import device_arch, get_launcher
from tuner import gate
from tuner.gate import Case, reference_fp64
from tuner.inputs import make_inputs

TOKENS = (1, 37, 131)
DTYPES = ("bfloat16", "float16", "float32")
#: n of one register or many, every dtype, C even and odd, smaller and larger than a block. Those with C = 32 are programs of tests/mhc too.
SOME = ((1, 100, "bfloat16"), (2, 77, "float32"), (3, 130, "float16"), (4, 1280, "bfloat16"), (4, 32, "float32"), (7, 520, "bfloat16"))
SOME += ((8, 72, "float32"),)
#: The same with one case for what two share: programs that take five seconds to compile.
FEW = tuple(case for case in SOME if case[1] != 32)
EVERY = tuple((n, C, dtype) for n in range(1, 9) for C in ((64, 1280) if n % 2 else (100, 77)) for dtype in DTYPES)
#: Programs that see neither C nor the stream dtype.
COEFFICIENTS = tuple((n, 64, "bfloat16") for n in range(1, 9))
FEW_COEFFICIENTS = tuple(case for case in COEFFICIENTS if case[0] in (1, 2, 4, 7, 8))


def problems(cases=SOME, gpu_cases=EVERY):
    """Parametrize over (device, n, C, dtype): few on the CPU, where each costs a compile on CI, all on a GPU."""
    params = [pytest.param("cpu", *c, id=f"cpu-n{c[0]}-C{c[1]}-{c[2]}") for c in cases]
    params += [pytest.param("cuda", *c, id=f"cuda-n{c[0]}-C{c[1]}-{c[2]}", marks=pytest.mark.gpu) for c in gpu_cases]
    return pytest.mark.parametrize(("device", "n", "C", "dtype"), params)


def launcher(name, device, n, C, dtype="bfloat16", cfg=None, **options):
    if device == "cpu" and not available():
        pytest.skip("no C++ compiler for the CPU target")
    kernel = KERNELS[name]
    p = kernel.problem(n, C, dtype, **options)
    return get_launcher(kernel, p, cfg or kernel.default(p), device_arch(torch.device(device)))


def check(name, device, n, C, dtype="bfloat16", tokens=TOKENS, cfg=None, **options):
    """Raise where any output of any token count is wrong, unwritten or not repeatable; T = 0 gives empty outputs and zero sums."""
    run = launcher(name, device, n, C, dtype, cfg, **options)
    for seed, T in enumerate(tokens):
        inputs = make_inputs(run.kernel, run.p, T, seed, device)
        gate.check(run, Case(T, inputs, reference_fp64(run.kernel, run.p, inputs)))
    if not any("T" in tensor.dims.split() for tensor in run.kernel.inputs):
        return  # a second stage sees no tokens
    for tensor, out in zip(run.kernel.outputs, run(*make_inputs(run.kernel, run.p, 0, 0, device)), strict=True):
        assert out.shape == tensor.shape(run.p, 0, run.cfg.get("splits", 1)), tensor.name
        assert not out.any(), tensor.name


def check_order(monkeypatch, kernel, p, cfg, order, T):
    """On the CPU one thread plays all roles of a block: another order must not matter, or two roles race. Twice, with the scratch the first
    call left.
    """
    ordered = here(lambda *_: compile_cpu(kernel.build(p, cfg), order=order), lambda *_: None)
    monkeypatch.setattr(launch, "_ready", ordered)
    run = launch.Launcher(kernel, p, cfg, "cpu")
    inputs = make_inputs(kernel, p, T, 0)
    for _ in range(2):
        gate.check(run, Case(T, inputs, reference_fp64(kernel, p, inputs)))


def check_scratch(run, tokens):
    """Many launches of many lengths: the tags flip at every use of a place, whatever a launch before left: a wrong one shows as a wrong
    number or as a hang.
    """
    inputs = {T: make_inputs(run.kernel, run.p, T, T, "cuda") for T in tokens}
    first = {T: run(*inputs[T]) for T in inputs}
    for _ in range(20):
        for T in inputs:
            for a, b in zip(first[T], run(*inputs[T]), strict=True):
                assert torch.equal(a, b), T


def check_graphs(run, T=300):
    """Two graphs captured on the same stream, replayed on two, with eager launches between."""
    inputs = make_inputs(run.kernel, run.p, T, 0, "cuda")
    want = run(*inputs)
    graphs, outs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([run(*inputs) for _ in range(3)])
        graphs.append(graph)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = run(*inputs)
    torch.cuda.synchronize()
    for out in (*outs[0], *outs[1], eager):
        for a, b in zip(want, out, strict=True):
            assert torch.equal(a, b)
