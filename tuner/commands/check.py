"""``mhc-tune check``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.line import command_line
from tuner.commands.options import Jobs, Kernels, Workloads
from tuner.errors import TuneError

HELP = """Check that what a profile ships has not become slower, for CI.

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

EPILOG = """Examples:

  mhc-tune check --gpu h100  (every entry against the times in configs/h100.yaml, three runs)

  mhc-tune check --gpu h100 --against origin/main --summary "$GITHUB_STEP_SUMMARY" --junit check.xml  (a pull request)

  mhc-tune check --kernels pre,post_res --shapes 8192x4x2560 --runs 5 --tolerance 0.03

  mhc-tune check --gpu h100 --calibrate 50 --json results/h100/check_noise.json  (noise bands beside the profile; false-alarm rate)

  mhc-tune check --gpu cpu --against HEAD~1 --kernels pre,post_res --runs 2  (on a laptop)

  mhc-tune check --static --gpu h100  (every program of the profile: minutes on two cores; TileLang keeps what it compiled)

  mhc-tune check --static --gpu h100 --kernels pre,post_res --shapes 8192x4x2560  (a sample)

  mhc-tune check --static --gpu h100 --junit check.xml --summary "$GITHUB_STEP_SUMMARY"  (in a workflow)

  mhc-tune check --static --gpu h100 --update  (accept what is now)
"""


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
    kernels: Kernels = None,
    workloads: Workloads = None,
    shapes: Annotated[str | None, typer.Option(help="Shapes of entries, separated by commas. Default: all.", metavar="TxnxC,..")] = None,
    fingerprints: Annotated[
        Path | None, typer.Option(help="Committed fingerprints. Default: <profile>.fingerprints.json beside it.", metavar="PATH")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the fingerprints that were found; nothing regresses then.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Slowdowns that clocks, or with --static another nvcc, explain count too.")
    ] = False,
    jobs: Jobs = None,
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
    from tuner.selection import Selection

    selection = Selection(kernels, workloads, shapes)
    if not static:
        from tuner.latency_check import latency_check
        from tuner.latency_plan import LatencyRequest

        timed_request = LatencyRequest(
            gpu=gpu,
            profile=profile,
            selection=selection,
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
            command=command_line(),
        )
        raise typer.Exit(latency_check(timed_request))
    from tuner.static_check import StaticRequest, static_check

    request = StaticRequest(
        gpu=gpu,
        profile=profile,
        selection=selection,
        fingerprints=fingerprints,
        jobs=jobs,
        update=update,
        strict=strict,
        json=json,
        junit=junit,
        summary=summary,
        command=command_line(),
    )
    raise typer.Exit(static_check(request))
