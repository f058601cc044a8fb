"""Starting a module of ours in a Python of its own, as ``python -m`` does, but nothing is imported from the working folder; and how many
of them have a core each. Imports no torch, for commands that have not read their options yet.

``python -m`` looks there first: a user's ``tuner.py`` or ``queue.py`` would take the place of what is meant. Python's own switch against
it, -P, is of 3.11.
"""

from __future__ import annotations

import os

#: The working folder is the empty name that -c puts onto the path; nothing but sys may be imported before it is gone.
_RUN = """import sys
sys.path[:] = filter(None, sys.path)
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""


def module_arguments(module: str, *arguments: str) -> list[str]:
    """What stands after the interpreter on the command line."""
    return ["-c", _RUN, module, *arguments]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
