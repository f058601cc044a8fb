"""``mhc-tune bench``: one mHC boundary around the identity layer, ours against its rivals and against copy bandwidth.

All rivals get the same inputs, are checked against float64 before they are timed, and are timed interleaved in one run: forward, and
forward + backward with the gradients of x, fn, base and scale; on CUDA as CUDA-graph replay and eagerly (launches included), on the CPU by
wall clock. Beside that per shape: memory, launches by kernel, the host's time, latencies of small token counts, and every kernel's share
of copy bandwidth with its registers, shared memory and occupancy. A rival that fails is a row that says why. Writes bench.json and
bench.md after every stage, and bench.png at the end.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any, Protocol

from mhc import profile
from mhc.files import replace_file
from tl_kernels import KERNELS
from tl_kernels.launch import device_arch
from tuner.bench_case import PASSES, Shape
from tuner.bench_compile import POLL_S, compile_ahead, program_key
from tuner.bench_display import BenchDisplay
from tuner.bench_entrant import Entrant, Spec, release
from tuner.bench_kernels import bench_kernel, choices
from tuner.bench_plan import BenchRequest, Plan, make_plan
from tuner.bench_remote import RemoteEntrant
from tuner.bench_report import chart, markdown
from tuner.bench_team import Team
from tuner.errors import INTERRUPTED, TuneError, writing
from tuner.timing import Clock, Timed, median, median_interval

#: Token count at which the host's time is taken: small enough that the device never makes it wait.
HOST_TOKENS = 16
#: However long a round takes, so many are made.
LEAST_ROUNDS = 3


class Sampled(Protocol):
    """What rounds are made of; see tuner/bench_entrant.py."""

    row: dict[str, Any]

    def sample(self) -> dict[str, float]: ...


class _Copy:
    """Copy bandwidth as one more entrant."""

    def __init__(self, clock: Clock) -> None:
        self.row: dict[str, Any] = {"times": {}}
        self._clock = clock
        call, self.moved = clock.copy_call()
        self._timed = Timed(call)

    def sample(self) -> dict[str, float]:
        return {"copy": self._clock.interleaved([self._timed], 1)[0][0]}


def take_rounds(entrants: Sequence[Sampled], rounds: int, seconds: float, tick: Callable[[], None]) -> int:
    """Fill ``row["times"]`` with {us, lo, hi, samples} a key. Returns how many rounds were made.

    One round to warm up, then up to ``rounds`` within ``seconds``; each starts with another entrant.
    """
    taken: list[dict[str, list[float]]] = [{} for _ in entrants]
    for entrant in entrants:
        entrant.sample()
    start, made = time.monotonic(), 0
    try:
        while made < rounds and (made < LEAST_ROUNDS or time.monotonic() - start < seconds):
            for k in range(len(entrants)):
                which = (made + k) % len(entrants)
                for key, us in entrants[which].sample().items():
                    taken[which].setdefault(key, []).append(us)
            made += 1
            tick()
    finally:  # after Ctrl-C too
        for entrant, columns in zip(entrants, taken, strict=True):
            for key, samples in columns.items():
                low, high = median_interval(samples)
                entrant.row["times"][key] = {"us": median(samples), "lo": low, "hi": high, "samples": len(samples)}
    return made


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "tilelang", "triton", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


class Bench:
    """One run: ``result`` grows stage by stage and is written after each, from the first that measured anything."""

    def __init__(self, plan: Plan, request: BenchRequest, display: BenchDisplay) -> None:
        self.plan, self.request, self.display = plan, request, display
        self.clock = Clock(plan.device)
        self.team = Team(plan, request, self.clock)
        self._compiled: set[Any] = set()  # programs that were asked for
        active = profile.active_profile(plan.device)
        self.result: dict[str, Any] = {
            "schema": 2,
            "complete": False,
            "hardware": asdict(plan.hardware),
            "versions": versions(),
            "command": request.command,
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "method": plan.device.type,
            "dtype": request.dtype,
            "seed": request.seed,
            "profile": None if active is None else {"gpu": active.provenance.gpu, "date": active.provenance.date},
            "missing": self.team.missing,
            "compile_failures": [],
            "shapes": [],
        }

    def run(self) -> None:
        """Every stage. What was measured before an exception is in the files. Raises :class:`TuneError` where they cannot be written."""
        start = time.monotonic()
        try:
            for place in range(len(self.plan.shapes)):
                self._compile(place)
                self._boundary(place)
                self._decode(place)
                self._kernels(place)
            self._launches()
            self.result["complete"] = True
        finally:
            self.result["seconds"] = round(time.monotonic() - start, 1)
            self.team.close()
            self.write()
            self._chart()

    def _compile(self, place: int) -> None:
        """What one shape needs, so that the results of those before it are written; each compile has a limit."""
        shape, plan, arch = self.plan.shapes[place], self.plan, device_arch(self.plan.device)
        alone = self.request.kernels
        found = choices(shape, self.request.dtype, plan.tokens, plan.device, alone) if self._needs_ours(shape) else []
        programs = [program for program in found if program_key(program, arch) not in self._compiled]
        self._compiled |= {program_key(program, arch) for program in programs}
        self.display.stage(f"{shape}: compiling", len(programs) + self.team.processes(place))
        busy: Callable[[list[str]], None] = lambda names: self.display.busy([*names, *self.team.busy])  # noqa: E731
        with ThreadPoolExecutor(1) as beside:
            rivals = beside.submit(self.team.start, place, self.display.tick)
            try:
                failures = compile_ahead(programs, arch, self.display.tick, busy, alone)
                self.result["compile_failures"] += failures
                for one in failures:
                    self.display.note(f"{one['kernel']} n={one['n']} C={one['C']} {one['config']}: not compiled: {one['failure']}")
                while not wait([rivals], timeout=POLL_S).done:
                    busy([])
                rivals.result()
                if plan.device.type == "cuda":
                    self.display.stage(f"{shape}: autotuning rivals", 1)
                    self.team.retune(place)
            except BaseException:
                self.team.kill()
                raise
        self.result["rival_versions"] = self.team.versions()

    def _needs_ours(self, shape: Shape) -> bool:
        return self.request.kernels or ("ours" in self.plan.rivals and (shape.only is None or "ours" in shape.only))

    def _boundary(self, place: int) -> None:
        shape, plan = self.plan.shapes[place], self.plan
        unit = shape.unit_bytes(self.request.dtype)
        entry: dict[str, Any] = {"T": shape.T, "n": shape.n, "C": shape.C, "dtype": self.request.dtype, "seed": self.request.seed}
        entry |= {"unit_bytes": unit, "floor_units": shape.floor_units, "rows": [], "decode": [], "kernels": []}
        specs = self.team.specs(place)
        self.display.stage(f"{shape}: boundaries", len(specs) + plan.rounds)
        entrants = self.team.open(specs, place, self.display.tick)
        copy = _Copy(self.clock)
        try:
            take_rounds([copy, *entrants], plan.rounds, plan.seconds, self.display.tick)
        finally:
            if "copy" in copy.row["times"]:
                self._store(entry, shape, copy, self._rows(entrants))
            for entrant in entrants:
                entrant.close()
        del copy, entrants
        release()
        self.write()

    def _store(self, entry: dict[str, Any], shape: Shape, copy: _Copy, rows: list[dict[str, Any]]) -> None:
        """The table of one shape, also of rounds that were interrupted."""
        entry["rounds"] = copy.row["times"]["copy"]["samples"]
        entry["copy_gbps"] = copy.moved / copy.row["times"]["copy"]["us"] / 1e3
        entry["floor_us"] = {p: shape.floor_units[p] * entry["unit_bytes"] / entry["copy_gbps"] / 1e3 for p in PASSES}
        entry["rows"] = rows
        for row in rows:
            for key, sample in row["times"].items():
                sample["share"] = entry["floor_us"][key.rpartition("_")[0]] / sample["us"]
        _compare_inputs(rows)
        self.result["shapes"].append(entry)

    def _rows(self, entrants: Sequence[Entrant | RemoteEntrant]) -> list[dict[str, Any]]:
        """The entrants' rows; of a rival that is not installed none, unless it was asked for by name."""
        rows = []
        for entrant in entrants:
            missing = entrant.row.pop("missing", None)
            if missing and not self.plan.named:
                continue
            if missing:
                entrant.row["failures"].append(f"not installed: {missing}")
            rows.append(entrant.row)
        return rows

    def _decode(self, place: int) -> None:
        specs = self.team.decode_specs(place)
        if not specs:
            return
        self.display.stage(f"{self.plan.shapes[place]}: small token counts", len(specs) + self.plan.rounds)
        entrants = self.team.open(specs, place, self.display.tick)
        try:
            take_rounds(entrants, self.plan.rounds, self.plan.seconds, self.display.tick)
            host_tokens = min(self.plan.tokens, key=lambda T: abs(T - HOST_TOKENS))
            for entrant in entrants:
                if host_tokens == entrant.spec.T:
                    entrant.row["host_us"] = entrant.host()
        finally:
            for entrant in entrants:
                entrant.close()
        self.result["shapes"][-1]["decode"] = self._rows(entrants)
        del entrants
        release()
        self.write()

    def _kernels(self, place: int) -> None:
        if not self.request.kernels:
            return
        shape = self.plan.shapes[place]
        self.display.stage(f"{shape}: kernels", len(KERNELS))
        copying = self.clock.copy_call()
        for name in KERNELS:
            self.result["shapes"][place]["kernels"] += bench_kernel(name, shape, self.request.dtype, self.plan.rounds, self.clock, copying)
            release()
            self.display.tick(name)
        self.write()

    def _launches(self) -> None:
        """Last, because a process that was profiled once may launch more slowly ever after."""
        if self.plan.device.type != "cuda":
            return
        for place, shape in enumerate(self.plan.shapes):
            specs = [replace(s, timed=False) for s in self.team.specs(place)]
            self.display.stage(f"{shape}: launches", len(specs))
            for spec, entrant in zip(specs, self.team.open(specs, place, self.display.tick), strict=True):
                rows = self.result["shapes"][place]["rows"]
                row = next((r for r in rows if _same(r, spec)), None)
                if row is not None:
                    row["launches"] = entrant.launches()
                entrant.close()
            release()

    def write(self) -> None:
        """bench.json and bench.md as they stand; an earlier run's stay until something was measured."""
        if not self.result["shapes"]:
            return
        out = self.plan.out
        with writing(f"--out {out}"):
            for name, text in (("bench.json", json.dumps(self.result, indent=1) + "\n"), ("bench.md", markdown(self.result))):
                replace_file(out / name, text)
            (out / "bench.png").unlink(missing_ok=True)  # never an old picture beside new numbers

    def _chart(self) -> None:
        if not self.result["shapes"]:
            return
        try:
            with writing(f"--out {self.plan.out}"):
                chart(self.result, self.plan.out / "bench.png")
        except ModuleNotFoundError as error:
            self.display.note(f"no chart: {error}; pip install matplotlib")


