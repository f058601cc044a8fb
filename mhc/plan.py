"""A call's path to its kernels: arguments checked once per shape, each kernel's configuration looked up once per profile.

An operator is a :class:`~mhc.signatures.Signature` and one design or more: the kernels it launches and a ``body`` that hands tensors from
one to the next. :func:`implementation` makes a function of them; what is left to do in a call is one dictionary access and the launches.
The first design serves everything. A later one is a shortcut, taken where the profile has its kernels at this shape and they are faster.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from mhc import backend, profile
from mhc.signatures import Signature
from tl_kernels.spec import Problem

Run = Callable[..., tuple[torch.Tensor, ...]]
Body = Callable[..., Any]
#: The kernels of a design, and what hands tensors from one to the next.
Design = tuple[tuple[Signature, ...], Body]
#: What ``tl_kernels.launch.get_launcher`` takes.
Program = tuple[Any, Problem, Mapping[str, Any], str]

_MAX_PLANS = 4096
#: Share by which another design must be faster: its kernels' times come from runs of their own, and one launch more is not in them.
MARGIN = 0.01
#: Multiprocessors that a design whose blocks wait for each other leaves to others: NCCL's kernels hold up to 32. Beside four all-reduces
#: three boundaries at C = 7168, 112 such blocks, took 90 ms instead of 2.7 on two H200s (results/notes.md, 2026-11-29).
RESERVED_SMS = 32


def reserved_sms() -> int:
    """``MHC_RESERVED_SMS``, or 32: multiprocessors that other kernels may hold while a boundary runs. Raises ValueError.

    Fewer are right where NCCL is kept to fewer (``NCCL_MAX_CTAS``), 0 where nothing else runs on the GPU.
    """
    value = os.environ.get("MHC_RESERVED_SMS", "").strip()
    if value and not (value.isascii() and value.isdigit() and len(value) < 6):
        raise ValueError(
            f"MHC_RESERVED_SMS: got {value!r}, wanted a number of multiprocessors, 0 or more; {RESERVED_SMS} where it is not set"
        )
    return int(value) if value else RESERVED_SMS


def crowds_out(kernel: Any, p: Any, config: Any, multiprocessors: int) -> str | None:
    """Why no boundary takes a kernel's configuration on a GPU with that many multiprocessors, or None."""
    reserved = reserved_sms()
    why = kernel.crowded(p, config, max(0, multiprocessors - reserved))
    return f"so that {reserved} multiprocessors are left to NCCL (MHC_RESERVED_SMS): {why}" if why else None


class _Step:
    """One kernel of a checked call."""

    def __init__(self, signature: Signature, problem: Problem, tokens: int, stream: torch.dtype, device: torch.device, mode: str) -> None:
        self.name, self.problem, self.tokens, self.device, self.mode = signature.name, problem, tokens, device, mode
        dtypes = [stream if t.dtype == "stream" else torch.float32 for t in signature.outputs]
        options = dict(problem.options)
        # the module's function, not a copy of it: tests replace it
        self.reference: Run = lambda *tensors: backend.run_reference(signature.name, tensors, options, dtypes)
        self.kernel: Any = None
        if backend.serves_tilelang(mode, device):
            from tl_kernels import KERNELS
            from tl_kernels.launch import device_arch

            self.kernel = KERNELS[signature.name]
            self.target = device_arch(device)

    def tuned_us(self) -> float | None:
        """The time the profile has for this step, or None where it was not tuned at this n, C and T, give or take."""
        tuned = profile.choose(self.kernel.name, self.problem, self.tokens, self.device).tuned if self.kernel else None
        if tuned is None or tuned.n != self.problem.n or (self.kernel.has_channels and tuned.C != self.problem.C):
            return None
        if self.device.type == "cuda" and self.kernel.resident:
            from tl_kernels.launch import multiprocessors

            if crowds_out(self.kernel, self.problem, tuned.config, multiprocessors(self.device)):
                return None
        return tuned.time_us

    def program(self) -> Program | None:
        """What serves this step under the present profile; None where the reference does."""
        if self.kernel is None:
            return None
        if reason := self.kernel.unserved(self.problem):
            raise ValueError(f"mhc.{self.name}: {reason}")
        choice = profile.choose(self.kernel.name, self.problem, self.tokens, self.device)
        program = backend.program_serves(self.mode, self.device, self.kernel, self.problem, choice.impl, choice.config)
        if os.environ.get("MHC_DEBUG") == "1":
            serves = replace(choice, impl="tilelang" if program else "reference")
            _report(self.kernel.name, self.problem, self.target, str(serves))
        return (self.kernel, self.problem, choice.config, self.target) if program else None

    def choose(self) -> Run:
        """:meth:`program`, ready to run."""
        program = self.program()
        if program is None:
            return self.reference
        from tl_kernels.launch import get_launcher

        return get_launcher(*program).bind(self.tokens)


