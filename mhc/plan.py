"""A call's path to its kernels: arguments checked once per shape, each kernel's configuration looked up once per profile.

An operator is a :class:`~mhc.signatures.Signature`, the kernels it launches and a ``body`` that hands tensors from one to the next.
:func:`implementation` makes a function of the three; what is left to do in a call is one dictionary access and the launches.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from mhc import backend
from mhc.signatures import Signature
from tl_kernels.spec import Problem

Run = Callable[..., tuple[torch.Tensor, ...]]

_MAX_PLANS = 4096


class _Step:
    """One kernel of a checked call."""

    def __init__(self, signature: Signature, problem: Problem, tokens: int, stream: torch.dtype, device: torch.device, mode: str) -> None:
        self.problem, self.tokens, self.device = problem, tokens, device
        dtypes = [stream if t.dtype == "stream" else torch.float32 for t in signature.outputs]
        options = dict(problem.options)
        # the module's function, not a copy of it: tests replace it
        self.reference: Run = lambda *tensors: backend.run_reference(signature.name, tensors, options, dtypes)
        self.may_use_reference = mode == "auto" and device.type == "cpu"
        self.kernel: Any = None
        if backend.serves_tilelang(mode, device):
            from tl_kernels import KERNELS
            from tl_kernels.launch import device_arch

            self.kernel = KERNELS[signature.name]
            self.target = device_arch(device)

    def choose(self) -> Run:
        """What serves this step under the present profile."""
        if self.kernel is None:
            return self.reference
        from tl_kernels.launch import get_launcher

        choice = _profile().choose(self.kernel.name, self.problem, self.tokens, self.device)
        if os.environ.get("MHC_DEBUG") == "1":
            _report(self.kernel.name, self.problem, self.target, str(choice))
        if choice.impl == "reference" and self.may_use_reference:
            return self.reference
        return get_launcher(self.kernel, self.problem, choice.config, self.target).bind(self.tokens)


class _Plan:
    """The steps of a checked call, each bound to what serves it."""

    __slots__ = ("follows_profile", "runs", "steps", "version")

    def __init__(self, steps: list[_Step]) -> None:
        self.steps = steps
        self.follows_profile = any(step.kernel is not None for step in steps)
        self.version: object = None
        self.runs: list[Run] = [] if self.follows_profile else [step.reference for step in steps]

    def ready(self) -> list[Run]:
        """One function for each step; chosen anew where another profile was loaded."""
        if self.follows_profile and self.version is not (version := _profile().version()):
            self.runs = [step.choose() for step in self.steps]
            self.version = version
        return self.runs


@functools.cache
def _profile() -> Any:
    from mhc import profile  # not at the top: it takes a tenth of a second that `import mhc` without a kernel call need not wait for

    return profile


@functools.cache  # once per kernel, problem and choice, not per token count
def _report(name: str, problem: Any, target: str, choice: str) -> None:
    print(f"mhc: {name} n={problem.n} C={problem.C} {problem.dtype} on {target}: {choice}", file=sys.stderr)


def _check(
    signature: Signature, kernels: tuple[Signature, ...], tensors: tuple[torch.Tensor, ...], options: dict[str, Any], mode: str
) -> _Plan:
    size = signature.check(tensors)
    signature.check_options(options)
    anchor = tensors[signature.anchor]
    stream = anchor.dtype
    return _Plan([_Step(k, k.problem(size, stream, options), size["T"], stream, anchor.device, mode) for k in kernels])


def implementation(signature: Signature, kernels: tuple[Signature, ...], body: Callable[..., Any]) -> Callable[..., Any]:
    """The operator ``signature`` on real tensors: ``body(runs, *tensors)`` with a function for each of ``kernels``.

    The tensors are contiguous and checked, tickets left out.
    """
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
            plan = plans[key] = _check(signature, kernels, tensors, given, mode)
        return body(plan.ready(), *[t if (t := args[i]).is_contiguous() else t.contiguous() for i in data])

    return run


def single(signature: Signature) -> Callable[..., Any]:
    """The implementation of one kernel by itself: a tensor, or a tuple where it has several results."""
    if len(signature.outputs) == 1:
        return implementation(signature, (signature,), lambda runs, *tensors: runs[0](*tensors)[0])
    return implementation(signature, (signature,), lambda runs, *tensors: runs[0](*tensors))
