"""The command line itself."""

from __future__ import annotations

import shlex
import sys

from tuner.storage import redact_text


def command_line() -> str:
    """What was typed, for the record: as text (a file's name need not be), and without a password."""
    # bytes that are no text can stand in an argument, but not in a profile
    text = shlex.join(["mhc-tune", *map(redact_text, sys.argv[1:])])
    return text.encode("utf-8", "backslashreplace").decode("utf-8").encode("utf-8", "backslashreplace").decode()
