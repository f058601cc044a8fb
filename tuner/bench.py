"""``mhc-tune bench``: one mHC boundary around the identity layer, ours against its rivals and against copy bandwidth.

All rivals get the same inputs, are checked against float64 before they are timed, and are timed interleaved in one run: forward, and
forward + backward with the gradients of x, fn, base and scale; on CUDA as CUDA-graph replay and eagerly (launches included), on the CPU by
wall clock. Beside that per shape: memory, launches by kernel, the host's time, latencies of small token counts, and every kernel's share
of copy bandwidth with its registers, shared memory and occupancy. A rival that fails is a row that says why. Writes bench.json, bench.md
and bench.png after every stage.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from mhc import profile
from tl_kernels import KERNELS
from tl_kernels.launch import device_arch
from tuner.bench_case import PASSES, TOLERANCE, Shape
from tuner.bench_compile import POLL_S, compile_ahead, program_key
from tuner.bench_display import BenchDisplay
from tuner.bench_entrant import Entrant, Spec, release
from tuner.bench_kernels import bench_kernel, choices
from tuner.bench_remote import RemoteEntrant, RivalWorker, WorkerGone, find_env, parse_envs
from tuner.bench_report import chart, markdown
from tuner.bench_rivals import RIVALS, rival, rival_names
from tuner.errors import INTERRUPTED, TuneError, one_line, unknown
from tuner.hardware import Hardware, resolve
from tuner.plan import split_names
from tuner.timing import Clock, Timed, median, median_interval

#: What is measured where nothing is asked for: the issue's shapes, and on the CPU a small one.
SHAPES = {"cuda": "8192x4x2560,8192x4x4096,4096x4x7168", "cpu": "64x4x256"}
DECODE_TOKENS = {"cuda": "1,4,16,64,256", "cpu": "1,16"}
ROUNDS = {"cuda": 30, "cpu": 7}
SECONDS = {"cuda": 15.0, "cpu": 5.0}
#: Depth of the stacks whose latency is a decode latency: a graph of one tiny boundary would measure the start of a graph.
DECODE_LAYERS = 8
#: Token count at which the host's time is taken: small enough that the device never makes it wait.
HOST_TOKENS = 16
#: However long a round takes, so many are made.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class BenchRequest:
    """The command line as typed; None means the default for the device."""

    command: str
    gpu: str = "auto"
    shapes: str | None = None
    dtype: str = "bfloat16"
    rivals: str | None = None
    rival_envs: tuple[str, ...] = ()
    layers: str = "1,4"
    tokens: str | None = None
    rounds: int | None = None
    seconds: float | None = None
    seed: int = 0
    profile: str | None = None
    out: Path | None = None
    kernels: bool = True
    in_process: bool = False


@dataclass(frozen=True)
class Plan:
    """A checked request."""

    hardware: Hardware
    device: torch.device
    shapes: list[Shape]
    rivals: list[str]
    named: bool  # whether the user named the rivals: then one that is not installed is a row
    layers: list[int]
    tokens: list[int]
    rounds: int
    seconds: float
    out: Path
    envs: dict[str, Path] = field(default_factory=dict)


def _counts(option: str, text: str) -> list[int]:
    try:
        values = sorted({int(v) for v in split_names(text) or ()})
    except ValueError:
        values = [0]
    if any(v < 1 for v in values):
        raise TuneError(f"{option}: got {text!r}, wanted counts of at least 1 such as 1,4")
    return values


def make_plan(request: BenchRequest) -> Plan:
    """Everything that can be wrong with a request is found here. Raises :class:`TuneError`."""
    kind = "cpu" if request.gpu.strip().lower() == "cpu" else "cuda"
    # what needs no device comes first: a typing error need not wait for torch to look for one
    shapes = [Shape.parse(text) for text in split_names(request.shapes) or ()]
    known = rival_names()
    wanted = [name.replace("-", "_") for name in split_names(request.rivals) or ()]
    for name in [*wanted, *(name for shape in shapes for name in shape.only or ())]:
        if name.replace("-", "_") not in known:
            raise unknown("rival", name, known)
    if request.dtype not in TOLERANCE:
        raise unknown("dtype", request.dtype, TOLERANCE)
    layers = _counts("--layers", request.layers)
    if not layers:
        raise TuneError("--layers: got nothing, wanted at least one depth, such as 1,4")
    tokens = None if request.tokens is None else _counts("--tokens", request.tokens if request.tokens != "none" else "")
    envs = parse_envs(list(request.rival_envs))
    for name in envs:
        if name not in known:
            raise unknown("rival", name, known)
    hardware = resolve(request.gpu)
    kind = "cpu" if hardware.is_cpu else "cuda"
    out = request.out or Path("results") / hardware.profile
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise TuneError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    if request.profile:
        profile.load_profile(request.profile)
    return Plan(
        hardware=hardware,
        device=torch.device("cpu") if hardware.is_cpu else torch.device("cuda", torch.cuda.current_device()),
        shapes=shapes or [Shape.parse(text) for text in SHAPES[kind].split(",")],
        # those of tuner/rivals are CUDA through and through
        rivals=[name for name in known if name in wanted or (not wanted and (name in RIVALS or not hardware.is_cpu))],
        named=bool(wanted),
        layers=layers,
        tokens=_counts("--tokens", DECODE_TOKENS[kind]) if tokens is None else tokens,
        rounds=request.rounds or ROUNDS[kind],
        seconds=request.seconds or SECONDS[kind],
        out=out,
        envs=envs,
    )


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


class Team:
    """The rivals' processes. A costly rival has one process a shape."""

    def __init__(self, plan: Plan, request: BenchRequest, clock: Clock) -> None:
        self.plan, self.request, self.clock = plan, request, clock
        self.missing: dict[str, str] = {}
        self._failed: dict[tuple[str, int], str] = {}
        self._workers: dict[tuple[str, int], RivalWorker] = {}
        self._stopped = False
        self.busy: list[str] = []  # who compiles now

    def is_remote(self, name: str) -> bool:
        return not self.request.in_process and (rival(name).isolated or find_env(name, self.plan.envs) is not None)

    def _key(self, name: str, place: int) -> tuple[str, int]:
        return name, place if rival(name).costly else -1

    def at(self, place: int) -> list[str]:
        """The rivals of one shape; those known to be missing only where the user named them."""
        only = self.plan.shapes[place].only
        asked = [name for name in self.plan.rivals if only is None or name in [o.replace("-", "_") for o in only]]
        return [name for name in asked if self.plan.named or name not in self.missing]

    def specs(self, place: int) -> list[Spec]:
        """The boundary entrants of a shape: each rival alone, and in stacks where it can."""
        shape, found = self.plan.shapes[place], []
        for name in self.at(place):
            spec = Spec(name, shape.T, shape.n, shape.C, self.request.dtype, self.request.seed)
            for layers in self.plan.layers:
                if layers == 1 or rival(name).stacks:
                    found.append(replace(spec, layers=layers))
                if layers > 1 and rival(name).chain is not None:
                    found.append(replace(spec, layers=layers, chained=True))
        return found

    def decode_specs(self, place: int) -> list[Spec]:
        """The decode entrants of a shape. Costly rivals take part at the first shape only."""
        shape, found = self.plan.shapes[place], []
        for name in self.at(place):
            if rival(name).costly and place > 0:
                continue
            for T in self.plan.tokens:
                spec = Spec(name, T, shape.n, shape.C, self.request.dtype, self.request.seed, DECODE_LAYERS, decode=True)
                found.append(spec)
                if rival(name).chain is not None:
                    found.append(replace(spec, chained=True))
        return found

    def _jobs(self, place: int) -> dict[tuple[str, int], list[Spec]]:
        """What the processes are to compile for a shape."""
        jobs: dict[tuple[str, int], list[Spec]] = {}
        for spec in [*self.specs(place), *self.decode_specs(place)]:
            at = self._key(spec.rival, place)
            if self.is_remote(spec.rival) and spec.rival not in self.missing and at not in self._failed:
                jobs.setdefault(at, []).append(spec)
        return jobs

    def start(self, place: int, tick: Callable[[str], None]) -> None:
        """Compile what a shape needs, each rival in its process (started where it has none yet), all beside each other."""
        jobs = self._jobs(place)

        def one(job: tuple[tuple[str, int], list[Spec]]) -> None:
            at, specs = job
            name = at[0]
            self.busy.append(name)
            try:
                worker = self._workers.get(at)
                if worker is None:
                    worker = self._workers[at] = RivalWorker(str(self.plan.device), find_env(name, self.plan.envs))
                    if self._stopped:  # meanwhile
                        worker.kill()
                    worker.start()
                missing = worker.warm(specs)
                if missing:
                    self.missing[name] = missing
            except (WorkerGone, RuntimeError, OSError) as error:
                self._failed[at] = one_line(error)
            self.busy.remove(name)
            tick(name)

        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            list(pool.map(one, jobs.items()))

    def retune(self, place: int) -> None:
        """What autotunes when first called did so among others: again, one process at a time, at the shape that is compared."""
        for at, specs in self._jobs(place).items():
            try:
                self._workers[at].retune([s for s in specs if s.layers == 1 and not s.decode])
            except (WorkerGone, RuntimeError) as error:
                self._failed[at] = one_line(error)

    def processes(self, place: int) -> int:
        """How many processes compile for a shape."""
        return len(self._jobs(place))

    def open(self, specs: Sequence[Spec], place: int, tick: Callable[[str], None]) -> list[Entrant | RemoteEntrant]:
        """Entrants, checked and ready, in the order of ``specs``; the processes work beside each other."""
        found: dict[int, Entrant | RemoteEntrant] = {}
        queues: dict[tuple[str, int], list[int]] = {}
        for i, spec in enumerate(specs):
            queues.setdefault(self._key(spec.rival, place) if self.is_remote(spec.rival) else ("", -1), []).append(i)

        def drain(key: tuple[str, int]) -> None:
            for i in queues[key]:
                found[i] = self._entrant(key, specs[i])
                tick(f"{specs[i].rival} checked")

        remote = [key for key in queues if key[0]]
        with ThreadPoolExecutor(max(1, len(remote))) as pool:
            waiting = [pool.submit(drain, key) for key in remote]
            try:
                if ("", -1) in queues:
                    drain(("", -1))
                for future in waiting:
                    future.result()
            except BaseException:
                self.kill()  # so that nobody waits for them
                raise
        release(everything=False)
        entrants = [found[i] for i in range(len(specs))]
        for entrant in entrants:
            if entrant.row["missing"] and entrant.spec.rival not in self.missing:
                self.missing[entrant.spec.rival] = entrant.row["missing"]
        return entrants

    def _entrant(self, key: tuple[str, int], spec: Spec) -> Entrant | RemoteEntrant:
        if spec.rival in self.missing:
            absent = RemoteEntrant.failed(spec)
            absent.row |= {"label": rival(spec.rival).label, "missing": self.missing[spec.rival]}
            return absent
        if not key[0]:
            return Entrant(spec, self.clock)
        worker = self._workers.get(key)
        entrant = worker.entrant(spec) if worker is not None and key not in self._failed else None
        if entrant is None:
            entrant = RemoteEntrant.failed(spec, self._failed.get(key, "its process did not start"))
        entrant.row["label"] = rival(spec.rival).label
        return entrant

    def versions(self) -> dict[str, Any]:
        """Python and torch of the rivals that have an environment of their own."""
        return {name: w.versions for (name, _), w in self._workers.items() if find_env(name, self.plan.envs) is not None and w.versions}

    def kill(self) -> None:
        self._stopped = True
        for worker in list(self._workers.values()):
            worker.kill()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "tilelang", "triton", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


