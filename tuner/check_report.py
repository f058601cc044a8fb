"""What a check found: as a table on the terminal, JSON, JUnit XML for a CI server, and Markdown for a pull request."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mhc.files import replace_file
from mhc.yamlfile import printable
from tuner.errors import writing

#: The worst first: label -> style, and whether it fails the check.
VERDICTS = {
    "regressed": ("red", True),
    "not compiled": ("red", True),
    "uncovered": ("red", True),
    "not measured": ("red", True),
    "warned": ("yellow", False),
    "clocks": ("yellow", False),
    "better": ("green", False),
    "improved": ("green", False),
    "noise": ("", False),
    "noted": ("", False),
    "same": ("dim", False),
}


#: Of those that fail: a CI server counts them as errors, not as failures.
ERRORS = ("not compiled", "not measured")


@dataclass(frozen=True)
class Row:
    """One program, or entry: ``findings`` in words, the worst first; ``data`` goes into the JSON as it is."""

    kernel: str
    name: str
    verdict: str
    findings: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """A whole check. ``notes``: what holds for all rows, a sentence each; ``what`` a row is; ``data`` goes into the JSON as it is."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    what: str = "program"
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> programs, the worst first; those of none left out."""
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    @property
    def headline(self) -> str:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        plural = {"entry": "entries"}.get(self.what, f"{self.what}s")
        return f"{self.title}: {len(self.rows)} {plural}, {counts or 'nothing to compare'}"

    @property
    def moved(self) -> list[Row]:
        """All that is not the same, the worst first."""
        order = list(VERDICTS)
        return sorted((row for row in self.rows if row.verdict != "same"), key=lambda row: order.index(row.verdict))


def print_report(report: Report, console: Console) -> None:
    """The rows that moved, and the counts."""
    if report.moved:
        table = Table(title_justify="left", pad_edge=False)
        table.add_column(report.what, overflow="fold")
        table.add_column("verdict", no_wrap=True)
        table.add_column("what changed", overflow="fold")
        for row in report.moved:
            table.add_row(escape(row.name), escape(row.verdict), escape("\n".join(row.findings)), style=VERDICTS[row.verdict][0])
        console.print(table)
    for note in report.notes:
        console.print(escape(note), soft_wrap=True)
    console.print(escape(report.headline), soft_wrap=True)


def json_text(report: Report, exit_code: int) -> str:
    rows = [
        {"kernel": row.kernel, "program": row.name, "verdict": row.verdict, "findings": list(row.findings), **row.data}
        for row in report.rows
    ]
    whole = {"title": report.title, "exit_code": exit_code, "counts": report.counts, "notes": list(report.notes), **report.data}
    whole["programs"] = rows
    return json.dumps(whole, indent=1) + "\n"


def junit_text(report: Report, exit_code: int) -> str:
    """A test case a row: what fails the check is a failure, what did not compile or was not measured an error. One more, an error, for a
    check that ended early and has no other.
    """
    failing = sum(count for verdict, count in report.counts.items() if VERDICTS[verdict][1])
    errors = sum(report.counts.get(verdict, 0) for verdict in ERRORS)
    cut_short = exit_code not in (0, 1) and not errors
    tests = len(report.rows) + cut_short
    attributes = {"tests": str(tests), "failures": str(failing - errors), "errors": str(errors + cut_short)}
    root = ET.Element("testsuites", attributes)
    suite = ET.SubElement(root, "testsuite", {"name": report.title, **attributes})
    for row in report.rows:
        case = ET.SubElement(suite, "testcase", {"classname": row.kernel, "name": row.name, "time": f"{row.seconds:.3f}"})
        # a control character is no XML, not even escaped
        text = "\n".join(map(printable, row.findings))
        if VERDICTS[row.verdict][1]:
            tag = "error" if row.verdict in ERRORS else "failure"
            ET.SubElement(case, tag, {"message": printable(text), "type": row.verdict}).text = text
        elif text:
            ET.SubElement(case, "system-out").text = f"{row.verdict}: {text}"
    if cut_short:
        case = ET.SubElement(suite, "testcase", {"classname": "check", "name": "the whole check"})
        text = "\n".join(map(printable, report.notes))
        ET.SubElement(case, "error", {"message": f"incomplete, exit code {exit_code}", "type": "incomplete"}).text = text
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown_text(report: Report, exit_code: int) -> str:
    """Short enough for a comment: a table of what moved. It failed where something is slower, whatever else ended it early."""
    failed = any(VERDICTS[verdict][1] and verdict not in ERRORS for verdict in report.counts)
    outcome = "Passed" if exit_code == 0 else "Failed" if failed else "Incomplete"
    lines = [f"### {outcome}: {_cell(report.headline)}", ""]
    if report.moved:
        lines += [f"| {report.what} | verdict | what changed |", "| --- | --- | --- |"]
        lines += [f"| {_cell(row.name)} | {row.verdict} | {'<br>'.join(map(_cell, row.findings))} |" for row in report.moved]
        lines.append("")
    lines += [f"{_cell(note)}\n" for note in report.notes]
    return "\n".join(lines).rstrip("\n") + "\n"


def _cell(text: str) -> str:
    """Text as it is: nothing in it is markup, and no column ends in it."""
    text = printable(text)
    for character in "\\`*_|[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;")


def write_reports(report: Report, exit_code: int, json_path: Path | None, junit: Path | None, summary: Path | None) -> None:
    """Write those that have a path. Raises :class:`TuneError`."""
    wanted = (("--json", json_path, json_text(report, exit_code)), ("--junit", junit, junit_text(report, exit_code)))
    for option, path, text in (*wanted, ("--summary", summary, markdown_text(report, exit_code))):
        if path is None:
            continue
        with writing(f"{option} {path}"):
            replace_file(path, text)
