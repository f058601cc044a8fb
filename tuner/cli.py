"""The command ``mhc-tune``."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tuner.errors import INTERRUPTED, TuneError, one_line, printable
from tuner.storage import STORAGE_VARIABLE, redact_text

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

  mhc-tune check --static  (without a GPU: do the tuned programs still compile to the same instructions?)

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
    kernels: Annotated[str | None, typer.Option(help="Kernels, separated by commas. Default: all.", metavar="A,B")] = None,
    workloads: Annotated[str | None, typer.Option(help="Workloads, separated by commas. Default: all.", metavar="A,B")] = None,
    workloads_file: Annotated[Path | None, typer.Option(help="YAML file of workloads. Default: configs/workloads.yaml.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token counts to tune at, instead of each workload's.", metavar="T,T")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Configurations tried per kernel and shape. Default: from --effort.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=1, help="Seconds for the whole run, shared out. Default: from --effort.")] = None,
    effort: Annotated[EffortName, typer.Option(help="How hard to look; see tuner/effort.py.")] = EffortName.quick,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the search and of the inputs.")] = 0,
    sampler: Annotated[
        str | None, typer.Option(help="Search: tpe, gp, random, or brute-force for every configuration. Default: tpe.", metavar="NAME")
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
        command=_command(),
        sampler=sampler,
        devices=devices,
    )
    raise typer.Exit(run(request))


def _command() -> str:
    """What was typed, for the record: as text (a file's name need not be), and without a password."""
    # bytes that are no text can stand in an argument, but not in a profile
    text = shlex.join(["mhc-tune", *map(redact_text, sys.argv[1:])])
    return text.encode("utf-8", "backslashreplace").decode("utf-8").encode("utf-8", "backslashreplace").decode()


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
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the inputs and parameters.")] = 0,
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

        try:
            table = readme_table(read_result(readme))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise TuneError(f"--readme {readme}: is no bench.json of mhc-tune bench: {one_line(e)}") from None
        print(table, end="")
        return
    from tuner.bench import bench as run_bench
    from tuner.bench_plan import BenchRequest

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


STARTUP_HELP = """Time the start of a training script up to the end of its first step: compiling, from caches, and from a bundle.

Each start is a process of its own with one boundary around the identity layer, forward + backward. Rivals as in `mhc-tune bench`: their
compilers' caches start empty too. Writes startup.json and startup.md; Ctrl-C keeps what is done.
"""

STARTUP_EPILOG = """Examples:

  mhc-tune startup --bundle bundle  (ours: cold, cached, and from what `mhc-tune compile` wrote)

  mhc-tune startup --rivals ours,liger,tile-kernels --repeats 1

  mhc-tune startup --gpu cpu --shape 64x4x1280  (on a laptop)
"""


@app.command("startup", help=STARTUP_HELP, epilog=STARTUP_EPILOG)
def startup(
    gpu: Annotated[str, typer.Option(help="auto, cpu, or a GPU such as h100 that must be this machine's.")] = "auto",
    shape: Annotated[str | None, typer.Option(help="Shape. Default: 8192x4x2560, on the CPU 64x4x1280.", metavar="TxnxC")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the streams: bfloat16, float16 or float32.")] = "bfloat16",
    rivals: Annotated[str | None, typer.Option(help="Rivals, separated by commas, ours among them. Default: ours.", metavar="A,B")] = None,
    rival_env: Annotated[
        list[str] | None,
        typer.Option(help="A rival's environment: interpreter, folder of packages, or script to source.", metavar="NAME=PATH"),
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle that `mhc-tune compile` wrote, for one more way to start ours.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is started.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. Default: results/<gpu>.")] = None,
) -> None:
    from tuner.startup import StartupRequest, run_startup

    request = StartupRequest(
        command=_command(),
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


REPLAY_HELP = """Replay the search from a ledger, without a device: how many trials does each sampler need to come near the best?

A ledger is an exhaustive measurement, as `mhc-tune --sampler brute-force --raw FILE` writes it. Every sampler searches each of its studies
once per seed, with the tuner's own code, until a configuration within 2% of the ledger's best was measured; without the kernel's
hand-written starting points (cold) and, where it has some, with them (seeded). Writes replay.json and replay.png.
"""

REPLAY_EPILOG = """Examples:

  mhc-tune --kernels streams_grad --workloads mhc-27b --tokens 8192 --sampler brute-force --raw ledger.json  (measure one)

  mhc-tune replay ledger.json --out results/h100

  mhc-tune replay ledger.json --samplers tpe,random --seeds 10 --cold-only  (a quick look)
"""


@app.command("replay", help=REPLAY_HELP, epilog=REPLAY_EPILOG)
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
    from tuner.replay import ReplayRequest, run_replay
    from tuner.samplers import pick_samplers
    from tuner.workers import cores

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
        command=shlex.join(["mhc-tune", *sys.argv[1:]]),
    )
    raise typer.Exit(run_replay(request))


EXPLAIN_HELP = """Explain why a kernel runs with its configuration at a shape, how sure that is, how stale, and what other shapes get.

The choice is the one that `import mhc` makes, from the same profile; no GPU is needed. Exit code 1 where the entry that should serve was
tuned for another version of the kernel.
"""

EXPLAIN_EPILOG = """Examples:

  mhc-tune explain post_res 8192x4x2560  (with the profile of this machine)

  mhc-tune explain streams_grad 4096x4x7168 --gpu h100

  mhc-tune explain pre 1x8x4096 --profile out/h100.yaml --unseen 64x8x4096,8192x8x5120
"""


@app.command("explain", help=EXPLAIN_HELP, epilog=EXPLAIN_EPILOG)
def explain(
    kernel: Annotated[str, typer.Argument(help="Kernel, as in --kernels.", metavar="KERNEL", show_default=False)],
    shape: Annotated[str, typer.Argument(help="Tokens, streams and channels.", metavar="TxnxC", show_default=False)],
    dtype: Annotated[str, typer.Option(help="Dtype of the streams: bfloat16, float16 or float32.")] = "bfloat16",
    profile: Annotated[str | None, typer.Option(help="Profile, a path or a packaged name. Default: as `import mhc` here.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The packaged profile of this GPU (h100, cpu, ...).")] = None,
    unseen: Annotated[str | None, typer.Option(help="Other shapes to show. Default: a few around.", metavar="TxnxC,..")] = None,
) -> None:
    from tuner.explain import ExplainRequest
    from tuner.explain import explain as run_explain

    raise typer.Exit(run_explain(ExplainRequest(kernel, shape, dtype, profile, gpu, unseen)))


COMPILE_HELP = """Compile every program of a profile into a bundle, a folder that training code loads instead of compiling. Needs no GPU.

The bundle holds a shared library for each program (host code, and the code of its GPU) and manifest.json: architecture, releases of what
compiled it, hashes. It is used by `MHC_BUNDLE=bundle/ python train.py`, or mhc.load_bundle("bundle/"): no compiler is needed there, and
what does not fit (another architecture, release of TileLang or version of a kernel, a damaged file) is said and compiled there instead.
Shapes that the profile does not name are compiled there too.

Exit codes: 0 everything was compiled, 1 something was not (named; the bundle holds the rest), 2 the command line or a file must be mended,
130 interrupted. The folder is replaced as a whole at the end, or left as it was.
"""

COMPILE_EPILOG = """Examples:

  mhc-tune compile --gpu h100 -o bundle  (the packaged profile of that GPU)

  mhc-tune compile --profile out/h100.yaml -o bundle --jobs 8

  mhc-tune compile --gpu h100 --kernels pre,post_res -o bundle  (only these; others are compiled where they run)
"""


@app.command("compile", help=COMPILE_HELP, epilog=COMPILE_EPILOG)
def compile_profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: new, or a bundle to replace.", show_default=False)],
    gpu: Annotated[str | None, typer.Option(help="The packaged profile of this GPU (h100, cpu, ...).")] = None,
    profile: Annotated[str | None, typer.Option(help="Profile, a path or a packaged name, instead of that of --gpu.")] = None,
    kernels: Annotated[str | None, typer.Option(help="Kernels, separated by commas. Default: all.", metavar="A,B")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compile processes. Default: every core.")] = None,
) -> None:
    from tuner.bundle import CompileRequest, compile_bundle

    raise typer.Exit(compile_bundle(CompileRequest(gpu, output, profile, kernels, jobs, _command())))


CHECK_HELP = """Check that what a profile ships has not become slower, for CI.

Every entry of the profile is timed again on the GPU at hand (--gpu cpu: on the CPU), in --runs fresh processes, and compared with the times
of --baseline (default: those that the profile recorded), or with --against: another revision's kernels and configurations, taken from git
and timed in turns with these. An entry has regressed when it is slower by more than --tolerance, by more than --floor-us and by more than
its noise: what --calibrate found that runs of identical code differ by, else what those of this check do. Whatever moved is shown with its
cause: code, configuration, toolchain, clocks or noise. A slowdown that the clocks explain is a warning, unless --strict.

--static needs no GPU: every distinct program of the profile is lowered and compiled for its architecture, and its fingerprint (registers,
stack, shared memory, code size; width of every load and store, copies, matrix instructions, local memory, barriers) is compared with the
committed one, configs/<gpu>.fingerprints.json. A spill, a narrower access, more traffic, another matrix instruction, more shared memory or
less occupancy fails; other changes are noted. It needs nvcc and `pip install nvidia-cuda-nvdisasm`. Another release of nvcc than the
committed fingerprints': what it made worse is a warning, unless --strict. A change that is meant is committed with --update.

Exit codes: 0 the same or better, 1 regressed (--static: or a program has no committed fingerprint), 2 the command line or a file must be
mended, or the times are of another device, 3 something could not be measured or compiled (and none regressed), 130 interrupted (what was
measured is reported). --calibrate never exits with 1.
"""

CHECK_EPILOG = """Examples:

  mhc-tune check --gpu h100  (every entry against the times in configs/h100.yaml, three runs)

  mhc-tune check --gpu h100 --against origin/main --summary "$GITHUB_STEP_SUMMARY" --junit check.xml  (a pull request)

  mhc-tune check --kernels pre,post_res --shapes 8192x4x2560 --runs 5 --tolerance 0.03

  mhc-tune check --gpu h100 --calibrate 50 --json results/h100/check_noise.json  (noise bands beside the profile; false-alarm rate)

  mhc-tune check --gpu cpu --against HEAD~1 --kernels pre,post_res --runs 2  (on a laptop)

  mhc-tune check --static  (every program of the profile, 83 for the H100: three minutes on two cores; TileLang keeps what it compiled)

  mhc-tune check --static --kernels pre,post_res --shapes 8192x4x2560  (a sample)

  mhc-tune check --static --junit check.xml --summary "$GITHUB_STEP_SUMMARY"  (in a workflow)

  mhc-tune check --static --update  (accept what is now)
"""


@app.command("check", help=CHECK_HELP, epilog=CHECK_EPILOG)
def check(
    gpu: Annotated[
        str,
        typer.Option(help="GPU whose packaged profile to check, or cpu. auto: this machine's; with --static, or the only one there is."),
    ] = "auto",
    profile: Annotated[str | None, typer.Option(help="Profile, a path or a packaged name, instead of --gpu's.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Profile whose times count. Default: the one that is checked.", metavar="PATH")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Revision to time in turns with this one: commit, branch or tag.", metavar="REV")
    ] = None,
    calibrate: Annotated[
        int | None, typer.Option(min=3, help="Time identical code in N runs; write <profile>.noise.json beside the profile.", metavar="N")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs, a fresh process each. Default: 3.", metavar="N")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Slower by this share is not slower. Default: 0.05.", metavar="SHARE")] = None,
    floor_us: Annotated[float | None, typer.Option(help="Slower by these microseconds is not slower. Default: 0.5.", metavar="US")] = None,
    static: Annotated[bool, typer.Option("--static", help="Compile and compare fingerprints; no GPU is needed.")] = False,
    kernels: Annotated[str | None, typer.Option(help="Kernels, separated by commas. Default: all.", metavar="A,B")] = None,
    workloads: Annotated[str | None, typer.Option(help="Workloads, separated by commas. Default: all.", metavar="A,B")] = None,
    shapes: Annotated[str | None, typer.Option(help="Shapes of entries, separated by commas. Default: all.", metavar="TxnxC,..")] = None,
    fingerprints: Annotated[
        Path | None, typer.Option(help="Committed fingerprints. Default: <profile>.fingerprints.json beside it.", metavar="PATH")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the fingerprints that were found; nothing regresses then.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Slowdowns that clocks, or with --static another nvcc, explain count too.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compile processes. Default: every core.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON.", metavar="PATH")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML.", metavar="PATH")] = None,
    summary: Annotated[Path | None, typer.Option(help="Also write Markdown, for a pull request.", metavar="PATH")] = None,
) -> None:
    timed = {
        "--baseline": baseline,
        "--against": against,
        "--calibrate": calibrate,
        "--runs": runs,
        "--tolerance": tolerance,
        "--floor-us": floor_us,
    }
    only = timed if static else {"--fingerprints": fingerprints, "--update": update or None}
    wrong = [option for option, value in only.items() if value is not None]
    if wrong:
        why = "with --static, which times nothing" if static else "without --static, wanted both or none"
        raise TuneError(f"{wrong[0]}: got it {why}")
    if not static:
        from tuner.latency_check import latency_check
        from tuner.latency_plan import LatencyRequest
        from tuner.selection import Selection

        timed_request = LatencyRequest(
            gpu=gpu,
            profile=profile,
            selection=Selection(kernels, workloads, shapes),
            baseline=baseline,
            against=against,
            calibrate=calibrate,
            runs=runs,
            tolerance=tolerance,
            floor_us=floor_us,
            jobs=jobs,
            strict=strict,
            json=json,
            junit=junit,
            summary=summary,
            command=_command(),
        )
        raise typer.Exit(latency_check(timed_request))
    from tuner.static_check import StaticRequest, static_check

    request = StaticRequest(
        gpu=gpu,
        profile=profile,
        fingerprints=fingerprints,
        kernels=kernels,
        workloads=workloads,
        shapes=shapes,
        jobs=jobs,
        update=update,
        strict=strict,
        json=json,
        junit=junit,
        summary=summary,
    )
    raise typer.Exit(static_check(request))


DASHBOARD_HELP = """Look at the studies of a tuning run, also while it runs: optuna-dashboard on its storage, at http://127.0.0.1:8080/dashboard.

Served to this machine only (from elsewhere: ssh -L 8080:127.0.0.1:8080), and for looking only: nothing there can change a study.
"""


@app.command("dashboard", help=DASHBOARD_HELP)
def dashboard(
    storage: Annotated[
        str | None, typer.Option(help="Storage URL. Default: SQLite in .mhc-tune/<gpu>.db.", metavar="URL", envvar=STORAGE_VARIABLE)
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
) -> None:
    from tuner.dashboard import run_dashboard
    from tuner.run import STATE

    raise typer.Exit(run_dashboard(storage, port, STATE))


WORKER_HELP = """Join the studies of a running (or interrupted) `mhc-tune --storage URL` with this machine's devices, until none is open.

Only studies of the same device and of the same kernel sources are joined. A worker may be killed at any time: what it was trying is tried
again. It writes no profile, unless --output names one; the mhc-tune that began writes the profile of all that was found.

Exit codes: 0 no study is open any more, 2 the command line must be mended, 3 the storage or the last GPU was lost, 130 interrupted.
"""


@app.command("worker", help=WORKER_HELP)
def worker(
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL that mhc-tune was given.", metavar="URL", envvar=STORAGE_VARIABLE)
    ] = None,
    gpu: Annotated[str, typer.Option(help="Device to measure on: auto, cpu, or a GPU's profile name.")] = "auto",
    kernels: Annotated[str | None, typer.Option(help="Kernels, separated by commas. Default: all.", metavar="A,B")] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs to measure on, by number: 0,1. Default: all of one kind.", metavar="N,N")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compile processes. Default: every core.")] = None,
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
        command=_command(),
    )
    raise typer.Exit(work(request))


REPORT_HELP = """Turn results into one HTML page: against rivals, roofline, tuned against default, history over commits, provenance.

Read are results/<gpu>/ (bench.json, decode/bench.json, tune*.json, replay.json, check*.json) and the profiles; in a git checkout also
the results of earlier commits. Nothing is measured; what is missing is said on the page. It needs no network, no script, no other file.
"""

REPORT_EPILOG = """Examples:

  mhc-tune report  (of results/, to results/report.html)

  mhc-tune report --results /tmp/mine -o /tmp/mine.html

  mhc-tune report --readme  (only print the README's tables)
"""


@app.command("report", help=REPORT_HELP, epilog=REPORT_EPILOG)
def report(
    results: Annotated[Path, typer.Option(help="Folder of results, with a folder a GPU.")] = Path("results"),
    profiles: Annotated[Path | None, typer.Option(help="Folder of profiles. Default: the packaged ones.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Page to write. Default: report.html in --results.")] = None,
    readme: Annotated[bool, typer.Option("--readme", help="Write nothing: print the README's tables.")] = False,
) -> None:
    from tuner.report import ReportRequest, run_report

    out = results / "report.html" if output is None else output
    raise typer.Exit(run_report(ReportRequest(results, profiles, out, readme, _command())))


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
