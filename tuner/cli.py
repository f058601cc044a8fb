"""The command ``mhc-tune``."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tuner.errors import INTERRUPTED, TuneError

#: What typer raises for a bad option; it has no public name in every supported release.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

HELP = """Tune the mHC kernels for the GPU (or CPU) in this machine and write a profile that `import mhc` finds.

Every configuration must first give the right numbers (against a float64 reference, on ragged token counts); then it is timed, alone on
the device. The best few are confirmed beside the default: a win must be clear of the noise, else the default ships. Ctrl-C keeps what is
done, and the same command again goes on where it stopped.
"""

EPILOG = """Examples:

  mhc-tune  (everything, for the GPU found here, else the CPU)

  mhc-tune --gpu h100 --workloads mhc-27b  (one model's shapes)

  mhc-tune --kernels pre,post_res --tokens 4096

  mhc-tune --effort full --time-limit 3600  (look harder, an hour at most)

  mhc-tune --gpu cpu --kernels pre --trials 2  (seconds, on a laptop)

  mhc-tune bench --help  (measure what was tuned, against its rivals)
"""

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


class EffortName(str, Enum):
    quick = "quick"
    full = "full"


@app.callback(invoke_without_command=True, help=HELP, epilog=EPILOG)
def tune(
    context: typer.Context,
    gpu: Annotated[str, typer.Option(help="Device to tune: auto, cpu, or a GPU's profile name (h100, h200, ...).")] = "auto",
    kernels: Annotated[str | None, typer.Option(help="Kernels, separated by commas. Default: all.", metavar="A,B")] = None,
    workloads: Annotated[str | None, typer.Option(help="Workloads, separated by commas. Default: all.", metavar="A,B")] = None,
    workloads_file: Annotated[Path | None, typer.Option(help="YAML file of workloads. Default: configs/workloads.yaml.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token counts to tune at, instead of each workload's.", metavar="T,T")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Configurations tried per kernel and shape. Default: from --effort.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=1, help="Seconds for the whole run, shared out. Default: from --effort.")] = None,
    effort: Annotated[EffortName, typer.Option(help="How hard to look; see tuner/effort.py.")] = EffortName.quick,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the inputs.")] = 0,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL. Default: SQLite in .mhc-tune/<gpu>.db.", metavar="URL")] = None,
    output: Annotated[Path | None, typer.Option(help="Profile to write. Default: configs/<gpu>.yaml.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compile processes. Default: every core.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Also write every trial as JSON.", metavar="PATH")] = None,
) -> None:
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if _typed(context, name)]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise TuneError(f"{option} stands before {context.invoked_subcommand!r}; its options come after its name")
        return
    from tuner.run import Request, run

    request = Request(
        gpu=gpu,
        kernels=kernels,
        workloads=workloads,
        workloads_file=workloads_file,
        tokens=tokens,
        trials=trials,
        time_limit=time_limit,
        effort=effort.value,
        seed=seed,
        storage=storage,
        output=output,
        jobs=jobs,
        raw=raw,
        command=shlex.join(["mhc-tune", *sys.argv[1:]]),
    )
    raise typer.Exit(run(request))


def _typed(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option, by its name: the enum that says so has no stable home among typer's releases."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


BENCH_HELP = """Measure one mHC boundary (coefficients, layer input, layer output) around the identity layer: ours, rivals, copy bandwidth.

One run, same inputs, everything checked against float64 first and then timed in interleaved rounds. Per shape: forward and forward +
backward (CUDA-graph replay and eager; wall clock on the CPU), alone and in stacks, against the floor of bytes that must move; peak memory,
launches by kernel, latencies of small token counts, Python's time, and every kernel with its share of copy bandwidth, registers, shared
memory and occupancy. Writes bench.json, bench.md and bench.png; Ctrl-C keeps what is done.

Rivals are found by themselves where they are installed: liger-kernel here, others here or in an environment of their own, which
--rival-env, the variable MHC_RIVAL_<NAME> or a script .rivals/activate-<name>.sh names.
"""

BENCH_EPILOG = """Examples:

  mhc-tune bench  (the standard shapes, every rival found, about five minutes on a GPU)

  mhc-tune bench --shapes 8192x4x2560,8192x2x2560,8192x8x2560:ours  (the last one without rivals)

  mhc-tune bench --rivals ours,liger --no-kernels --tokens none --seconds 5  (a quick look)

  mhc-tune bench --rival-env tile_kernels=/opt/tk/bin/python  (a rival in an environment of its own)

  mhc-tune bench --gpu cpu  (does it run, on a laptop)

  mhc-tune bench --readme results/h100/bench.json  (only print the README's table of a result)
"""


@app.command("bench", help=BENCH_HELP, epilog=BENCH_EPILOG)
def bench(
    gpu: Annotated[str, typer.Option(help="auto, cpu, or a GPU such as h100 that must be this machine's.")] = "auto",
    shapes: Annotated[
        str | None, typer.Option(help="Shapes TxnxC, separated by commas; :A+B narrows the rivals of one.", metavar="TxnxC,..")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the streams: bfloat16, float16 or float32.")] = "bfloat16",
    rivals: Annotated[
        str | None, typer.Option(help="Rivals, separated by commas, ours among them. Default: all found.", metavar="A,B")
    ] = None,
    rival_env: Annotated[
        list[str] | None,
        typer.Option(help="A rival's environment: interpreter, folder of packages, or script to source.", metavar="NAME=PATH"),
    ] = None,
    layers: Annotated[str, typer.Option(help="Depths of the stacks; costly rivals only run alone.", metavar="L,L")] = "1,4",
    tokens: Annotated[
        str | None, typer.Option(help="Small token counts for latencies, or none. Default: 1,4,16,64,256.", metavar="T,T")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds, a sample of everything each. Default: 30, on the CPU 7.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Time for the rounds of one table. Default: 15, on the CPU 5.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs and parameters.")] = 0,
    profile: Annotated[str | None, typer.Option(help="Tuned profile, a path or a packaged name. Default: this device's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. Default: results/<gpu>.")] = None,
    kernels: Annotated[bool, typer.Option(help="Whether to measure the single kernels too.")] = True,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No process of its own for any rival (one that crashes ends the run).")
    ] = False,
    readme: Annotated[
        Path | None, typer.Option(help="Measure nothing: print the README's table of this bench.json.", metavar="PATH")
    ] = None,
) -> None:
    if readme is not None:
        from tuner.bench_report import read_result, readme_table

        print(readme_table(read_result(readme)), end="")
        return
    from tuner.bench import BenchRequest
    from tuner.bench import bench as run_bench

    request = BenchRequest(
        command=shlex.join(["mhc-tune", *sys.argv[1:]]),
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


def main() -> None:
    """Entry point: one line on stderr and exit code 2 for what the user can mend."""
    try:
        sys.exit(app(prog_name="mhc-tune", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        print("mhc-tune: interrupted before anything was measured", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except TuneError as e:
        _refuse(str(e))
    except _UsageError as e:
        _refuse(f"{e.format_message()} (mhc-tune --help explains)")


def _refuse(message: str) -> NoReturn:
    print(f"mhc-tune: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
