"""``mhc-tune replay``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.line import command_line

HELP = """Replay the search from a ledger, without a device: how many trials does each sampler need to come near the best?

A ledger is an exhaustive measurement, as `mhc-tune --sampler brute-force --raw FILE` writes it. Every sampler searches each of its studies
once per seed, with the tuner's own code, until a configuration within 2% of the ledger's best was measured; without the kernel's
hand-written starting points (cold) and, where it has some, with them (seeded). Writes replay.json and replay.png.
"""

EPILOG = """Examples:

  mhc-tune --kernels streams_grad --workloads mhc-27b --tokens 8192 --sampler brute-force --raw ledger.json  (measure one)

  mhc-tune replay ledger.json --out results/h100

  mhc-tune replay ledger.json --samplers tpe,random --seeds 10 --cold-only  (a quick look)
"""


def replay(
    ledger: Annotated[Path, typer.Argument(help="The exhaustive measurement, JSON.", metavar="LEDGER", show_default=False)],
    samplers: Annotated[str | None, typer.Option(help="Samplers, separated by commas. Default: all.", metavar="A,B")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Searches per sampler, each with a seed of its own.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Configurations under way at a time.")] = 4,
    within: Annotated[float, typer.Option(min=0, max=1, help="How near the best is near: 0.02 is 2%.")] = 0.02,
    trials: Annotated[int | None, typer.Option(min=1, help="Budget of each search. Default: all of the space but one.")] = None,
    cold_only: Annotated[bool, typer.Option("--cold-only", help="Only without the kernels' hand-written starting points.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: every core.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for replay.json and replay.png.")] = Path("."),
) -> None:
    from tl_kernels.child_python import cores
    from tuner.replay import ReplayRequest, run_replay
    from tuner.samplers import pick_samplers

    request = ReplayRequest(
        ledger=ledger,
        samplers=pick_samplers(samplers),
        seeds=seeds,
        batch=batch,
        within=within,
        trials=trials,
        cold_only=cold_only,
        jobs=jobs or cores(),
        out=out,
        command=command_line(),
    )
    raise typer.Exit(run_replay(request))
