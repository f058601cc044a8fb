"""``mhc-tune report``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.line import command_line

HELP = """Turn results into one HTML page: against rivals, roofline, tuned against default, history over commits, provenance.

Read are results/<gpu>/ (bench.json, */bench.json, tune*.json, replay.json, check*.json, startup.json) and the profiles; in a git checkout
also the results of earlier commits. Nothing is measured; what is missing is said on the page. It needs no network, no script, no other
file.
"""

EPILOG = """Examples:

  mhc-tune report  (of results/, to results/report.html)

  mhc-tune report --results /tmp/mine -o /tmp/mine.html

  mhc-tune report --readme  (only print small tables: the first shape of each bench.json, and small token counts)
"""


def report(
    results: Annotated[Path, typer.Option(help="Folder of results, with a folder a GPU.")] = Path("results"),
    profiles: Annotated[Path | None, typer.Option(help="Folder of profiles. Default: the packaged ones.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Page to write. Default: report.html in --results.")] = None,
    readme: Annotated[bool, typer.Option("--readme", help="Write nothing: print small tables for a README.")] = False,
) -> None:
    from tuner.report import ReportRequest, run_report

    out = results / "report.html" if output is None else output
    raise typer.Exit(run_report(ReportRequest(results, profiles, out, readme, command_line())))
