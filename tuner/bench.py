"""``python -m tuner.bench``: one mHC boundary around the identity layer, ours against its rivals and against copy bandwidth.

All rivals get the same inputs, are checked against float64 before they are timed, and are timed interleaved in one run: forward, and
forward + backward with the gradients of x, fn, base and scale; on CUDA as CUDA-graph replay and eagerly (launches included), on the CPU by
wall clock. A rival that fails is a row that says why. Writes boundary.json, boundary.md and boundary.png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc import profile
from tl_kernels import KERNELS
from tl_kernels.launch import device_arch, get_launcher
from tuner.bench_report import PASSES, chart, markdown
from tuner.bench_rivals import RIVALS, Boundary, Case, Rival, expected
from tuner.errors import TuneError, one_line, unknown
from tuner.gate import relative_error
from tuner.hardware import resolve
from tuner.inputs import make_inputs
from tuner.timing import median, median_interval

Call = Callable[[], object]

#: Largest relative error against float64 that still counts as the same function.
TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 2e-3}
#: Eager calls in one sample: enough for the launches of one to hide under the kernels of another, as in training.
EAGER_CALLS = 5
#: A launch as short as this is timed as several in one graph, each on inputs of its own.
SHORT_US, MOST_LAUNCHES = 50.0, 32


def capture(call: Callable[[], Any]) -> tuple[Call, Any]:
    """CUDA graph of a call whose inputs stay where they are: its replay, and the tensors a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


class Sampler:
    """Interleaved samples in us. The L2 cache is emptied by reading, not writing: dirty lines would be written back on the call's time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._other_data = torch.zeros(max(64 << 20, l2), dtype=torch.float32, device=device)  # 4 times the cache in bytes

    def _one(self, call: Call, calls: int, cold: bool) -> Callable[[], float]:
        if self.device.type == "cpu":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            spent = (time.perf_counter() - start) * 1e6 / calls
            return lambda: spent
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if cold:
            self._other_data.amax()
        else:
            torch.cuda.synchronize(self.device)
        first.record()
        for _ in range(calls):
            call()
        last.record()
        return lambda: first.elapsed_time(last) * 1e3 / calls

    def interleaved(self, calls: Sequence[tuple[Call, int, bool]], rounds: int) -> list[list[float]]:
        """``rounds`` samples of each (call, calls a sample, cold cache); every round starts with another one."""
        pending: list[list[Callable[[], float]]] = [[] for _ in calls]
        for r in range(rounds):
            for k in range(len(calls)):
                which = (r + k) % len(calls)
                pending[which].append(self._one(*calls[which]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [[sample() for sample in samples] for samples in pending]


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """||got - want|| / ||want|| per tensor; infinite where a value is not finite."""
    errors = {}
    for name, w in want.items():
        error = relative_error(got[name], w)
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


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


class Entrant:
    """A rival on its way through the check and the timing: its row, and the calls to time by ``<pass>_<kind>``."""

    def __init__(self, name: str, rival: Rival, case: Case) -> None:
        self.row: dict[str, Any] = {"rival": name, "label": rival.label, "note": rival.note, "agrees": False, "errors": {}, "times": {}}
        self.row |= {"peak_mib": None, "failures": []}
        self.calls: dict[str, tuple[Call, int, bool]] = {}
        try:
            boundary = rival.make(case)
            self._check(rival, boundary, case)
            self._prepare(boundary, case)
        except Exception as error:  # a rival that fails is a row, not the end of the run
            self.row["failures"].append(one_line(error))

    def _check(self, rival: Rival, boundary: Boundary, case: Case) -> None:
        y, *grads = boundary.forward_backward(case.dy)
        got = {"y": y.detach(), **boundary.canonical(tuple(grads))}
        self.row["errors"] = relative_errors(got, expected(case, rival))
        dtype = str(case.x.dtype).removeprefix("torch.")
        self.row["agrees"] = max(self.row["errors"].values()) <= TOLERANCE[dtype]

    def _prepare(self, boundary: Boundary, case: Case) -> None:
        cuda = case.x.device.type == "cuda"
        passes = {"forward": boundary.forward_only, "forward_backward": lambda: boundary.forward_backward(case.dy)}
        for name, call in passes.items():
            call()
            self.calls[f"{name}_eager"] = (call, EAGER_CALLS if cuda else 1, False)
        self.row["peak_mib"] = peak_mib(passes["forward_backward"], case.x.device)
        for name, call in passes.items() if cuda else ():
            try:
                eager = call()
                replay, out = capture(call)
                replay()
                torch.cuda.synchronize()
                _same_numbers(out, eager, TOLERANCE[str(case.x.dtype).removeprefix("torch.")])
                self.calls[f"{name}_graph"] = (replay, 1, True)
            except Exception as error:
                torch.cuda.synchronize()
                self.row["failures"].append(f"{name}, graph capture: {one_line(error)}")


def _same_numbers(replayed: Any, eager: Any, tolerance: float) -> None:
    """Raise RuntimeError where a graph's replay gives something else than the call it captured."""
    pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (replayed, eager)), strict=True)
    worst = max(relative_errors({"t": a.detach()}, {"t": b.detach().double()})["t"] for a, b in pairs)
    if worst > tolerance:
        raise RuntimeError(f"the replay differs from the eager call by {worst:.1e}")


