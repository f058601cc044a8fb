"""What ``mhc-tune bench`` was asked for, checked before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from mhc import profile
from tuner.bench_case import TOLERANCE, Shape
from tuner.bench_remote import parse_envs
from tuner.bench_rivals import RIVALS, check_rivals, rival_names
from tuner.errors import TuneError, unknown
from tuner.hardware import Hardware, resolve
from tuner.plan import split_names
from tuner.writer import check_writable

#: What is measured where nothing is asked for: the issue's shapes, and on the CPU a small one.
SHAPES = {"cuda": "8192x4x2560,8192x4x4096,4096x4x7168", "cpu": "64x4x256"}
DECODE_TOKENS = {"cuda": "1,4,16,64,256", "cpu": "1,16"}
ROUNDS = {"cuda": 30, "cpu": 7}
SECONDS = {"cuda": 15.0, "cpu": 5.0}


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
    # what needs no device comes first: a typing error need not wait for torch to look for one
    shapes = [Shape.parse(text) for text in split_names(request.shapes) or ()]
    known = rival_names()
    wanted = [name.replace("-", "_") for name in split_names(request.rivals) or ()]
    check_rivals([*wanted, *(name for shape in shapes for name in shape.only or ())], known)
    if request.dtype not in TOLERANCE:
        raise unknown("dtype", request.dtype, TOLERANCE)
    layers = _counts("--layers", request.layers)
    if not layers:
        raise TuneError("--layers: got nothing, wanted at least one depth, such as 1,4")
    tokens = None if request.tokens is None else _counts("--tokens", request.tokens if request.tokens != "none" else "")
    envs = parse_envs(list(request.rival_envs))
    check_rivals(envs, known)
    hardware = resolve(request.gpu)
    kind = "cpu" if hardware.is_cpu else "cuda"
    # those of tuner/rivals are CUDA through and through
    rivals = [name for name in known if name in wanted or (not wanted and (name in RIVALS or not hardware.is_cpu))]
    for shape in shapes:
        left_out = [name for name in shape.only or () if name.replace("-", "_") not in rivals]
        if left_out:
            raise TuneError(
                f"--shapes: {shape} asks for {', '.join(left_out)}, wanted some of the rivals that take part: {', '.join(rivals)}"
            )
    out = request.out or Path("results") / hardware.profile
    for name in ("bench.json", "bench.md", "bench.png"):
        check_writable(out / name, "--out")
    if request.profile:
        profile.load_profile(request.profile)
    return Plan(
        hardware=hardware,
        device=torch.device("cpu") if hardware.is_cpu else torch.device("cuda", torch.cuda.current_device()),
        shapes=shapes or [Shape.parse(text) for text in SHAPES[kind].split(",")],
        rivals=rivals,
        named=bool(wanted),
        layers=layers,
        tokens=_counts("--tokens", DECODE_TOKENS[kind]) if tokens is None else tokens,
        rounds=request.rounds or ROUNDS[kind],
        seconds=request.seconds or SECONDS[kind],
        out=out,
        envs=envs,
    )
