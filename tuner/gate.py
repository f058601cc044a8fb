"""The correctness gate: no configuration's time counts before its numbers do.

Outputs start as NaN between two guards, token counts are ragged, and every output is compared with the kernel's reference in float64 on
the same inputs. A second run must be bitwise equal to the first, and after both the guards and the inputs must be as they were. The
program gets copies of the inputs: one that writes into them cannot spoil those that the next is judged and timed on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tl_kernels.spec import Kernel, Problem, Tensor

#: Ragged on purpose: one token, and a count that no tile divides.
RAGGED = (1, 37)

#: Relative Frobenius error allowed per output dtype. A result rounded once to a 16-bit dtype errs by 0.42 unit roundoffs rms (1.7e-3 in
#: bf16, 2.1e-4 in fp16), so these limits leave a factor of two and still refuse a second rounding of a summand. A float32 result that is
#: a sum over K or T in float32, in any order and with phi split hi + lo in 16 bits, errs by 1e-7 to 5e-6; TF32 or a lost term by 3e-4 up.
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5}
TOLERANCE_COEFFICIENTS = 2e-5

#: Every byte of outputs and guards before a run: a NaN in each format, and not the one that arithmetic makes.
POISON = 0xFF
#: Bytes of a guard: a row of its output, because a wrong row is the likeliest fault, within these limits, in whole steps of what torch's
#: allocator aligns to, so that programs find the outputs as aligned as they are in use.
GUARD = (1 << 10, 1 << 20)
ALIGN = 512

#: Bytes of float64 working set one chunk of the reference may take.
CHUNK_BYTES = 2 << 30


class Runnable(Protocol):
    """What the gate needs of a :class:`tl_kernels.launch.Launcher`."""

    kernel: Kernel
    p: Problem

    def empty_outputs(self, T: int, device: torch.device) -> list[torch.Tensor]: ...

    def __call__(self, *inputs: torch.Tensor, out: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]: ...


class GateError(Exception):
    """This configuration gives wrong numbers; the message says which output and by how much."""


def tolerance(tensor: Tensor, p: Problem) -> float:
    """Largest relative Frobenius error allowed for one output."""
    return TOLERANCE[p.dtype] if tensor.dtype == "stream" else TOLERANCE_COEFFICIENTS


@dataclass(frozen=True)
class Case:
    """Inputs of one token count and their float64 answer."""

    T: int
    inputs: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.inputs, *self.expected))


def reference_fp64(kernel: Kernel, p: Problem, inputs: Sequence[torch.Tensor], chunk_bytes: int = CHUNK_BYTES) -> tuple[torch.Tensor, ...]:
    """The kernel's reference in float64, in chunks of tokens: results with a T are joined, those without are sums over tokens."""
    T = next((v.shape[d] for t, v in zip(kernel.inputs, inputs, strict=True) if (d := t.token_dim) is not None), 1)
    # every tensor with a T, at most four times wider in float64, and as much again three times for what autograd keeps
    per_token = 16 * sum(t.nbytes(p, 1) for t in (*kernel.inputs, *kernel.outputs) if t.token_dim is not None) or 1
    rows = max(1, min(T, chunk_bytes // per_token))
    at = [t.token_dim for t in kernel.inputs]
    parts = []
    for start in range(0, T, rows):
        count = min(rows, T - start)
        chunk = [(v if d is None else v.narrow(d, start, count)).double() for v, d in zip(inputs, at, strict=True)]
        if start:  # sums that another program began count once
            chunk = [torch.zeros_like(v) if t.split and t.token_dim is None else v for t, v in zip(kernel.inputs, chunk, strict=True)]
        parts.append(kernel.reference(*chunk, **dict(p.options)))
    results = []
    for i, tensor in enumerate(kernel.outputs):
        column = [part[i] for part in parts]
        d = tensor.token_dim
        results.append(torch.stack(column).sum(0) if d is None else torch.cat(column, d))
    return tuple(results)


def relative_error(got: torch.Tensor, expected: torch.Tensor, rows: int = 1 << 12) -> float:
    """||got - expected|| / ||expected|| in float64, in slices so that no second full-size copy is made. NaN and inf stay visible."""
    difference = torch.zeros((), dtype=torch.float64, device=expected.device)
    size = torch.zeros_like(difference)
    for g, e in zip(torch.atleast_1d(got).split(rows), torch.atleast_1d(expected).split(rows), strict=True):
        difference += (g.double() - e).square().sum()
        size += e.square().sum()
    return float((difference / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


def _guarded(template: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A poisoned tensor like ``template``, the guard before it and the guard behind it (bytes)."""
    itemsize = template.element_size()
    row = math.prod(template.shape[1:]) * itemsize
    guard, size = -(-min(max(row, GUARD[0]), GUARD[1]) // ALIGN) * ALIGN, template.numel() * itemsize
    memory = torch.full((guard + size + guard,), POISON, dtype=torch.uint8, device=template.device)
    out = memory[guard : guard + size].view(template.dtype).view(template.shape)
    return out, memory[:guard], memory[guard + size :]


def _run(launcher: Runnable, case: Case) -> tuple[torch.Tensor, ...]:
    """Results of one run on copies of the inputs. Raises :class:`GateError` where anything but the outputs was written."""
    kernel, inputs = launcher.kernel, [t.clone() for t in case.inputs]
    guarded = [_guarded(t) for t in launcher.empty_outputs(case.T, case.inputs[0].device)]
    results = launcher(*inputs, out=[out for out, _, _ in guarded])
    for tensor, (_, *guards) in zip(kernel.outputs, guarded, strict=True):
        for guard, where in zip(guards, ("before its start", "past its end"), strict=True):
            if not bool((guard == POISON).all()):
                raise GateError(f"{tensor.name}: written {where} at T={case.T}")
    for tensor, was, now in zip(kernel.inputs, case.inputs, inputs, strict=True):
        if not torch.equal(was, now):
            raise GateError(f"{tensor.name}: an input, changed at T={case.T}")
    return results


def check(launcher: Runnable, case: Case) -> dict[str, float]:
    """Relative error per output for one case. Raises :class:`GateError` when one is over its tolerance or not repeatable."""
    kernel, p = launcher.kernel, launcher.p
    results = _run(launcher, case)
    errors = {}
    by_name = {t.name: r for t, r in zip(kernel.outputs, results, strict=True)}
    for tensor, got, expected in zip(kernel.outputs, results, case.expected, strict=True):
        if tensor.name in kernel.from_results:
            wide = {name: r.double() for name, r in by_name.items()}
            expected = kernel.from_results[tensor.name](p, [v.double() for v in case.inputs], wide)
        if tensor.split:  # how many splits is the configuration's own affair, their sum is not
            got = got.double().sum(0, keepdim=True)
        if tuple(got.shape) != tuple(expected.shape):
            raise GateError(f"{tensor.name}: shape {tuple(got.shape)} at T={case.T}, wanted {tuple(expected.shape)}")
        error = relative_error(got, expected)
        if not error <= tolerance(tensor, p):
            missing = int(got.isnan().sum())
            what = f"{missing} of {got.numel()} elements unwritten or NaN" if missing else f"relative error {error:.2e}"
            raise GateError(f"{tensor.name}: {what} at T={case.T}, wanted at most {tolerance(tensor, p):.0e}")
        errors[tensor.name] = error
    for tensor, first, second in zip(kernel.outputs, results, _run(launcher, case), strict=True):
        if not torch.equal(first, second):
            raise GateError(f"{tensor.name}: two runs on the same inputs differ at T={case.T}")
    return errors
