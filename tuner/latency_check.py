"""``mhc-tune check``: what a profile ships, timed again on the device at hand, and what became slower since.

Three modes. Against a baseline, the times that a profile recorded (by default those of the profile itself). Against another revision of
this repository, its kernels and its profile's configurations timed in turns with those at hand (tuner/against.py). And calibration: runs
of identical code, from which come the noise bands beside the profile and the rate of false alarms (tuner/noise.py).

Times are medians of runs, a fresh process each (tuner/latency_runs.py); tuner/regression.py says what has moved, tuner/attribution.py why.

``--json`` writes what every check writes (tuner/check_report.py: title, exit_code, counts, notes, programs), and at the top level
``mode`` ("baseline", "against", "calibrate"), ``date``, ``command``, ``gpu``, ``arch``, ``versions`` (release by name), ``profile`` (its
file), ``against`` ({rev, commit} or null), ``baseline`` (file, or null), ``runs`` (complete ones), ``rule`` ({tolerance, floor_us}),
``copy_gbps`` ({now, before}, GB/s or null) and ``false_alarms`` (null, or {entries, runs, judged, regressed, improved, runs_with_alarm,
rate}, see :class:`tuner.noise.FalseAlarms`). Each of ``programs`` is an entry: kernel, program (its name), verdict ("regressed", "clocks",
"improved", "noise", "same", "noted", "not measured"), findings (in words), ``key`` ({n, C, dtype, tokens}), ``causes`` (of
:data:`tuner.attribution.CAUSES`), ``now`` and ``before`` ({runs: medians in us, config, impl, clock_mhz, dirty}, or null), ``now_us``,
``before_us``, ``ratio`` (now / before; against a revision the median of the runs' ratios, and now_us is before_us times that), ``band``
(a share) and ``band_from`` ("calibration", "own runs", "pooled", "none"); null where nothing was measured or compared.
"""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape

from tl_kernels import NAMES
from tuner.against import Revision, worktree
from tuner.check_report import Report, print_report, write_reports
from tuner.display import make_console
from tuner.errors import INTERRUPTED, TuneError
from tuner.explain import PLAIN_WIDTH
from tuner.latency_case import Case
from tuner.latency_job import surface_job
from tuner.latency_plan import LatencyRequest, Plan, make_plan
from tuner.latency_report import HERE, Found, Other, some
from tuner.latency_runs import Runs, Side
from tuner.noise import noise_path, write_noise
from tuner.run import term_is_interrupt
from tuner.waiting import answer
from tuner.workers import COMPILE_ENV, WorkerError, WorkerPool

SAME, REGRESSED, NOT_MEASURED = 0, 1, 3
SURFACE_S = 120.0


def latency_check(request: LatencyRequest, console: Console | None = None) -> int:
    """Measure, compare, print and write. Returns the exit code; raises :class:`TuneError` for what the user can mend."""
    if console is None:
        console = make_console(PLAIN_WIDTH)
    plan = make_plan(request)
    with term_is_interrupt():
        if request.against is None:
            return _check(plan, None, console)
        with worktree(request.against) as revision:
            return _check(plan, _other(plan, revision), console)


def _other(plan: Plan, revision: Revision) -> Other:
    """What the other revision would measure. Raises :class:`TuneError` where it cannot be measured at all."""
    names = list(plan.cases)
    with WorkerPool(1, env=COMPILE_ENV, path=revision.path) as pool:
        try:
            wanted = [plan.cases[name] for name in names]
            found = answer(pool.submit(surface_job, plan.path.stem, wanted, revision.path[-1], timeout=SURFACE_S))
        except WorkerError as e:
            raise TuneError(f"--against {revision.rev}: {revision.commit[:12]} has not what today's check needs of it: {e}") from None
    reasons: Counter[str] = Counter(why for why in found["cases"] if isinstance(why, str))
    notes = [f"{count} entries are not in {revision.name}: {why}" for why, count in reasons.items()]
    if not found["profile"]:
        notes.append(f"{revision.name} has no profile called {plan.path.stem}: its kernels run with defaults")
    elif found["untuned"]:
        notes.append(f"{found['untuned']} entries are not in the profile of {revision.name}: it runs what it serves there")
    only = [name for name in found["kernels"] if name not in NAMES]
    if plan.request.selection.is_whole:
        only += [name for name in found["entries"] if name not in plan.entries and name.split()[0] not in only]
    if only:
        notes.append(f"only in {revision.name}: {some(only)}")
    cases = {name: case for name, case in zip(names, found["cases"], strict=True) if isinstance(case, Case)}
    if names and not cases:
        raise TuneError(f"--against {revision.rev}: nothing is in both revisions; {'; '.join(notes)}")
    return Other(revision, cases, found["hashes"], tuple(notes))


def _check(plan: Plan, other: Other | None, console: Console) -> int:
    opening = f"{plan.hardware.name}: {len(plan.cases)} entries, {plan.runs} runs"
    console.print(escape(f"{opening} a revision, against {other.revision.name}" if other else opening), soft_wrap=True)
    sides = [Side(HERE, plan.cases), *([Side(other.revision.name, other.cases, other.revision.path)] if other else [])]
    runs = Runs(sides, plan.hardware.arch, plan.lock, console, plan.env, plan.request.jobs)
    interrupted = False
    try:
        runs.compile()
        runs.measure(plan.runs)
    except KeyboardInterrupt:
        if not runs.found[HERE]:
            raise
        interrupted = True
    found = Found(plan, other, runs, interrupted)
    report = found.report()
    print_report(report, console)
    code = INTERRUPTED if interrupted else _exit_code(report, runs)
    request = plan.request
    write_reports(report, code, request.json, request.junit, request.summary)
    if found.noise is not None:
        write_noise(noise_path(plan.path), found.noise)
        console.print(escape(f"wrote {len(found.noise.entries)} bands to {noise_path(plan.path)}"), soft_wrap=True)
    return code


def _exit_code(report: Report, runs: Runs) -> int:
    if "regressed" in report.counts:
        return REGRESSED
    return NOT_MEASURED if "not measured" in report.counts or runs.lost is not None else SAME
