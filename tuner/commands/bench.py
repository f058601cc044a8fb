"""``mhc-tune bench``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.line import command_line
from tuner.commands.options import Dtype, ResultsOut, RivalEnvs, ThisGPU
from tuner.errors import TuneError, one_line

HELP = """Measure one mHC boundary (coefficients, layer input, layer output) around the identity layer: ours, rivals, copy bandwidth.

One run, same inputs, everything checked against float64 first and then timed in interleaved rounds. Per shape: forward and forward +
backward (CUDA-graph replay and eager; wall clock on the CPU), alone and in stacks, against the floor of bytes that must move; peak memory,
launches by kernel, latencies of small token counts, Python's time, and every kernel with its share of copy bandwidth, registers, shared
memory and occupancy. Writes bench.json, bench.md and bench.png; Ctrl-C keeps what is done.

Rivals are found by themselves where they are installed: liger-kernel here, others here or in an environment of their own, which
--rival-env, the variable MHC_RIVAL_<NAME> or a script .rivals/activate-<name>.sh names.
"""

EPILOG = """Examples:

  mhc-tune bench  (the standard shapes, every rival found, about five minutes on a GPU)

  mhc-tune bench --shapes 8192x4x2560,8192x2x2560,8192x8x2560:ours  (the last one without rivals)

  mhc-tune bench --rivals ours,liger --no-kernels --tokens none --seconds 5  (a quick look)

  mhc-tune bench --rival-env tile_kernels=/opt/tk/bin/python  (a rival in an environment of its own)

  mhc-tune bench --gpu cpu  (does it run, on a laptop)

  mhc-tune bench --readme results/h100/bench.json  (only print a small table of its first shape)
"""


def bench(
    gpu: ThisGPU = "auto",
    shapes: Annotated[
        str | None, typer.Option(help="Shapes TxnxC, separated by commas; :A+B narrows the rivals of one.", metavar="TxnxC,..")
    ] = None,
    dtype: Dtype = "bfloat16",
    rivals: Annotated[
        str | None, typer.Option(help="Rivals, separated by commas, ours among them. Default: all found.", metavar="A,B")
    ] = None,
    rival_env: RivalEnvs = None,
    layers: Annotated[str, typer.Option(help="Depths of the stacks; costly rivals only run alone.", metavar="L,L")] = "1,4",
    tokens: Annotated[
        str | None, typer.Option(help="Small token counts for latencies, or none. Default: 1,4,16,64,256.", metavar="T,T")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds, a sample of everything each. Default: 30, on the CPU 7.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Time for the rounds of one table. Default: 15, on the CPU 5.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the inputs and parameters.")] = 0,
    profile: Annotated[str | None, typer.Option(help="Tuned profile, a path or a packaged name. Default: this device's.")] = None,
    out: ResultsOut = None,
    kernels: Annotated[bool, typer.Option(help="Whether to measure the single kernels too.")] = True,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No process of its own for any rival (one that crashes ends the run).")
    ] = False,
    readme: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: print a small table of this bench.json's first shape, for a README.", metavar="PATH"),
    ] = None,
) -> None:
    if readme is not None:
        from tuner.bench_report import read_result, readme_table

        try:
            table = readme_table(read_result(readme))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise TuneError(f"--readme {readme}: is no bench.json of mhc-tune bench: {one_line(e)}") from None
        print(table, end="")
        return
    from tuner.bench import bench as run_bench
    from tuner.bench_plan import BenchRequest

    request = BenchRequest(
        command=command_line(),
        gpu=gpu,
        shapes=shapes,
        dtype=dtype,
        rivals=rivals,
        rival_envs=tuple(rival_env or ()),
        layers=layers,
        tokens=tokens,
        rounds=rounds,
        seconds=seconds,
        seed=seed,
        profile=profile,
        out=out,
        kernels=kernels,
        in_process=in_process,
    )
    raise typer.Exit(run_bench(request))
