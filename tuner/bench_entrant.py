"""One entrant of the benchmark, in this process: checked against float64, then its calls, ready to be sampled.

An entrant is a rival at one shape and depth: ``layers`` boundaries one after the other, each with parameters of its own. Every time is
per boundary. Imports what tuner/bench_case.py imports, so that it runs in a rival's own environment.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tuner.bench_case import GRADIENTS, PASSES, TOLERANCE, Case, expected, finite_error
from tuner.bench_launches import count_launches
from tuner.bench_rivals import Boundary, Rival, rival
from tuner.errors import one_line
from tuner.timing import Call, Clock, Timed, median, wall_us

#: A sample of eager calls is about this long, and at least and at most so many calls.
EAGER_US, EAGER_CALLS = 10000.0, (2, 16)
#: Samples of the host's time, and the time after which those taken are enough.
HOST_SAMPLES, HOST_US = 21, 500e3


@dataclass(frozen=True)
class Spec:
    """What an entrant is. ``chained``: the stack as one model would chain it. ``decode``: forward only.

    ``timed``: False only builds it and runs it once, to compile what it needs or to count its launches.
    """

    rival: str
    T: int
    n: int
    C: int
    dtype: str
    seed: int = 0
    layers: int = 1
    chained: bool = False
    decode: bool = False
    timed: bool = True

    def cases(self, device: torch.device) -> list[Case]:
        """The boundaries it is made of; the same numbers for every rival."""
        return _cases(self.T, self.n, self.C, self.dtype, device, self.seed, self.layers)


def empty_row(spec: Spec) -> dict[str, Any]:
    """What the report gets of an entrant, nothing known yet; times are filled in by the rounds."""
    row: dict[str, Any] = {
        "rival": spec.rival,
        "label": spec.rival,
        "note": "",
        "T": spec.T,
        "layers": spec.layers,
        "chained": spec.chained,
    }
    return row | {"agrees": False, "errors": {}, "times": {}, "peak_mib": None, "failures": [], "missing": None}


@functools.lru_cache(maxsize=2)
def _cases(T: int, n: int, C: int, dtype: str, device: torch.device, seed: int, layers: int) -> list[Case]:
    return Case.stack(T, n, C, getattr(torch, dtype), device, seed, layers)


@functools.lru_cache(maxsize=1)
def _answer(
    T: int, n: int, C: int, dtype: str, device: torch.device, seed: int, layers: int, order: str, rounds_fn: bool
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    return expected(_cases(T, n, C, dtype, device, seed, layers), order, rounds_fn)


def release(everything: bool = True) -> None:
    """Give back the memory of answers (and of inputs) between the stages of a run."""
    _answer.cache_clear()
    if everything:
        _cases.cache_clear()
        _pool.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Stack:
    """A rival's boundaries as calls. ``record`` is the forward with autograd's graph; None where there is no backward."""

    forward: Callable[[], Tensor]
    record: Callable[[], Tensor] | None
    forward_backward: Callable[[], tuple[Tensor, ...]] | None
    #: Results of forward_backward by GRADIENTS, per layer; dx stands in every layer.
    canonical: Callable[[tuple[Tensor, ...]], list[dict[str, Tensor]]]


def build(of: Rival, cases: list[Case], chained: bool) -> Stack:
    """The calls of a stack. Raises what making the rival raises."""
    if chained:
        return _chain(of, cases)
    boundaries = [of.make(case) for case in cases]
    if len(boundaries) == 1:
        (b,) = boundaries
        dy = cases[0].dy
        has = bool(b.leaves)
        return Stack(
            b.forward_only, b.forward if has else None, (lambda: b.forward_backward(dy)) if has else None, lambda g: [b.canonical(g)]
        )
    return _stacked(boundaries)


def _stacked(boundaries: Sequence[Boundary]) -> Stack:
    first = boundaries[0]
    if any(b.step is None for b in boundaries) or first.start is None:
        raise NotImplementedError("it cannot be stacked: its Boundary has no step and start")
    steps = [b.step for b in boundaries if b.step is not None]
    start, end = first.start, first.end
    parameters = [b.leaves[1:] for b in boundaries]

    def forward() -> Tensor:
        y = start
        for step in steps:
            y = step(y)
        return y

    def backward() -> tuple[Tensor, ...]:
        y = forward()
        grads = torch.autograd.grad(y, (first.leaves[0], *(p for layer in parameters for p in layer)), end)
        return (y.detach(), *grads)

    def canonical(grads: tuple[Tensor, ...]) -> list[dict[str, Tensor]]:
        dx, *rest = grads
        layers = []
        for boundary, leaves in zip(boundaries, parameters, strict=True):
            mine, rest = rest[: len(leaves)], rest[len(leaves) :]
            layers.append(boundary.canonical((dx, *mine)))
        return layers

    def forward_only() -> Tensor:
        with torch.no_grad():
            return forward()

    has = bool(first.leaves) and end is not None
    return Stack(forward_only, forward if has else None, backward if has else None, canonical)


def _chain(of: Rival, cases: list[Case]) -> Stack:
    if of.chain is None:
        raise NotImplementedError(f"{of.label} has no way to chain sublayers")
    chain = of.chain(cases)
    x = cases[0].x.detach().requires_grad_()
    dy = cases[0].dy
    leaves = (x, *(p for layer in chain.leaves for p in layer))

    def forward_backward() -> tuple[Tensor, ...]:
        y = chain.forward(x)
        grads = torch.autograd.grad(y, leaves, dy)
        return (y.detach(), *grads)

    def canonical(grads: tuple[Tensor, ...]) -> list[dict[str, Tensor]]:
        dx, *rest = grads
        per = len(GRADIENTS) - 1
        return [dict(zip(GRADIENTS, (dx, *rest[k : k + per]), strict=True)) for k in range(0, len(rest), per)]

    def forward_only() -> Tensor:
        with torch.no_grad():
            return chain.forward(x)

    return Stack(forward_only, lambda: chain.forward(x), forward_backward, canonical)


def capture(call: Callable[[], Any]) -> tuple[Call, Any]:
    """CUDA graph of a call whose inputs stay where they are: its replay, and the tensors a replay fills.

    All graphs of a stage share one memory pool: they are replayed one at a time and their results are not kept, and the sum of what every
    pass of every rival needs would not fit.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=_pool()[0]):
            out = call()
    except BaseException:
        # PyTorch goes on recording to the pool of a capture that failed; earlier graphs keep theirs alive
        _pool.cache_clear()
        raise
    return graph.replay, out


