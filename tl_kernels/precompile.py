"""``python -m tl_kernels.precompile RELEASE PROGRAM...``: compile programs into TileLang's disk cache, for other processes to load.

Several processes may be told the same programs at once, those of one rank and of all ranks of a node: each program is compiled by one of
them, and all end when all are compiled. A mark in the cache's folder tells that a program is there, so that nobody need import TileLang to
find out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tl_kernels import KERNELS
from tl_kernels.spec import Config, Kernel, Problem


def told(kernel: Kernel, p: Problem, cfg: Config, target: str) -> str:
    """PROGRAM."""
    return json.dumps([kernel.name, [p.n, p.C, p.dtype, p.options], dict(sorted(cfg.items())), target])


def mark(release: str, kernel: Kernel, p: Problem, cfg: Config, target: str) -> Path:
    """The file that names its entry in the cache once ``release`` of TileLang has compiled the program on such a processor."""
    text = told(kernel, p, cfg, target) + kernel.source_hash + release + platform.machine()
    return _folder() / hashlib.sha256(text.encode()).hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache") / "mhc"


def is_compiled(left: Path) -> bool:
    """Whether a mark is there, and the entry that it names."""
    try:
        return Path(left.read_text()).exists()
    except (OSError, UnicodeDecodeError):
        return False


def is_writable() -> bool:
    """Whether marks can be left here; if not, nobody has anything from a program that another process compiled."""
    try:
        _folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(_folder(), os.W_OK)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether nobody else holds ``path``; with ``wait`` True in the end. True where the file system has no locks."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
            stack.callback(os.close, file)
            signal.siginterrupt(signal.SIGINT, True)  # compiling for the CPU has it wait through a Ctrl-C
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        except (ImportError, OSError):
            mine = True
        yield mine


def main(release: str, *programs: str, tick: Callable[[], object] = lambda: None) -> None:
    """Compile what :func:`told` said and nobody else does, then wait for the others; ``tick`` after each.

    Raises what TileLang and the compiler raise.
    """
    for wait in (False, True):
        for program in programs:
            name, (n, C, dtype, options), cfg, target = json.loads(program)
            kernel, p = KERNELS[name], Problem(n, C, dtype, tuple((k, v) for k, v in options))
            left = mark(release, kernel, p, cfg, target)
            with _locked(left.with_suffix(".lock"), wait) as mine:
                if mine and not is_compiled(left):
                    entry = _compile(kernel, p, cfg, target)
                    if entry is not None:
                        with contextlib.suppress(OSError):
                            left.write_text(entry)
            tick()


def _compile(*program: Any) -> str | None:
    """The program's entry in TileLang's cache; None where it could not be kept there."""
    from tl_kernels.launch import compile_kernel

    compiled = compile_kernel(*program)
    return getattr(getattr(compiled, "jit", compiled), "_tilelang_cache_path", None)


if __name__ == "__main__":
    main(*sys.argv[1:])
