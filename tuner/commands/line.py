"""The command line itself."""

from __future__ import annotations

import os
import shlex
import sys

from tuner.storage import redact_text

#: What else decides which programs a command's kernels run as.
_VARIABLES = ("MHC_BACKEND", "MHC_BUNDLE", "MHC_PROFILE", "MHC_RESERVED_SMS")


def command_line() -> str:
    """What was typed, for the record."""
    return typed("mhc-tune", *sys.argv[1:])


def typed(*command: str) -> str:
    """A command as text (a file's name need not be), without a password; before it the variables of ``mhc``."""
    # bytes that are no text can stand in an argument, but not in a profile
    variables = [f"{name}={shlex.quote(redact_text(os.environ[name]))}" for name in _VARIABLES if os.environ.get(name)]
    text = " ".join([*variables, shlex.join(map(redact_text, command))])
    return text.encode("utf-8", "backslashreplace").decode("utf-8").encode("utf-8", "backslashreplace").decode()