@functools.cache
def _pool() -> tuple[Any, object]:
    """The pool of this stage's graphs, and a graph that keeps it alive: a pool that lost its last graph must not be used again."""
    handle, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    number = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=handle):
        number.add_(1)
    return handle, (graph, number)


def peak_mib(call: Call, device: torch.device) -> float | None:
    """Memory a call needs on top of what was allocated before it, in MiB; None on the CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _in_order(y: Tensor, like: Tensor) -> Tensor:
    """y as [T,n,C]; stacked, a rival may keep the streams innermost."""
    return y if y.shape == like.shape else y.transpose(1, 2)


class Entrant:
    """A rival on its way through the check and the timing: ``row`` for the report, ``calls`` to time by ``<pass>_<graph|eager>``.

    Never raises: what failed is in the row, ``missing`` where the rival is not installed.
    """

    def __init__(self, spec: Spec, clock: Clock, of: Rival | None = None) -> None:
        self.spec, self.clock = spec, clock
        self.calls: dict[str, Timed] = {}
        self.row = empty_row(spec)
        self._stack: Stack | None = None
        self._costly = self._sampled = False
        try:
            of = of or rival(spec.rival)
            self._costly = of.costly
            self.row |= {"label": of.label, "note": of.note}
            cases = spec.cases(clock.device)
            self.row["inputs"] = cases[0].fingerprint()
            self._stack = build(of, cases, spec.chained)
            if not spec.decode and self._stack.forward_backward is None:
                self.row["note"] = "; ".join(filter(None, (of.note, "forward only")))
            if spec.timed:
                self._check(of, self._stack, cases[0])
                self._prepare(self._stack)
            else:
                for call in self._passes(self._stack).values():
                    call()
        except ImportError as error:
            self.row["missing"] = one_line(error)
        except Exception as error:  # a rival that fails is a row, not the end of the run
            self.row["failures"].append(one_line(error))

    @property
    def keys(self) -> list[str]:
        return list(self.calls)

    def _passes(self, stack: Stack) -> dict[str, Callable[[], Any]]:
        passes: dict[str, Callable[[], Any]] = {"forward": stack.forward}
        if not self.spec.decode and stack.forward_backward is not None:
            passes["forward_backward"] = stack.forward_backward
        return passes

    def _check(self, of: Rival, stack: Stack, case: Case) -> None:
        s = self.spec
        want_y, want_dx, layers = _answer(s.T, s.n, s.C, s.dtype, self.clock.device, s.seed, s.layers, of.order, of.rounds_fn)
        if s.decode or stack.forward_backward is None:
            errors = {"y": finite_error(_in_order(stack.forward(), case.x), want_y)}
        else:
            y, *grads = stack.forward_backward()
            errors = {"y": finite_error(_in_order(y, case.x), want_y)}
            for k, (got, want) in enumerate(zip(stack.canonical(tuple(grads)), layers, strict=True)):
                if k == 0:
                    errors["x"] = finite_error(got["x"], want_dx)
                for name, value in want.items():  # of several layers the worst
                    errors[name] = max(errors.get(name, 0.0), finite_error(got[name], value))
        self.row["errors"] = errors
        # In a stack every implementation stores y, u and their gradients between boundaries in the streams' dtype. The few numbers that sum
        # a whole layer's gradients carry those roundings: 5e-2 measured in the three of `scale`, Liger's as ours.
        wide = 1 if s.layers == 1 else 10
        limits = {name: TOLERANCE[s.dtype] * (1 if name in ("y", "x") else wide) for name in errors}
        self.row["agrees"] = all(errors[name] <= limit for name, limit in limits.items())

    def _prepare(self, stack: Stack) -> None:
        device = self.clock.device
        cuda = device.type == "cuda"
        passes = self._passes(stack)
        for name, call in passes.items():
            call()
            self.calls[f"{name}_eager"] = Timed(call, EAGER_CALLS[0] if cuda else 1, eager=True)
        self.row["peak_mib"] = peak_mib(passes[PASSES[1] if PASSES[1] in passes else PASSES[0]], device)
        for name, call in passes.items() if cuda else ():
            try:
                eager = call()
                replay, out = capture(call)
                replay()
                torch.cuda.synchronize()
                _same_numbers(out, eager, TOLERANCE[self.spec.dtype])
                del out, eager
                self.calls[f"{name}_graph"] = Timed(replay)
            except Exception as error:
                torch.cuda.synchronize()
                self.row["failures"].append(f"{name}, graph capture: {one_line(error)}")

    def sample(self) -> dict[str, float]:
        """One sample of every call, in us a boundary. The first one also decides how many eager calls the others have."""
        (samples,) = self.clock.interleaved(list(self.calls.values()), 1)
        if not self._sampled and self.clock.device.type == "cuda":
            for (key, timed), us in zip(list(self.calls.items()), samples, strict=True):
                if timed.eager:
                    least, most = EAGER_CALLS
                    self.calls[key] = replace(timed, count=max(least, min(most, int(EAGER_US / us))))
        self._sampled = True
        return {key: us / self.spec.layers for key, us in zip(self.calls, samples, strict=True)}

    def host(self) -> dict[str, float]:
        """The host's time for one boundary, in us, nothing waited for: ``forward`` without autograd, ``record`` with, and both passes."""
        if self._stack is None:
            return {}
        found = {"forward": self._host(self._stack.forward)}
        # a costly rival would compile its backward once more for this
        if self._stack.record is not None and self._stack.forward_backward is not None and not self._costly:
            found |= {"record": self._host(self._stack.record), "forward_backward": self._host(self._stack.forward_backward)}
        return found

    def _host(self, call: Callable[[], object]) -> float:
        call()
        taken: list[float] = []
        while len(taken) < HOST_SAMPLES and sum(taken) * self.spec.layers < HOST_US:
            if self.clock.device.type == "cuda":
                torch.cuda.synchronize(self.clock.device)
            taken.append(wall_us(call) / self.spec.layers)
        return median(taken)

    def launches(self) -> dict[str, Any]:
        """What each pass launches, by kernel; see tuner/bench_launches.py."""
        if self._stack is None or self.clock.device.type != "cuda":
            return {}
        return {name: count_launches(call) for name, call in self._passes(self._stack).items()}

    def close(self) -> None:
        self.calls.clear()
        self._stack = None


def _same_numbers(replayed: Any, eager: Any, tolerance: float) -> None:
    """Raise RuntimeError where a graph's replay gives something else than the call it captured."""
    pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (replayed, eager)), strict=True)
    worst = max(finite_error(a.detach(), b.detach().double()) for a, b in pairs)
    if worst > tolerance:
        raise RuntimeError(f"the replay differs from the eager call by {worst:.1e}")
