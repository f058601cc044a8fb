"""Every kernel of the package at one shape: floor bytes, time, share of copy bandwidth, and what its program takes of a multiprocessor."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from mhc import backend, profile
from mhc.fused import DESIGN_KERNELS
from tl_kernels import KERNELS
from tl_kernels.launch import compile_kernel, device_arch, get_launcher
from tl_kernels.spec import Config, Kernel, Problem
from tuner.bench_case import Shape
from tuner.bench_entrant import capture
from tuner.compile_job import cached_shared_bytes, lowered_shared_bytes
from tuner.cubin import Resources, blocks_per_sm, find_kernels, occupancy
from tuner.errors import one_line
from tuner.inputs import make_inputs
from tuner.measure_job import run_reference
from tuner.timing import Call, Clock, Timed, median, median_interval

#: Most launches in one sample.
MOST_LAUNCHES = 32


def choices(
    shape: Shape, dtype: str, tokens: Iterable[int], device: torch.device, alone: bool = True
) -> list[tuple[Kernel, Problem, Config]]:
    """The programs that the profile, and the default, serve at a shape and these token counts; on the CPU not where PyTorch serves.

    ``alone``: kernels are measured by themselves too. Otherwise the profile's of those that a boundary launches.
    """
    found: dict[Any, tuple[Kernel, Problem, Config]] = {}
    for name, kernel in KERNELS.items():
        p = kernel.problem(shape.n, shape.C, dtype)
        if kernel.unserved_on(p, device_arch(device)) or not (alone or name in DESIGN_KERNELS):
            continue
        served = [profile.choose(name, p, T, device) for T in (shape.T, *tokens)]
        configs = [c.config for c in served if _impl(kernel, p, c, device) == "tilelang"]
        for config in configs + ([kernel.default(p)] if alone and device.type == "cuda" else []):
            found.setdefault((name, p, tuple(sorted(config.items()))), (kernel, p, config))
    return list(found.values())


def _impl(kernel: Kernel, p: Problem, choice: profile.Choice, device: torch.device) -> str:
    """What serves where the profile says ``choice``, as a call finds (mhc/plan.py): ``"tilelang"``, or on the CPU ``"reference"``."""
    mode = backend.current()
    if device.type == "cuda":
        return "tilelang"
    serves = backend.serves_tilelang(mode, device) and backend.program_serves(mode, device, kernel, p, choice.impl, choice.config)
    return "tilelang" if serves else "reference"


_RESOURCES: dict[Any, dict[str, Any]] = {}


def keep_resources(kernel: Kernel, p: Problem, config: Config, arch: str, found: dict[str, Any]) -> None:
    """What :func:`resources` will say of a program that another process compiled."""
    _RESOURCES[kernel, p, tuple(sorted(config.items())), arch] = found


def resources(kernel: Kernel, p: Problem, config: Config, arch: str) -> dict[str, Any]:
    """Registers, stack, threads, shared memory and occupancy; kept from when the program was compiled ahead."""
    key = (kernel, p, tuple(sorted(config.items())), arch)
    if key not in _RESOURCES:
        _RESOURCES[key] = image_resources(get_launcher(kernel, p, config, arch).jit, kernel, p, config, arch)
    return _RESOURCES[key]


def image_resources(jit: Any, kernel: Kernel, p: Problem, config: Config, arch: str) -> dict[str, Any]:
    """Registers, stack and threads from the compiled image, dynamic shared memory from what launches it, and the occupancy of both."""
    folder = getattr(jit, "_tilelang_cache_path", None)
    if folder is not None:
        found = find_kernels((Path(folder) / "executable.so").read_bytes())
    else:  # TileLang's cache is switched off
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "kernel.so"
            compile_kernel(kernel, p, config, arch).export_library(str(path))
            found = find_kernels(path.read_bytes())
    if not found:
        return {}
    worst = max(found, key=lambda r: (r.registers, r.stack))
    dynamic = None if folder is None else cached_shared_bytes(Path(folder))
    if dynamic is None:  # takes up to a minute
        dynamic = lowered_shared_bytes(kernel, kernel.build(p, config), config, arch)
    shared = dynamic + worst.static_shared
    return {"shared": shared} | _summary(worst, arch, shared)


def _summary(r: Resources, arch: str, shared: int) -> dict[str, Any]:
    found: dict[str, Any] = {"registers": r.registers, "stack": r.stack, "threads": r.threads}
    if r.threads:
        found["blocks_per_sm"] = blocks_per_sm(arch, r.registers, r.threads, shared)
        found["occupancy"] = occupancy(arch, r.registers, r.threads, shared)
    return found


def bench_kernel(name: str, shape: Shape, dtype: str, rounds: int, clock: Clock, copying: tuple[Call, int]) -> list[dict[str, Any]]:
    """Lines for the program that the profile serves and, where it is another one, the default; interleaved with a copy and its bytes."""
    kernel, device = KERNELS[name], clock.device
    p = kernel.problem(shape.n, shape.C, dtype)
    if kernel.unserved_on(p, device_arch(device)):
        return []
    nbytes = kernel.bytes_moved(p, shape.T)
    rows: list[dict[str, Any]] = []
    calls: list[Timed] = []
    copy, copied = copying
    launches = max(1, min(MOST_LAUNCHES, math.ceil(copied / nbytes))) if device.type == "cuda" else 1
    try:
        choice = profile.choose(name, p, shape.T, device)
        programs = [
            ("profile" if choice.origin != "default" else "default", dict(choice.config), _impl(kernel, p, choice, device), choice.origin)
        ]
        default = kernel.default(p)
        if device.type == "cuda" and choice.config != default:
            programs.append(("default", default, "tilelang", "default"))
        inputs = make_inputs(kernel, p, shape.T, 0, device)
    except Exception as error:
        return [{"kernel": name, "program": "profile", "bytes": nbytes, "failure": one_line(error)}]
    sets = [inputs] + [tuple(t.clone() for t in inputs) for _ in range(launches - 1)]
    for program, config, impl, origin in programs:
        row: dict[str, Any] = {
            "kernel": name,
            "program": program,
            "config": config,
            "impl": impl,
            "origin": origin,
            "bytes": nbytes,
            "failure": None,
        }
        rows.append(row)
        try:
            found = resources(kernel, p, config, device_arch(device)) if device.type == "cuda" else {}
            calls.append(_call(kernel, p, config, impl, sets, device))
            row |= found
        except Exception as error:
            row["failure"] = one_line(error)
    good = [row for row in rows if row["failure"] is None]
    clock.interleaved([copy, *calls], 1)
    columns = list(zip(*clock.interleaved([copy, *calls], rounds), strict=True))
    copy_gbps = copied / median(columns[0]) / 1e3
    for row, samples in zip(good, columns[1:], strict=True):
        low, high = median_interval(samples)
        row |= {"us": median(samples) / launches, "lo": low / launches, "hi": high / launches, "launches_per_sample": launches}
        row["gbps"] = nbytes / row["us"] / 1e3
        row["share"] = row["gbps"] / copy_gbps
    return rows


def _call(kernel: Kernel, p: Problem, config: Config, impl: str, sets: list[tuple[torch.Tensor, ...]], device: torch.device) -> Timed:
    run: Callable[..., object]
    if impl == "reference":
        run = lambda *inputs: run_reference(kernel.name, p, inputs)  # noqa: E731
    else:
        run = get_launcher(kernel, p, config, device_arch(device))
    # results are returned so that a graph keeps them apart
    call: Callable[[], object] = lambda: [run(*inputs) for inputs in sets]  # noqa: E731
    call()
    if device.type == "cuda":
        call, _ = capture(call)
    return Timed(call)
