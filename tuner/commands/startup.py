"""``mhc-tune startup``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.line import command_line
from tuner.commands.options import Dtype, ResultsOut, RivalEnvs, ThisGPU

HELP = """Time the start of a training script up to the end of its first step: compiling, from caches, and from a bundle.

Each start is a process of its own with one boundary around the identity layer, forward + backward. Rivals as in `mhc-tune bench`: their
compilers' caches start empty too. Writes startup.json and startup.md; Ctrl-C keeps what is done.
"""

EPILOG = """Examples:

  mhc-tune startup --bundle bundle  (ours: cold, cached, and from what `mhc-tune compile` wrote)

  mhc-tune startup --rivals ours,liger,tile-kernels --repeats 1

  mhc-tune startup --gpu cpu --shape 64x4x1280  (on a laptop)
"""


def startup(
    gpu: ThisGPU = "auto",
    shape: Annotated[str | None, typer.Option(help="Shape. Default: 8192x4x2560, on the CPU 64x4x1280.", metavar="TxnxC")] = None,
    dtype: Dtype = "bfloat16",
    rivals: Annotated[str | None, typer.Option(help="Rivals, separated by commas, ours among them. Default: ours.", metavar="A,B")] = None,
    rival_env: RivalEnvs = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle that `mhc-tune compile` wrote, for one more way to start ours.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is started.")] = 3,
    out: ResultsOut = None,
) -> None:
    from tuner.startup import StartupRequest, run_startup

    request = StartupRequest(
        command=command_line(),
        gpu=gpu,
        shape=shape,
        dtype=dtype,
        rivals=rivals,
        rival_envs=tuple(rival_env or ()),
        bundle=bundle,
        repeats=repeats,
        out=out,
    )
    raise typer.Exit(run_startup(request))
