"""How much longer a training step takes with mHC, on a stack of transformer blocks with the layer shape of the paper's 27B model.

    python examples/step_time.py                # on a GPU: 4 blocks, 2 x 4096 tokens; writes results/<gpu>/step_time
    python examples/step_time.py --compile      # the same also under torch.compile, which is slow to compile the formulas
    python examples/step_time.py --tiny         # on a CPU: tells whether it runs, not what it costs

``plain`` is x + f(norm(x)), ``mhc`` this project's module, ``formulas`` the same mHC in PyTorch's own operations, on CUDA always under
torch.compile. They share weights and inputs (step_model.py says what the model is). One step is forward and backward, gradients set to
None before, without an optimizer. Before anything is timed, loss and gradient of the input must be those of the formulas. Then rounds of
one step of each and one copy, so that drift hits all alike; what a step takes longer is compared with the plain one of the same round.
Writes step_time.json, .md and .png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from step_model import Model, Shape, clear_gradients, step
from step_options import parse
from step_report import FILES, chart, markdown, summarize
from torch import Tensor

import mhc
from mhc.files import replace_file
from mhc.profile import ProfileError, active_profile
from tuner.bench_case import finite_error
from tuner.bench_display import BenchDisplay
from tuner.bench_entrant import peak_mib
from tuner.commands.line import typed
from tuner.device_state import read_state
from tuner.errors import INTERRUPTED, TuneError, one_line, writing
from tuner.hardware import CPU, Hardware, resolve
from tuner.timing import Clock, Timed
from tuner.writer import check_writable

#: Steps of each before it counts: the first compiles, and the clocks of a GPU that was idle settle.
WARM_UP = 3

#: Largest difference from the formulas, relative, for the gradient ||a - b|| / ||b||. bfloat16 keeps 8 bits: a rounding is up to
#: 2^-8 = 4e-3 of a number, and where sums are in another order, streams, layer inputs and their gradients round another way. Measured on
#: the CPU with the TileLang programs: 9e-3 at 4 blocks, C = 64, and 2e-4 in the loss, a mean in which roundings cancel; with PyTorch
#: serving 6e-3 to 7e-3 at 4 blocks and 9e-3 at 12, C = 128. Mistakes there, at 4 blocks: 8e-2 for H_res transposed, 2e-1 for H_post 5%
#: too large. One that leaves less (Sinkhorn in the other order, 8e-3) is for the tests of the operators in float64.
TOLERANCE = {"loss": 1e-2, "gradient": 3e-2}


class Entrant:
    """One variant in one mode, ``eager`` or ``compile``, and its row for the report."""

    def __init__(self, variant: str, mode: str, model: Model) -> None:
        self.inputs = model.inputs
        self.connections = torch.nn.ModuleList(model.connections if variant == "mhc" else ())
        self.row: dict[str, Any] = {"variant": variant, "mode": mode, "errors": {}, "peak_mib": None, "failure": None, "samples_ms": []}
        self.stack = model.stack(variant, mode == "compile", compiled_formulas=self.inputs.is_cuda)

    def __str__(self) -> str:
        return f"{self.row['variant']}, {self.row['mode']}"

    def step(self) -> Tensor:
        return step(self.stack, self.inputs)

    def prepare(self, answer: dict[str, Tensor]) -> None:
        """Compile, warm up, compare with the answer, measure memory. Never raises but KeyboardInterrupt: what failed is in the row."""
        try:
            if self.connections:
                mhc.warm_up(self.connections, self.inputs.shape[:-1].numel())
            got = results(self.step(), self.inputs)
            if self.row["variant"] != "plain":
                self.row["errors"] = {name: finite_error(got[name], answer[name]) for name in answer}
            for _ in range(WARM_UP - 1):
                self.step()
            clear_gradients(self.stack, self.inputs)
            self.row["peak_mib"] = peak_mib(self.step, self.inputs.device)
        except Exception as error:
            self.row["failure"] = one_line(error)
        clear_gradients(self.stack, self.inputs)

    @property
    def differs(self) -> bool:
        return any(not error <= TOLERANCE[name] for name, error in self.row["errors"].items())


def results(loss: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    return {"loss": loss.double(), "gradient": inputs.grad.double()}


def take_rounds(clock: Clock, entrants: Sequence[Entrant], rounds: int, display: BenchDisplay) -> list[float]:
    """Append a sample a round to every entrant's row. Returns the copy bandwidth of each round, in GB/s. Ctrl-C leaves whole rounds."""
    copy, moved = clock.copy_call()
    calls = [Timed(copy), *(Timed(entrant.step, eager=True) for entrant in entrants)]
    display.stage("timing", rounds)
    clock.warm_up(calls, 1)
    copies: list[float] = []
    try:
        for k in range(rounds):
            order = [(k + i) % len(calls) for i in range(len(calls))]  # another one begins every round
            (row,) = clock.interleaved([calls[which] for which in order], 1)
            us = dict(zip(order, row, strict=True))
            for which, entrant in enumerate(entrants, 1):
                entrant.row["samples_ms"].append(us[which] / 1e3)
            copies.append(moved / us[0] / 1e3)
            display.tick()
    except KeyboardInterrupt:
        for entrant in entrants:
            del entrant.row["samples_ms"][len(copies) :]
        if not copies:
            raise
    return copies


