"""What the command line says in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

#: Exit code where the storage or the last device went away in mid-run, and after Ctrl-C, as a shell gives it.
LOST = 3
INTERRUPTED = 130


class TuneError(Exception):
    """The user must change something: printed as one line on stderr; ``code`` is the exit code."""

    code = 2


def unknown(what: str, got: str, known: Iterable[str]) -> TuneError:
    """The error for a name that does not exist, with the closest one that does."""
    names = sorted(known)
    close = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return TuneError(f"unknown {what} {got!r}{hint} (there are {', '.join(names)})")


@contextlib.contextmanager
def writing(where: str) -> Iterator[None]:
    """For what writes inside: an OSError becomes a :class:`TuneError` such as ``--out results: cannot be written: Permission denied``."""
    try:
        yield
    except OSError as e:
        raise TuneError(f"{where}: cannot be written: {e.strerror or e}") from None


#: Where TileLang begins to tell of g++ and of nvcc, and what these begin their complaints with. Before or after that stands the program.
_COMPILER = re.compile(r"Compilation (Failed!|error:)")
_COMPLAINT = re.compile(r"\b(error|fatal)\s*:")


def one_line(error: BaseException) -> str:
    """The line that says something: a compiler's complaint, else the last: TileLang's errors end in their cause after a C++ trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    compiler = next((i for i, line in enumerate(lines) if _COMPILER.match(line)), None)
    if compiler is not None:
        text = next((line for line in lines[compiler + 1 :] if _COMPLAINT.search(line)), lines[compiler])
    else:
        # PyTorch's CUDA errors say it first and end in advice
        text = next((line for line in lines if "CUDA error" in line), lines[-1] if lines else type(error).__name__)
    name = type(error).__name__
    return (text if text.startswith(name) else f"{name}: {text}")[:400]
