"""Another revision of this repository beside the one at hand: its kernels, operators and profiles, timed by today's tuner.

``git worktree add --detach`` puts it into a temporary folder, which is gone again however the check ends. A process that is to run it
imports ``tuner`` from a folder that holds nothing but a link to today's, and everything else from the worktree after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tuner
from mhc.yamlfile import printable
from tuner.errors import TuneError

#: Seconds for one call of git; a checkout of this repository takes a tenth of one.
GIT_S = 120.0


@dataclass(frozen=True)
class Revision:
    """``rev`` as typed, its ``commit``, and what a process that runs it imports from, for :class:`tuner.workers.WorkerPool`; the last
    folder is the worktree.
    """

    rev: str
    commit: str
    path: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.rev if self.commit.startswith(self.rev) else f"{self.rev} ({self.commit[:12]})"


def repository() -> Path:
    """The checkout that this tuner is part of. Raises :class:`TuneError` in a wheel's installation, and without git."""
    top, why = Path(tuner.__file__).resolve().parents[1], ""
    try:
        found = _git(top, "rev-parse", "--show-toplevel")
        # an environment may well lie in somebody's repository
        tracked = _git(top, "ls-files", "--", "tuner/__init__.py") if os.path.samefile(found, top) else ""
    except OSError as e:
        raise TuneError(f"--against: git cannot be run: {e.strerror or e}") from None
    except (ValueError, subprocess.SubprocessError) as e:
        said = str(getattr(e, "stderr", None) or "").strip()  # also that the folder is somebody else's
        tracked, why = "", f" ({printable(said)[:200]})" if said else ""
    if not tracked:
        raise TuneError(f"--against: {top} is no git checkout of this project{why}, wanted one to take the other revision from")
    return top


def find_commit(rev: str) -> tuple[Path, str]:
    """The checkout and the full hash of the commit that ``rev`` names. Raises :class:`TuneError`."""
    top = repository()
    try:
        return top, _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    except (OSError, ValueError, subprocess.SubprocessError):
        raise TuneError(f"--against {rev}: no such revision in {top}, wanted a commit, branch or tag that is fetched here") from None


@contextlib.contextmanager
def worktree(rev: str) -> Iterator[Revision]:
    """``rev`` in a temporary worktree, which is removed whatever happens within. Raises :class:`TuneError` where it cannot be made."""
    top, commit = find_commit(rev)
    try:
        folder = Path(tempfile.mkdtemp(prefix="mhc-check-"))
    except OSError as e:
        raise TuneError(f"--against: no temporary folder: {e.strerror or e}; set TMPDIR") from None
    tree, shadow = folder / "tree", folder / "tuner-only"
    try:
        try:
            _git(top, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            shadow.mkdir()
            (shadow / "tuner").symlink_to(Path(tuner.__file__).resolve().parent, target_is_directory=True)
        except (OSError, subprocess.SubprocessError) as e:
            said = getattr(e, "stderr", None) or str(e)
            raise TuneError(f"--against {rev}: git worktree add: {printable(str(said))}") from None
        yield Revision(rev, commit, (str(shadow), str(tree)))
    finally:
        with _without_interrupts():
            # git locks what it is still making, and neither removes nor prunes that
            for arguments in (("unlock", str(tree)), ("remove", "--force", str(tree)), ("prune",)):
                with contextlib.suppress(OSError, subprocess.SubprocessError):
                    _git(top, "worktree", *arguments)
                if arguments[0] == "remove":  # what git would not remove; only what is gone can be pruned
                    shutil.rmtree(folder, ignore_errors=True)


def _git(folder: Path, *arguments: str) -> str:
    """Its output. No hooks; and a Ctrl-C in the terminal does not reach it."""
    # a hook that runs this command sets GIT_DIR for its own repository
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    command = ["git", "-c", f"core.hooksPath={os.devnull}", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=GIT_S,
        check=True,
        start_new_session=True,
    )
    return done.stdout.strip()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A second Ctrl-C, or SIGTERM, waits: what is being cleaned up is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
