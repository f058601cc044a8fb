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
"""

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


class EffortName(str, Enum):
    quick = "quick"
    full = "full"


@app.callback(invoke_without_command=True, help=HELP, epilog=EPILOG)
def tune(
    context: typer.Context,
    gpu: Annotated[str, typer.Option(help="Device to tune: auto, cpu, or a GPU's profile name (h100, h200, ...).")] = "auto",
    kernels: Annotated[str | None, typer.Option(help="Kernels, separated by commas. Default: all ten.", metavar="A,B")] = None,
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
