"""The command ``mhc-tune``."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tuner.commands import bench, check, dashboard, explain, replay, report, startup, worker
from tuner.commands import compile as compile_
from tuner.commands.line import command_line
from tuner.commands.options import Jobs, Kernels, Workloads
from tuner.errors import INTERRUPTED, TuneError
from tuner.storage import STORAGE_VARIABLE

_NOTHING_YET = "mhc-tune: interrupted before anything was measured"

#: What typer raises for a bad option; it has no public name in every supported release.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

HELP = """Tune the mHC kernels for the GPU (or CPU) in this machine and write a profile, configs/<gpu>.yaml.

In a checkout of this project `import mhc` finds it there; elsewhere the last line says how to use it (MHC_PROFILE, mhc.load_profile).

Every configuration must first give the right numbers (against a float64 reference, on ragged token counts); then it is timed, alone on
the device. The best few are confirmed beside the default: a win must be clear of the noise, else the default ships. Ctrl-C keeps what is
done, and the same command again goes on where it stopped.

Several GPUs of one kind are all used. With --storage postgresql://..., `mhc-tune worker` on other machines joins in.

Exit codes: 0 something was tuned, 1 nothing was, 2 the command line or a file must be mended, 3 the storage or the last GPU was lost in
mid-run, or a full disk or the like failed one job after another (what was finished is kept), 130 interrupted.
"""

EPILOG = """Examples:

  mhc-tune  (everything, for the GPU found here, else the CPU)

  mhc-tune --gpu h100 --workloads mhc-27b  (one model's shapes)

  mhc-tune --shapes 8192x4x3072,2048x4x3072  (tokens x streams x channels of a model of your own)

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


def _print_version(wanted: bool) -> None:
    """The versions that decide what a kernel is, and end; read from the installation, so that nothing heavy is imported."""
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        for name in ("mhc-kernels", "tilelang", "torch", "optuna"):
            try:
                print(name, version(name))
            except PackageNotFoundError:  # a checkout that is not installed
                print(name, "is not installed")
        raise typer.Exit


@app.callback(invoke_without_command=True, help=HELP, epilog=EPILOG)
def tune(
    context: typer.Context,
    gpu: Annotated[str, typer.Option(help="Device to tune: auto, cpu, or a GPU's profile name (h100, h200, ...).")] = "auto",
    kernels: Kernels = None,
    workloads: Workloads = None,
    workloads_file: Annotated[
        Path | None, typer.Option(help="YAML file of workloads. Default: the package's own, configs/workloads.yaml of a checkout.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Shapes TxnxC of your own, instead of workloads: 8192x4x3072,2048x4x3072.", metavar="TxnxC,..")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of --shapes: bfloat16 (default), float16 or float32.")] = None,
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
    output: Annotated[Path | None, typer.Option(help="Profile to write. Default: configs/<gpu>.yaml, here.")] = None,
    jobs: Jobs = None,
    raw: Annotated[Path | None, typer.Option(help="Also write every trial as JSON.", metavar="PATH")] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the versions of mhc-kernels and what it runs on.", callback=_print_version, is_eager=True),
    ] = False,
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
        shapes=shapes,
        dtype=dtype,
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
    """Entry point: one line on stderr, and an exit code, for what the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the name of a file need not be what the terminal can show
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        code = _invoke()
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        print(_NOTHING_YET, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except TuneError as e:
        _refuse(str(e), e.code)
    except _UsageError as e:
        _refuse(f"{e.format_message()} (mhc-tune --help explains)")
    except OSError as e:
        if _in_tilelang(e):
            _refuse(f"{e.filename}: TileLang cannot keep there what it compiles: {e.strerror}; set TILELANG_CACHE_DIR to a folder of yours")
        if not _output_fails():
            raise
        if isinstance(e, BrokenPipeError):  # its reader has seen enough
            sys.exit(1)
        _refuse(f"the output cannot be written: {e.strerror}")
    sys.exit(code)


def _interrupt(*_: object) -> None:
    """Ctrl-C. While torch is being imported, which is half of the time before a run begins, an exception would end in C++'s terminate()."""
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        print(_NOTHING_YET, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def _invoke() -> int:
    """The command's exit code. Not by calling ``app``: for a Ctrl-C that gives the code of a run which was interrupted and said so."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("mhc-tune", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as e:
        return e.exit_code
    return 0


def _in_tilelang(error: BaseException) -> bool:
    """Importing it makes the folder of its cache."""
    return any(str(frame.f_globals.get("__name__")).startswith("tilelang.") for frame, _ in traceback.walk_tb(error.__traceback__))


def _output_fails() -> bool:
    """Whether stdout takes nothing; what it was to take is dropped then, or Python would try again when it ends."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _refuse(message: str, code: int = 2) -> NoReturn:
    from mhc.yamlfile import printable  # imports torch, which takes a second

    print(f"mhc-tune: {printable(message)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
