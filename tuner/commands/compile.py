"""``mhc-tune compile``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.line import command_line
from tuner.commands.options import Jobs, Kernels, PackagedGPU

HELP = """Compile every program of a profile into a bundle, a folder that training code loads instead of compiling. Needs no GPU.

The bundle holds a shared library for each program (host code, and the code of its GPU) and manifest.json: architecture, releases of what
compiled it, hashes. It is used by `MHC_BUNDLE=bundle/ python train.py`, or mhc.load_bundle("bundle/"): no compiler is needed there, and
what does not fit (another architecture, release of TileLang or version of a kernel, a damaged file) is said and compiled there instead.
Shapes that the profile does not name are compiled there too.

Exit codes: 0 everything was compiled, 1 something was not (named; the bundle holds the rest), 2 the command line or a file must be mended,
130 interrupted. The folder is replaced as a whole at the end, or left as it was.
"""

EPILOG = """Examples:

  mhc-tune compile --gpu h100 -o bundle  (the packaged profile of that GPU)

  mhc-tune compile --profile out/h100.yaml -o bundle --jobs 8

  mhc-tune compile --gpu h100 --kernels pre,post_res -o bundle  (only these; others are compiled where they run)
"""


def compile_profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: new, or a bundle to replace.", show_default=False)],
    gpu: PackagedGPU = None,
    profile: Annotated[str | None, typer.Option(help="Profile, a path or a packaged name, instead of that of --gpu.")] = None,
    kernels: Kernels = None,
    jobs: Jobs = None,
) -> None:
    from tuner.bundle import CompileRequest, compile_bundle

    raise typer.Exit(compile_bundle(CompileRequest(gpu, output, profile, kernels, jobs, command_line())))
