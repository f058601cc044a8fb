"""``mhc-tune check --static``: compile what a profile ships and compare it with the committed fingerprints; no GPU is needed.

Every distinct program of the profile is compiled once for the profile's architecture, in processes that can be killed. When a change of a
fingerprint is a regression is tuner/fingerprint_rules.py's word.

Another toolchain than the committed fingerprints': TileLang's release is pinned in pyproject.toml, so another one is a change of this
repository, on trial like any other. nvcc is whatever the machine has: what another release of it made is compared and shown all the same,
but as a warning, or a laptop with a newer CUDA would fail every commit for what none of them did. ``--strict`` makes it count, for who is
about to change the compiler that ships.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mhc.profile import reason_against
from mhc.schema import Profile
from tl_kernels import KERNELS
from tl_kernels.spec import Kernel, Problem
from tuner.check_report import Report, Row, print_report, write_reports
from tuner.compile_each import compile_each
from tuner.display import make_console
from tuner.errors import TuneError
from tuner.explain import PLAIN_WIDTH
from tuner.fingerprint import Fingerprint, Fingerprints, fingerprint_job, fingerprints_path, read_fingerprints, write_fingerprints
from tuner.fingerprint_rules import compare
from tuner.hardware import Hardware, find_compiler
from tuner.sass import find_nvdisasm
from tuner.selection import Selection, find_profile, load, nothing_passes
from tuner.workers import WorkerError

SAME, REGRESSED, NOT_COMPILED = 0, 1, 3


@dataclass(frozen=True)
class StaticRequest:
    """The command line as typed; None means the default."""

    gpu: str = "auto"
    profile: str | None = None
    selection: Selection = field(default_factory=Selection)
    fingerprints: Path | None = None
    jobs: int | None = None
    update: bool = False
    strict: bool = False
    json: Path | None = None
    junit: Path | None = None
    summary: Path | None = None
    command: str = "mhc-tune check --static"


@dataclass(frozen=True)
class Program:
    """One distinct program of a profile; ``why_not``: why it cannot be compiled as the kernels now are, or None."""

    name: str
    kernel: Kernel
    p: Problem
    config: dict[str, Any]
    why_not: str | None
    stale: bool


def programs_of(profile: Profile, request: StaticRequest) -> list[Program]:
    """The distinct programs of a profile's entries, those of the filters, in the profile's order. Raises :class:`TuneError`."""
    from tuner.bench_compile import describe

    found: dict[str, Program] = {}
    for entry in request.selection.entries(profile):
        if entry.impl == "reference":
            continue
        kernel = KERNELS[entry.kernel]
        p = kernel.problem(entry.n, entry.C, entry.dtype)
        name = describe((kernel, p, entry.config))
        if name not in found:
            why_not = reason_against(kernel, p, entry.config, kernel.default(p))
            found[name] = Program(name, kernel, p, dict(entry.config), why_not, entry.source_hash != kernel.source_hash)
    if not found:
        raise nothing_passes()
    return list(found.values())


def static_check(request: StaticRequest, console: Console | None = None) -> int:
    """Compile, compare, print and write. Returns the exit code; raises :class:`TuneError` for what the user can mend."""
    if console is None:
        console = make_console(PLAIN_WIDTH)
    name, path = find_profile(request.gpu, request.profile)
    profile = load(path)
    arch = profile.provenance.arch
    if arch == "cpu":
        raise TuneError(f"{path}: got a profile of a CPU, wanted one of a GPU: g++'s programs have no fingerprint")
    file = request.fingerprints or fingerprints_path(path)
    accept = f"mhc-tune check --static {'--gpu' if request.profile is None else '--profile'} {shlex.quote(name)} --update"
    committed = _committed(file, arch, request.update, accept)
    programs = programs_of(profile, request)
    find_compiler(Hardware(profile=name, name=profile.provenance.gpu, arch=arch))
    find_nvdisasm()
    compiled = _compile(programs, arch, request.jobs, console)
    rows = [_row(program, committed.programs.get(program.name), compiled[program.name], arch, request) for program in programs]
    data = {"mode": "static", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": request.command}
    report = Report(f"{path.stem}, {arch}", tuple(rows), _notes(programs, committed, compiled, request, accept), data=data)
    verdicts = report.counts
    failed = "regressed" in verdicts or "uncovered" in verdicts
    code = REGRESSED if failed else NOT_COMPILED if "not compiled" in verdicts else SAME
    print_report(report, console)
    if request.update:
        fresh = {program: found for program, (found, _) in compiled.items() if isinstance(found, Fingerprint)}
        # what did not compile keeps what it had, as does what was not looked at
        kept = {p: f for p, f in committed.programs.items() if p in compiled or not request.selection.is_whole}
        write_fingerprints(file, Fingerprints(arch=arch, programs={**kept, **fresh}))
        console.print(escape(f"wrote {len(fresh)} of {len(kept | fresh)} fingerprints to {file}"), soft_wrap=True)
    write_reports(report, code, request.json, request.junit, request.summary)
    return code


def _committed(file: Path, arch: str, update: bool, accept: str) -> Fingerprints:
    """Those to compare with; ``accept``: the command that writes them."""
    if update and not file.exists():
        return Fingerprints(arch=arch, programs={})
    committed = read_fingerprints(file, accept)
    if committed.arch != arch:
        raise TuneError(f"--fingerprints {file}: got fingerprints of {committed.arch}, wanted those of the profile's {arch}")
    return committed


Compiled = dict[str, tuple["Fingerprint | str", float]]


def _compile(programs: Sequence[Program], arch: str, jobs: int | None, console: Console) -> Compiled:
    """Program -> its fingerprint, or on one line why there is none; and the seconds it took."""
    found: Compiled = {program.name: (program.why_not, 0.0) for program in programs if program.why_not}
    todo = {program.name: (program.kernel.name, program.p, program.config, arch) for program in programs if not program.why_not}
    for name, result in compile_each(fingerprint_job, todo, jobs, console).items():
        if isinstance(result, WorkerError):
            found[name] = str(result), 0.0
        else:
            seconds = result.pop("seconds")
            found[name] = Fingerprint(**result), seconds
    return found


def _row(program: Program, was: Fingerprint | None, compiled: tuple[Fingerprint | str, float], arch: str, request: StaticRequest) -> Row:
    """With ``--update`` nothing has regressed: what is now is what is wanted."""
    now, seconds = compiled
    if isinstance(now, str):
        return Row(program.kernel.name, program.name, "not compiled", (now,), {"was": was and was.model_dump(), "now": None}, seconds)
    data = {"was": was and was.model_dump(), "now": now.model_dump()}
    if was is None:
        verdict = "noted" if request.update else "uncovered"
        return Row(program.kernel.name, program.name, verdict, ("no committed fingerprint",), data, seconds)
    findings = compare(was, now, arch)
    verdict = findings[0].level if findings else "same"
    texts = [finding.text for finding in findings]
    if findings and was.nvcc != now.nvcc:
        texts.append(f"by nvcc {now.nvcc}, committed by {was.nvcc}")
        verdict = "warned" if verdict == "regressed" and not request.strict and was.tilelang == now.tilelang else verdict
    if verdict == "regressed" and request.update:
        verdict = "noted"
    return Row(program.kernel.name, program.name, verdict, tuple(texts), data, seconds)


def _notes(
    programs: Sequence[Program], committed: Fingerprints, compiled: Compiled, request: StaticRequest, accept: str
) -> tuple[str, ...]:
    notes = []
    pairs = [(committed.programs[name], now) for name, (now, _) in compiled.items() if name in committed.programs]
    both = [(was, now) for was, now in pairs if isinstance(now, Fingerprint)]
    for what, counts in (("nvcc", request.strict), ("tilelang", True)):
        others = sorted({(getattr(was, what), getattr(now, what)) for was, now in both if getattr(was, what) != getattr(now, what)})
        if others:
            changes = ", ".join(f"{old} -> {new}" for old, new in others)
            note = f"toolchain: {what} {changes}"
            notes.append(note if counts else f"{note}; what it made worse is a warning (--strict makes it count)")
    stale = sum(program.stale for program in programs)
    if stale:
        notes.append(f"{stale} programs come from entries tuned for another version of their kernel; `import mhc` does not use them")
    uncovered = sum(name not in committed.programs for name, (now, _) in compiled.items() if isinstance(now, Fingerprint))
    if uncovered and not request.update:
        notes.append(f"{uncovered} programs have no committed fingerprint; to write them: {accept}")
    gone = committed.programs.keys() - {program.name for program in programs}
    if gone and request.selection.is_whole:
        notes.append(f"{len(gone)} fingerprints are of programs that the profile no longer has; --update drops them")
    return tuple(notes)