def _same(row: dict[str, Any], spec: Spec) -> bool:
    return (row["rival"], row["layers"], row["chained"]) == (spec.rival, spec.layers, spec.chained)


def _compare_inputs(rows: list[dict[str, Any]]) -> None:
    """Another torch in a rival's environment may draw other numbers: then its times still count, but it is said."""
    drawn = [row for row in rows if "inputs" in row]
    for row in drawn:
        if any(abs(a - b) > 1e-6 * max(1.0, abs(b)) for a, b in zip(row["inputs"], drawn[0]["inputs"], strict=True)):
            row["note"] = "; ".join(filter(None, (row["note"], "other random inputs: its torch draws other numbers")))


def bench(request: BenchRequest) -> int:
    """Measure, write and print. Returns the exit code: 0; 1 where ours failed or differs from float64; 130 after Ctrl-C.

    Raises :class:`TuneError` for what the user can mend.
    """
    try:
        plan = make_plan(request)
    except profile.ProfileError as error:
        raise TuneError(f"--profile: {error}") from None
    interrupted = False
    with BenchDisplay() as display:
        run = Bench(plan, request, display)
        try:
            run.run()
        except KeyboardInterrupt:
            interrupted = True
        except TuneError:
            if run.result["shapes"]:  # on a full disk too
                print(markdown(run.result), end="")
            raise
    if interrupted and not run.result["shapes"]:
        print(f"mhc-tune bench: interrupted before anything was measured; {plan.out} is as it was", file=sys.stderr)
        return INTERRUPTED
    if interrupted:
        print(f"mhc-tune bench: interrupted; what was measured is in {plan.out / 'bench.json'} and .md", file=sys.stderr)
        return INTERRUPTED
    print(f"wrote {', '.join(str(path) for path in sorted(plan.out.glob('bench.*')))}\n")
    print(markdown(run.result), end="")
    ours = [row for entry in run.result["shapes"] for row in (*entry["rows"], *entry["decode"]) if row["rival"] == "ours"]
    return 0 if all(row["agrees"] and not row["failures"] for row in ours) else 1


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m tuner.bench``: the same as ``mhc-tune bench``."""
    from tuner.cli import main as cli

    sys.argv = ["mhc-tune", "bench", *(sys.argv[1:] if argv is None else argv)]
    cli()


if __name__ == "__main__":
    main()
