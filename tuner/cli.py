"""The command ``mhc-tune``."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tuner.commands import bench, check, dashboard, explain, replay, report, startup, worker
from tuner.commands import compile as compile_
from tuner.commands.line import command_line
from tuner.commands.options import Jobs, Kernels, Workloads
from tuner.errors import INTERRUPTED, TuneError, printable
from tuner.storage import STORAGE_VARIABLE

#: What typer raises for a bad option; it has no public name in every supported release.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

HELP = """Tune the mHC kernels for the GPU (or CPU) in this machine and write a profile that `import mhc` finds.

Every configuration must first give the right numbers (against a float64 reference, on ragged token counts); then it is timed, alone on
the device. The best few are confirmed beside the default: a win must be clear of the noise, else the default ships. Ctrl-C keeps what is
done, and the same command again goes on where it stopped.

Several GPUs of one kind are all used. With --storage postgresql://..., `mhc-tune worker` on other machines joins in.

Exit codes: 0 something was tuned, 1 nothing was, 2 the command line or a file must be mended, 3 the storage or the last GPU was lost in
mid-run (what was finished is kept), 130 interrupted.
"""

EPILOG = """Examples:

  mhc-tune  (everything, for the GPU found here, else the CPU)

  mhc-tune --gpu h100 --workloads mhc-27b  (one model's shapes)

  mhc-tune --kernels pre,post_res --tokens 4096

  mhc-tune --effort full --time-limit 3600  (look harder, an hour at most)

  mhc-tune --gpu cpu --kernels pre --trials 2  (seconds, on a laptop)

  mhc-tune --storage postgresql://user@host/tuning  (a study that others join, with mhc-tune worker)

  mhc-tune check --static --gpu h100  (without a GPU: do the tuned programs still compile to the same instructions?)

  mhc-tune compile --gpu h100 -o bundle  (ship compiled kernels; needs no GPU)

  mhc-tune bench --help  (measure what was tuned, against its rivals)

  mhc-tune explain post_res 8192x4x2560 --gpu h100  (why this configuration, and how sure)
"""

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


class EffortName(str, Enum):
    quick = "quick"
    full = "full"


@app.callback(invoke_without_command=True, help=HELP, epilog=EPILOG)
def tune(
    context: typer.Context,
    gpu: Annotated[str, typer.Option(help="Device to tune: auto, cpu, or a GPU's profile name (h100, h200, ...).")] = "auto",
    kernels: Kernels = None,
    workloads: Workloads = None,
    workloads_file: Annotated[Path | None, typer.Option(help="YAML file of workloads. Default: configs/workloads.yaml.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token counts to tune at, instead of each workload's.", metavar="T,T")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Configurations tried per kernel and shape. Default: from --effort.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=1, help="Seconds for the whole run, shared out. Default: from --effort.")] = None,
    effort: Annotated[EffortName, typer.Option(help="How hard to look; see tuner/effort.py.")] = EffortName.quick,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the search and of the inputs.")] = 0,
    sampler: Annotated[
        str | None, typer.Option(help="Search: gp, tpe, random, or brute-force for every configuration. Default: gp.", metavar="NAME")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage URL, sqlite:/// or postgresql://. Default: SQLite in .mhc-tune/<gpu>.db.",
            metavar="URL",
            envvar=STORAGE_VARIABLE,
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs to measure on, by number: 0,1. Default: all of the kind tuned for.", metavar="N,N")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Profile to write. Default: configs/<gpu>.yaml.")] = None,
    jobs: Jobs = None,
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
        command=command_line(),
        sampler=sampler,
        devices=devices,
    )
    raise typer.Exit(run(request))


def _typed(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option, by its name: the enum that says so has no stable home among typer's releases."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


app.command("bench", help=bench.HELP, epilog=bench.EPILOG)(bench.bench)
app.command("startup", help=startup.HELP, epilog=startup.EPILOG)(startup.startup)
app.command("replay", help=replay.HELP, epilog=replay.EPILOG)(replay.replay)
app.command("explain", help=explain.HELP, epilog=explain.EPILOG)(explain.explain)
app.command("compile", help=compile_.HELP, epilog=compile_.EPILOG)(compile_.compile_profile)
app.command("check", help=check.HELP, epilog=check.EPILOG)(check.check)
app.command("dashboard", help=dashboard.HELP)(dashboard.dashboard)
app.command("worker", help=worker.HELP)(worker.worker)
app.command("report", help=report.HELP, epilog=report.EPILOG)(report.report)


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
    print(f"mhc-tune: {printable(message)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