def summary(samples: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(samples)
    return {"us": median(samples), "lo": low, "hi": high}


def bench_boundary(case: Case, names: Sequence[str], rounds: int, sampler: Sampler) -> tuple[list[dict[str, Any]], float]:
    """The rows of the rivals, ``times`` without shares yet, and copy bandwidth in GB/s, all from the same rounds."""
    device = case.x.device
    entrants = []
    for name in names:
        print(f"compiling and checking {RIVALS[name].label}", file=sys.stderr, flush=True)
        entrants.append(Entrant(name, RIVALS[name], case))
    source = torch.empty(1 << 30 if device.type == "cuda" else 64 << 20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    keyed: list[tuple[dict[str, Any], str, tuple[Call, int, bool]]] = [({}, "copy", (lambda: target.copy_(source), 1, True))]
    keyed += [(e.row["times"], key, call) for e in entrants for key, call in e.calls.items()]
    calls = [call for _, _, call in keyed]
    sampler.interleaved(calls, 2)
    for (times, key, _), samples in zip(keyed, sampler.interleaved(calls, rounds), strict=True):
        times[key] = summary(samples)
    copy_gbps = 2 * source.numel() / keyed[0][0]["copy"]["us"] / 1e3
    return [e.row for e in entrants], copy_gbps


def bench_kernel(name: str, case: Case, rounds: int, sampler: Sampler, copy_gbps: float) -> dict[str, Any]:
    """One of the ten kernels as the profile would have it serve this case: bytes at least moved, us, GB/s, share of copy bandwidth."""
    T, n, C = case.sizes
    device = case.x.device
    kernel = KERNELS[name]
    p = kernel.problem(n, C, str(case.x.dtype).removeprefix("torch."))
    nbytes = kernel.bytes_moved(p, T)
    row: dict[str, Any] = {"kernel": name, "bytes": nbytes, "failure": None}
    try:
        choice = profile.choose(name, p, T, device)
        row |= {"config": dict(choice.config), "impl": choice.impl, "origin": choice.origin}
        run: Callable[..., object]
        if choice.impl == "reference" and device.type == "cpu":
            run = getattr(torch.ops.mhc, name)
        else:
            run = get_launcher(kernel, p, choice.config, device_arch(device))
        launches = 1
        if device.type == "cuda":
            launches = min(MOST_LAUNCHES, max(1, math.ceil(SHORT_US * copy_gbps * 1e3 / nbytes)))
        sets = [make_inputs(kernel, p, T, seed, device) for seed in range(launches)]
        # results are returned so that a graph keeps them apart
        call: Call = lambda: [run(*inputs) for inputs in sets]  # noqa: E731
        call()
        if device.type == "cuda":
            call, _ = capture(call)
        sampler.interleaved([(call, 1, True)], 2)
        (samples,) = sampler.interleaved([(call, 1, True)], rounds)
        row |= summary([s / launches for s in samples])
        row["launches_per_sample"] = launches
        row["gbps"] = nbytes / row["us"] / 1e3
        row["share"] = row["gbps"] / copy_gbps
    except Exception as error:
        row["failure"] = one_line(error)
    return row


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "tilelang", "triton", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure what ``args`` asks for. Raises TuneError for a device that is not there."""
    hardware = resolve(args.gpu)
    device = torch.device("cuda", torch.cuda.current_device()) if not hardware.is_cpu else torch.device("cpu")
    if args.profile:
        profile.load_profile(args.profile)
    T = args.tokens or (64 if hardware.is_cpu else 8192)
    rounds = args.rounds or (7 if hardware.is_cpu else 50)
    case = Case.random(T, args.n, args.dim, getattr(torch, args.dtype), device, args.seed)
    sampler = Sampler(device)
    rows, copy_gbps = bench_boundary(case, args.rivals, rounds, sampler)
    unit = T * args.dim * case.x.element_size()
    # forward: read x and f, write u and y; backward: design.md section 3, 10u + 13u at n = 4
    units = {"forward": 2 * args.n + 2, "forward_backward": 7 * args.n + 5}
    floor_us = {p: units[p] * unit / copy_gbps / 1e3 for p in PASSES}
    for row in rows:
        for key, sample in row["times"].items():
            sample["share"] = floor_us[key.rpartition("_")[0]] / sample["us"]
    kernels = [] if args.no_kernels else [bench_kernel(name, case, rounds, sampler, copy_gbps) for name in KERNELS]
    active = profile.active_profile(device)
    return {
        "hardware": asdict(hardware),
        "versions": versions(),
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "method": device.type,
        "rounds": rounds,
        "profile": None if active is None else {"gpu": active.provenance.gpu, "date": active.provenance.date},
        "copy_gbps": copy_gbps,
        "case": {"T": T, "n": args.n, "C": args.dim, "dtype": args.dtype, "seed": args.seed, "unit_bytes": unit}
        | {"floor_units": units, "floor_us": floor_us},
        "rows": rows,
        "kernels": kernels,
    }


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in RIVALS:
            raise argparse.ArgumentTypeError(str(unknown("rival", name, RIVALS)))
    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, wanted 1 or more")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tuner.bench", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--tokens", type=_positive, help="T; default 8192, on the CPU 64")
    parser.add_argument("--n", type=int, default=4, choices=range(1, 9), help="streams, default 4")
    parser.add_argument("--dim", type=_positive, default=2560, help="C, default 2560")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    parser.add_argument("--gpu", default="auto", help="auto, cpu, or a GPU such as h100 that must be this machine's; default auto")
    parser.add_argument("--rivals", type=_names, default=list(RIVALS), help=f"some of {','.join(RIVALS)}; default all")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the table of the single kernels")
    parser.add_argument("--rounds", type=_positive, help="samples of each; default 50, on the CPU 7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", help="tuned profile, a path or a packaged name; default: the one found for this device")
    parser.add_argument("--out", type=Path, help="folder for boundary.json, .md and .png; default results/<gpu>")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where ours failed or differs from float64; 2 for what the user must change; 130 after Ctrl-C."""
    args = parse(argv)
    command = shlex.join(["python", "-m", "tuner.bench", *(sys.argv[1:] if argv is None else argv)])
    try:
        out = args.out or Path("results") / resolve(args.gpu).profile
        out.mkdir(parents=True, exist_ok=True)
        result = run(args, command)
        (out / "boundary.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "boundary.md").write_text(markdown(result))
        (out / "boundary.png").unlink(missing_ok=True)  # never an old picture beside new numbers
        try:
            chart(result, out / "boundary.png")
        except ModuleNotFoundError as error:
            print(f"no chart: {error}; pip install matplotlib", file=sys.stderr)
    except (TuneError, profile.ProfileError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--out {args.out}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    print(f"wrote {', '.join(str(path) for path in sorted(out.glob('boundary.*')))}\n")
    print(markdown(result), end="")
    ours = [row for row in result["rows"] if row["rival"] == "ours"]
    return 0 if all(row["agrees"] and not row["failures"] for row in ours) else 1


if __name__ == "__main__":
    raise SystemExit(main())