class Bench:
    """One run: ``result`` grows stage by stage and is written after each."""

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
        """Every stage. What was measured before an exception is in the files."""
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
        found = choices(shape, self.request.dtype, plan.tokens, plan.device) if self._needs_ours(shape) else []
        programs = [program for program in found if program_key(program, arch) not in self._compiled]
        self._compiled |= {program_key(program, arch) for program in programs}
        self.display.stage(f"{shape}: compiling", len(programs) + self.team.processes(place))
        busy: Callable[[list[str]], None] = lambda names: self.display.busy([*names, *self.team.busy])  # noqa: E731
        with ThreadPoolExecutor(1) as beside:
            rivals = beside.submit(self.team.start, place, self.display.tick)
            try:
                failures = compile_ahead(programs, arch, self.display.tick, busy)
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
        """bench.json, bench.md and bench.png as they stand."""
        out = self.plan.out
        for name, text in (("bench.json", json.dumps(self.result, indent=1) + "\n"), ("bench.md", markdown(self.result))):
            temporary = out / f".{name}.tmp"
            temporary.write_text(text)
            os.replace(temporary, out / name)
        (out / "bench.png").unlink(missing_ok=True)  # never an old picture beside new numbers

    def _chart(self) -> None:
        try:
            if self.result["shapes"]:
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
