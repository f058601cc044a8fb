"""No command line, however malformed, ends in anything but a run or one line on stderr that names the option, with exit code 2.

The options are read from the commands themselves, so that those of a new command are spoilt too. What would tune, measure, serve or start
a process is planted; everything before it is real.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from hypothesis import strategies as st

from mhc import profile
from mhc.profile import packaged_dir
from tests.malformed import hunt
from tuner import cli, hardware
from tuner.pipeline import Pipeline
from tuner.writer import make_provenance

SECRET = "s3cret"
#: What the commands do once they believe their arguments.
BEGINNINGS = (
    "bench.Bench",
    "replay.WorkerPool",
    "dashboard._Server",
    "report.render",
    "workers.WorkerPool",
    "compile_each.WorkerPool",
)
#: Arguments with which a command would begin, where it needs any.
BASE = {
    "": ["--gpu", "cpu", "--kernels", "pre", "--workloads", "mhc-3b", "--tokens", "8"],
    "bench": ["--gpu", "cpu"],
    "worker": ["--gpu", "cpu", "--storage", "sqlite:///study.db"],
    "explain": ["pre", "64x4x1280"],
    "replay": ["bad.json"],
    "compile": ["--gpu", "h100", "-o", "bundle"],
    "check": ["--static", "--gpu", "h100"],
}
#: Others, where a command has modes that exclude each other's options.
OTHER_BASES = {"check": ["--gpu", "cpu", "--baseline", str(packaged_dir() / "cpu.yaml"), "--kernels", "streams_grad"]}
FILES = {
    "bad.yaml": "mhc-3b: {n: 4, C: [}\n",
    "bad.json": '{"shapes": [1]}',
    "deep.json": "[" * 100_000,
    "binary": "\x00\x01",
}


class Begun(BaseException):
    """A command believed its arguments."""


def begin(*args: Any, **kwargs: Any) -> None:
    raise Begun


def begin_tuning(pipeline: Pipeline) -> None:
    """As far as what a profile will say of this run, which is known only after minutes of work."""
    settings = pipeline.settings
    make_provenance(settings.hardware, 1.0, settings.seed, settings.trials, settings.command)
    raise Begun


# -- what is put in ------------------------------------------------------------------------------------------------------------------

# an argument has no NUL in it, and no other folder is to be written to
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "-",
        "--",
        ",",
        ",,",
        "\n",
        "a\nb",
        "\x1b[31m",
        "\udcff",
        "x" * 3000,
        "None",
        "auto",
        "é",
        "\u202e",
        "%s",
        "{}",
        "[bold]",
        "'",
        '"',
    ]
)
NUMBERS = st.sampled_from(
    ["0", "-1", "x", "1.5", "1e3", "", " ", "0x10", "1_0", "٣", "9" * 30, "9" * 5000, "nan", "inf", "-inf", "1e999", "1,2", "2147483648"]
)
LISTS = st.sampled_from(
    [
        "0",
        "-1",
        "1,x",
        "1.5",
        "1;2",
        "1,,0",
        ",",
        "",
        "9" * 30,
        "9" * 5000,
        "8192x4",
        "1x9x1",
        "0x4x64",
        "1x1x" + "9" * 5000,
        "1x1x1:",
        "axbxc",
    ]
)
PATHS = st.sampled_from(
    [
        ".", "..", "", "folder", "folder/.", "missing/dir/x", "bad.yaml", "bad.yaml/x", "binary", "bad.json", "deep.json", "fifo", "loop",
        "x" * 300, "\udcff", "a\nb", "~", "/dev/null", "/dev/full", "/dev/zero", "/dev/null/x", "/proc/x",
        "/proc/self/mem", "/proc/version",
    ]
)  # fmt: skip
URLS = st.sampled_from(
    [
        "nowhere://x", "://", ":", "sqlite", "sqlite://///", "sqlite:////proc/x.db", "sqlite:///folder", "sqlite:///bad.yaml",
        "sqlite:///missing/x.db", "sqlite:///x.db?timeout=soon", f"sqlite:///x.db?password={SECRET}&y", f"mysql://u:{SECRET}@127.0.0.1/x",
        f"postgresql://u:{SECRET}@127.0.0.1:1/x", f"postgresql://u:{SECRET}@127.0.0.1:port/x", f"postgresql://u:{SECRET}@[/x",
        f"postgresql+nodriver://u:{SECRET}@127.0.0.1/x", f"postgres://u:{SECRET}@127.0.0.1:1/x", f"redis://:{SECRET}@127.0.0.1:1",
        f"postgresql://u:a {SECRET} b@127.0.0.1:1/x", f"postgresql://127.0.0.1:1/x?user=u&password={SECRET}", f"http://u:{SECRET}@127.0.0.1",
    ]
)  # fmt: skip
NAMES = st.sampled_from(
    ["post_ress", "pre,,pre_", "pre pre", "mhc-27", "ours,liger+", "tpe;gp", "Pre", "h1000", "cuda:0", "bf16", "nope", "*"]
)


@dataclass(frozen=True)
class Parameter:
    """An option or an argument of a command, as its function declares it."""

    name: str
    kind: str
    is_argument: bool

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def values(self) -> st.SearchStrategy[str]:
        """Mostly bad ones."""
        if self.name == "storage":
            return URLS | TEXTS
        if "Path" in self.kind:
            return PATHS | TEXTS
        if "int" in self.kind or "float" in self.kind:
            return NUMBERS | TEXTS
        if self.name in ("tokens", "layers", "shapes", "shape", "unseen", "devices"):
            return LISTS | NUMBERS | TEXTS
        return NAMES | TEXTS | PATHS if self.name in ("profile", "rival_env") else NAMES | TEXTS


@functools.cache
def commands() -> dict[str, list[Parameter]]:
    """The parameters of every command by its name; ``""`` is the tuning itself."""
    functions = {"": cli.app.registered_callback.callback, **{c.name: c.callback for c in cli.app.registered_commands}}
    found: dict[str, list[Parameter]] = {}
    for name, function in functions.items():
        found[name] = []
        for key, hint in get_type_hints(function, include_extras=True).items():
            # Python 3.10 makes Optional[Annotated[...]] of a parameter whose default is None
            for declared in (hint, *get_args(hint)):
                if hasattr(declared, "__metadata__"):
                    is_argument = type(declared.__metadata__[0]).__name__ == "ArgumentInfo"
                    found[name].append(Parameter(key, str(declared.__origin__), is_argument))
                    break
    return found


@dataclass(frozen=True)
class Line:
    """A command line and what its complaint may name."""

    args: tuple[str, ...]
    spoilt: tuple[str, ...]


@st.composite
def lines(draw: st.DrawFn) -> Line:
    found = commands()
    name = draw(st.sampled_from(["", "", "", "bench", "bench", *(n for n in found if n not in ("", "bench"))]))
    base = OTHER_BASES.get(name) if draw(st.booleans()) else None
    args = list(BASE.get(name, []) if base is None else base)
    spoilt = {"replay": ["ledger"], "dashboard": ["storage"], "report": ["results"]}.get(name, [])
    for i, argument in enumerate(p for p in found[name] if p.is_argument):
        if draw(st.booleans()):
            args[i] = draw(argument.values)
            spoilt += [argument.name, *(["option", "argument"] if args[i].startswith("-") else [])]
    options = [p for p in found[name] if not p.is_argument]
    for option in draw(st.lists(st.sampled_from(options), min_size=1, max_size=2, unique=True)):
        spoilt.append(option.flag)
        args += [option.flag] if "bool" in option.kind else [option.flag, draw(option.values)]
    match draw(st.sampled_from(["as it is"] * 6 + ["unknown option", "no value", "extra", "before the command"])):
        case "unknown option":
            args.append("--" + draw(st.text("abcz-=\u00e9\n", min_size=1, max_size=8)))
            spoilt.append("option")
        case "no value":
            args.append(options[0].flag)
            spoilt.append(args[-1])
        case "extra":
            args.append(draw(TEXTS))
            spoilt += ["argument", "command", "option"]
        case "before the command":
            return Line(("--seed", "1", name or "bench", *args), (*spoilt, "--seed"))
    return Line((*filter(None, [name]), *args), tuple(spoilt))


# -- what comes out ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A working folder with a few bad files in it."""
    before, environment = os.getcwd(), dict(os.environ)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            for file, text in FILES.items():
                Path(file).write_text(text)
            Path("study.db").touch()  # a worker joins in, and makes no storage
            Path("folder").mkdir()
            os.mkfifo("fifo")
            os.symlink("loop", "loop")
            yield Path(name)
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)