class _Plan:
    """The designs of a checked call; the steps of the fastest, each bound to what serves it."""

    __slots__ = ("designs", "follows_profile", "serves", "version")

    def __init__(self, designs: list[tuple[list[_Step], Body]]) -> None:
        steps, body = designs[0]
        self.designs = designs
        self.follows_profile = any(step.kernel is not None for step in steps)
        self.version: object = None
        self.serves: tuple[Body, list[Run]] = (body, [] if self.follows_profile else [step.reference for step in steps])

    def ready(self) -> tuple[Body, list[Run]]:
        """The body of a design and one function for each of its steps; chosen anew where another profile was loaded."""
        if self.follows_profile and self.version is not (version := profile.version()):
            steps, body = _fastest(self.designs)
            self.serves = body, [step.choose() for step in steps]
            self.version = version
        return self.serves


def _fastest(designs: list[tuple[list[_Step], Body]]) -> tuple[list[_Step], Body]:
    """The first design, unless the profile has times that speak for another one. Kernels that both run do not count."""
    best = designs[0]
    for design in designs[1:]:
        mine, its = ([s for s in a[0] if s.name not in {t.name for t in b[0]}] for a, b in ((best, design), (design, best)))
        if any(step.kernel is None or step.kernel.unserved(step.problem) for step in its):
            continue
        takes, would_take = [s.tuned_us() for s in mine], [s.tuned_us() for s in its]
        if None not in would_take and (None in takes or sum(would_take) < (1 - MARGIN) * sum(takes)):  # type: ignore[arg-type]
            best = design
    return best


@functools.cache  # once per kernel, problem and choice, not per token count
def _report(name: str, problem: Any, target: str, choice: str) -> None:
    print(f"mhc: {name} n={problem.n} C={problem.C} {problem.dtype} on {target}: {choice}", file=sys.stderr)


def _copy(t: torch.Tensor) -> torch.Tensor:
    """As kernels read it, 16 bytes at a time: parameters that lie one behind the other in a flat buffer begin anywhere."""
    return t.clone(memory_format=torch.contiguous_format)


def _check(
    signature: Signature, designs: tuple[Design, ...], tensors: tuple[torch.Tensor, ...], options: dict[str, Any], mode: str
) -> _Plan:
    size = signature.check(tensors)
    signature.check_options(options)
    anchor = tensors[signature.anchor]
    stream = anchor.dtype
    return _Plan(
        [
            ([_Step(k, k.problem(size, stream, options), size["T"], stream, anchor.device, mode) for k in kernels], body)
            for kernels, body in designs
        ]
    )


_IMPLEMENTED: dict[str, tuple[Signature, tuple[Design, ...]]] = {}


def programs(name: str, tensors: tuple[torch.Tensor, ...], options: dict[str, Any]) -> list[Program]:
    """What a call of an operator with such tensors, of which nothing but shape, dtype and device counts, would run. Raises as that does."""
    signature, designs = _IMPLEMENTED[name]
    steps, _ = _fastest(_check(signature, designs, tensors, options, backend.current()).designs)
    return [program for step in steps if (program := step.program()) is not None]


def implementation(signature: Signature, *designs: Design) -> Callable[..., Any]:
    """The operator ``signature`` on real tensors: ``body(runs, *tensors)`` with a function for each kernel of a design.

    The tensors are contiguous, begin at a multiple of 16 bytes and are checked, tickets left out.
    """
    _IMPLEMENTED[signature.name] = signature, designs
    plans: dict[Any, _Plan] = {}
    count = len(signature.inputs)
    data = [i for i, t in enumerate(signature.inputs) if t.name not in signature.tickets]
    names, defaults = tuple(signature.options), tuple(signature.options.values())

    def run(*args: Any) -> Any:
        tensors, options = args[:count], args[count:]
        mode = backend.current()
        key = (mode, options, *[(t.shape, t.dtype, t.device) for t in tensors])
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= _MAX_PLANS:  # many token counts: start over, the launchers stay cached
                plans.clear()
            # torch's dispatcher leaves out trailing options that equal their default
            given = dict(zip(names, (*options, *defaults[len(options) :]), strict=True))
            plan = plans[key] = _check(signature, designs, tensors, given, mode)
        body, runs = plan.ready()
        return body(runs, *[t if (t := args[i]).is_contiguous() and not t.data_ptr() & 15 else _copy(t) for i in data])

    return run


def single(signature: Signature) -> Callable[..., Any]:
    """The implementation of one kernel by itself: a tensor, or a tuple where it has several results."""
    if len(signature.outputs) == 1:
        return implementation(signature, ((signature,), lambda runs, *tensors: runs[0](*tensors)[0]))
    return implementation(signature, ((signature,), lambda runs, *tensors: runs[0](*tensors)))