def describe(args: argparse.Namespace, shape: Shape, hardware: Hardware, model: Model, command: str) -> dict[str, Any]:
    """All that the result says beside the rows."""
    active = active_profile(args.device)
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "tilelang", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "schema": 1,
        "complete": False,
        "hardware": asdict(hardware),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": command,
        "seed": args.seed,
        "shape": asdict(shape),
        "tokens": shape.tokens,
        "flops": shape.flops,
        "parameters": model.parameters(),
        "hyper_connections": len(model.connections),
        "profile": None if active is None else {"gpu": active.provenance.gpu, "date": active.provenance.date},
        "tolerance": TOLERANCE,
    }


def measure(args: argparse.Namespace, shape: Shape, hardware: Hardware, command: str, display: BenchDisplay) -> dict[str, Any]:
    """The whole run. Raises :class:`TuneError` where there is nothing to time, and KeyboardInterrupt before the first round ended."""
    modes = ("eager", "compile") if args.compile else ("eager",)
    display.stage("weights, and the answer of the formulas", 1)
    try:
        model = Model(shape, args.device, args.seed)
        judge = model.stack("formulas")
        answer = results(step(judge, model.inputs), model.inputs)
    except torch.OutOfMemoryError as error:
        raise TuneError(f"{one_line(error)}; fewer --layers, --batch or --seq need less memory") from None
    clear_gradients(judge, model.inputs)
    result = describe(args, shape, hardware, model, command)
    entrants = [Entrant(variant, mode, model) for mode in modes for variant in args.variants]
    display.stage("compiling and checking", len(entrants))
    for entrant in entrants:
        display.busy([str(entrant)])
        entrant.prepare(answer)
        display.tick(str(entrant))
        if entrant.row["failure"]:
            display.note(f"{entrant}: failed: {entrant.row['failure']}")
    del answer
    wrong = [f"{e}: {', '.join(f'{k} by {v:.1e}' for k, v in e.row['errors'].items())}" for e in entrants if e.differs]
    if wrong:
        limits = ", ".join(f"{name} {limit:.0e}" for name, limit in TOLERANCE.items())
        raise TuneError(f"differs from the formulas, so nothing was timed: {'; '.join(wrong)}; allowed: {limits}")
    working = [entrant for entrant in entrants if not entrant.row["failure"]]
    if not working:
        raise TuneError(f"nothing to time: {entrants[0]}: {entrants[0].row['failure']}")
    copies = take_rounds(Clock(args.device), working, args.rounds, display)
    working[0].step()  # which a GPU works at while it is asked
    result["state"] = asdict(read_state(args.device))
    result["complete"] = len(copies) == args.rounds
    return summarize(result, [entrant.row for entrant in entrants], copies)


def save(result: dict[str, Any], out: Path) -> str | None:
    """Write the files; each is old or new, never half. Returns why there is no picture, if there is none. Raises :class:`TuneError`."""
    data, page, picture = (out / name for name in FILES)
    with writing(f"--out {out}"):
        replace_file(data, json.dumps(result, indent=1) + "\n")
        picture.unlink(missing_ok=True)  # never an old picture beside new numbers
        replace_file(page, markdown(result))
        try:
            chart(result, picture)
        except ModuleNotFoundError as error:
            return f"{error}; pip install matplotlib"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done; 1 a variant failed, numbers differ or nothing can be written; 2 bad options; 130 after Ctrl-C."""
    args = parse(argv, __doc__)
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    if args.tiny and args.device.type == "cpu":
        torch.set_num_threads(1)  # tensors this small gain nothing from more, and threads that wait for each other lose
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        args.device = torch.device("cuda", torch.cuda.current_device())
    try:
        hardware = resolve(CPU if args.device.type == "cpu" else "auto")
        if args.profile:
            mhc.load_profile(args.profile)
        out = args.out or Path("results") / hardware.profile / "step_time"
        for name in FILES:
            check_writable(out / name, "--out")
    except (ProfileError, TuneError) as error:
        print(f"step_time.py: {'--profile: ' if isinstance(error, ProfileError) else ''}{error}", file=sys.stderr)
        return 2
    command = typed("python", "examples/step_time.py", *(sys.argv[1:] if argv is None else argv))
    try:
        with BenchDisplay() as display:
            result = measure(args, shape, hardware, command, display)
    except KeyboardInterrupt:
        print(f"step_time.py: interrupted before anything was measured; {out} is as it was", file=sys.stderr)
        return INTERRUPTED
    except TuneError as error:
        print(f"step_time.py: {error}", file=sys.stderr)
        return 1
    print(markdown(result), end="")  # on a full disk too
    try:
        missing = save(result, out)
    except TuneError as error:
        print(f"step_time.py: {error}", file=sys.stderr)
        return 1
    print(f"\nwrote {', '.join(str(path) for path in (out / name for name in FILES) if path.exists())}")
    if missing:
        print(f"no picture: {missing}")
    if not result["complete"]:
        print("step_time.py: interrupted; what was measured was written", file=sys.stderr)
        return INTERRUPTED
    return 1 if any(row["failure"] for row in result["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