def listing(path: Path) -> dict[str, str]:
    """The files below, but for the tuner's own lock, log and database."""
    return {
        str(f.relative_to(path)): f.read_text()
        for f in sorted(path.rglob("*"))
        if f.is_file() and ".mhc-tune" not in f.parts and ".db" not in f.suffixes
    }


def call(args: tuple[str, ...]) -> tuple[Any, str, str]:
    """Exit code (or ``"begun"``, or a traceback), stdout and stderr of a command."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["mhc-tune", *args]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code: Any = "returned"
    except SystemExit as e:
        code = e.code
    except Begun:
        code = "begun"
    except BaseException:
        code = traceback.format_exc()
    finally:
        sys.argv = argv
        profile.reset()
    return code, out.getvalue(), err.getvalue()


def named(spoilt: tuple[str, ...], error: str) -> bool:
    """Whether a complaint is about something that was spoilt: ``--kernels`` is named by ``unknown kernel`` too."""
    stems = [re.sub(r"s$", "", s.strip("-").replace("_", "-")) for s in spoilt]
    plain = error.lower().replace("_", "-")
    return any(stem in plain or stem.split("-")[0] in plain for stem in stems)


def refused(line: Line) -> bool:
    with folder() as here:
        before = listing(here)
        code, out, err = call(line.args)
        assert SECRET not in out + err
        if code in ("begun", 0):
            return False
        assert code == 2, code
        assert err.startswith("mhc-tune: ")
        assert err.endswith("\n")
        assert err[:-1].isprintable(), err
        assert named(line.spoilt, err), err
        assert listing(here) == before
    return True


@pytest.fixture
def planted(monkeypatch):
    """A machine without a GPU, on which nothing begins, reads for ever, or takes all the memory."""
    monkeypatch.setattr(hardware, "_gpu", lambda: None)
    for name in ("MHC_PROFILE", "MHC_TUNE_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    for path in BEGINNINGS:
        module, name = path.split(".")
        monkeypatch.setattr(import_module(f"tuner.{module}"), name, begin)
    monkeypatch.setattr("tuner.pipeline.Pipeline.run", begin_tuning)
    monkeypatch.setattr(time, "sleep", begin)
    # the same commands every time: building them takes longer than most complaints
    monkeypatch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))

    def popen(self: Any, command: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(command, list) and command[0] in ("git", "nvidia-smi"):
            raise FileNotFoundError(command[0])
        raise Begun

    monkeypatch.setattr(subprocess.Popen, "__init__", popen)
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda self: None)

    def late(*_: Any) -> None:
        raise TimeoutError("a command line took more than 20 s")

    handler, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), limits[1]))
    signal.setitimer(signal.ITIMER_REAL, 20, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, handler)


def in_time(line: Line) -> bool:
    signal.setitimer(signal.ITIMER_REAL, 20, 20)
    return refused(line)


def test_a_spoilt_command_line_is_one_line_that_names_the_option(planted):
    hunt("command lines", lines(), in_time, spare=1.3)


LONG = "9" * 5000


@pytest.mark.parametrize(
    ("named_as", "args"),
    [
        ("--seed", ["--seed", "-1"]),
        ("--seed", ["--seed", str(2**32)]),
        ("--time-limit", ["--time-limit", "inf"]),
        ("--tokens", ["--tokens", LONG]),
        ("--output", ["--output", "x" * 300]),
        ("--output", ["--output", "/dev/null"]),
        ("--output", ["--output", "fifo"]),
        ("--raw", ["--raw", "/dev/full"]),
        ("workloads", ["--workloads-file", "/dev/zero"]),
        ("workloads", ["--workloads-file", "fifo"]),
        ("--gpu \\x1b[31m", ["--gpu", "\x1b[31m"]),
        ("--shapes", ["bench", "--shapes", f"1x1x{LONG}"]),
        ("--profile", ["bench", "--gpu", "cpu", "--profile", "fifo"]),
        ("--readme", ["bench", "--readme", "deep.json"]),
        ("--readme", ["bench", "--readme", "bad.json"]),
        ("--readme", ["bench", "--readme", "/dev/zero"]),
        ("--readme", ["bench", "--readme", "fifo"]),
        ("--rival-env", ["bench", "--rival-env", f"ours={'x' * 300}"]),
        ("ledger", ["replay", "deep.json"]),
        ("ledger", ["replay", "/dev/zero"]),
        ("--against", ["check", *OTHER_BASES["check"][:2], "--kernels", "pre", "--against", "HEAD"]),
        ("--baseline", ["check", "--gpu", "cpu", "--baseline", "fifo"]),
        ("--baseline", ["check", "--gpu", "cpu", "--baseline", "/dev/zero"]),
        ("--tolerance", ["check", *OTHER_BASES["check"], "--tolerance", "nan"]),
        ("--runs", ["check", *OTHER_BASES["check"], "--runs", "2147483648"]),
        ("--storage", ["worker", "--gpu", "cpu", "--storage", f"postgresql://u:{SECRET}@127.0.0.1:port/x"]),
    ],
)
def test_what_once_ended_otherwise(planted, named_as, args):
    base = [] if args[0] in commands() else BASE[""]
    assert in_time(Line((*base, *args), (named_as,)))


@pytest.mark.parametrize(
    "args",
    [
        BASE[""],
        BASE["bench"],
        ["check", *BASE["check"]],
        ["check", *OTHER_BASES["check"]],
        # what a profile says of the command must be text: found out only after the first study
        [*BASE[""], "--output", "\udcff.yaml"],
        # the storage is opened after the port
        ["dashboard", "--storage", f"postgresql://u:{SECRET}@127.0.0.1:port/x"],
    ],
    ids=["tune", "bench", "check --static", "check", "no text", "dashboard"],
)
def test_what_is_not_spoilt_begins(planted, args):
    with folder():
        name = ["bench"] if args is BASE["bench"] else []
        assert call((*name, *args))[0] == "begun"
