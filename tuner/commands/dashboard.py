"""``mhc-tune dashboard``: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from tuner.storage import STORAGE_VARIABLE

HELP = """Look at the studies of a tuning run, also while it runs: optuna-dashboard on its storage, at http://127.0.0.1:8080/dashboard.

Served to this machine only (from elsewhere: ssh -L 8080:127.0.0.1:8080), and for looking only: nothing there can change a study.
"""


def dashboard(
    storage: Annotated[
        str | None, typer.Option(help="Storage URL. Default: SQLite in .mhc-tune/<gpu>.db.", metavar="URL", envvar=STORAGE_VARIABLE)
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
) -> None:
    from tuner.dashboard import run_dashboard
    from tuner.run import STATE

    raise typer.Exit(run_dashboard(storage, port, STATE))
