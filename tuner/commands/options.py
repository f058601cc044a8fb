"""Options that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Kernels = Annotated[str | None, typer.Option(help="Kernels, separated by commas. Default: all.", metavar="A,B")]
Workloads = Annotated[str | None, typer.Option(help="Workloads, separated by commas. Default: all.", metavar="A,B")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Compile processes. Default: every core.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the streams: bfloat16, float16 or float32.")]
ThisGPU = Annotated[str, typer.Option(help="auto, cpu, or a GPU such as h100 that must be this machine's.")]
PackagedGPU = Annotated[str | None, typer.Option(help="The packaged profile of this GPU (h100, cpu, ...).")]
RivalEnvs = Annotated[
    list[str] | None,
    typer.Option(help="A rival's environment: interpreter, folder of packages, or script to source.", metavar="NAME=PATH"),
]
ResultsOut = Annotated[Path | None, typer.Option(help="Folder for the results. Default: results/<gpu>.")]
