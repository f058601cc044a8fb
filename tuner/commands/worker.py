"""``mhc-tune worker``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.line import command_line
from tuner.commands.options import Jobs, Kernels
from tuner.storage import STORAGE_VARIABLE

HELP = """Join the studies of a running (or interrupted) `mhc-tune --storage URL` with this machine's devices, until none is open.

Only studies of the same device and of the same kernel sources are joined. A worker may be killed at any time: what it was trying is tried
again. It writes no profile, unless --output names one; the mhc-tune that began writes the profile of all that was found.

Exit codes: 0 no study is open any more, 2 the command line must be mended, 3 as for a run, 130 interrupted.
"""


def worker(
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL that mhc-tune was given.", metavar="URL", envvar=STORAGE_VARIABLE)
    ] = None,
    gpu: Annotated[str, typer.Option(help="Device to measure on: auto, cpu, or a GPU's profile name.")] = "auto",
    kernels: Kernels = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs to measure on, by number: 0,1. Default: all of one kind.", metavar="N,N")
    ] = None,
    jobs: Jobs = None,
    output: Annotated[Path | None, typer.Option(help="Profile to write too. Default: none.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for new studies instead of ending.")] = False,
) -> None:
    from tuner.worker import WorkerRequest, required, work

    request = WorkerRequest(
        storage=required(storage),
        gpu=gpu,
        kernels=kernels,
        devices=devices,
        jobs=jobs,
        output=output,
        wait=wait,
        command=command_line(),
    )
    raise typer.Exit(work(request))
