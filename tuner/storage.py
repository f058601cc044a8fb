"""Opening the Optuna storage behind a URL, and keeping the URL's password out of everything that is printed or kept."""

from __future__ import annotations

import importlib.util
import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import TuneError, one_line

if TYPE_CHECKING:
    import optuna

#: A worker says that it lives this often, and what it holds is taken away after this long a silence. Seconds.
HEARTBEAT_S = 10
GRACE_S = 45

#: Seconds that SQLite waits for another process's write, and that PostgreSQL may take to answer a connection.
BUSY_S = 60
CONNECT_S = 10

#: Environment variable that may hold the URL, so that it is not on a command line that every user of the machine can read.
STORAGE_VARIABLE = "MHC_TUNE_STORAGE"

HIDDEN = "***"
#: ``scheme://user:`` up to the last @ before a space: a password may hold any other character, badly quoted ones included.
_USER_PASSWORD = re.compile(r"([A-Za-z][\w+.-]*://[^\s:/@]*):\S*@")
_NAMES = r"(?:password|passwd|passphrase|pwd|secret|token)"
_QUERY_PASSWORD = re.compile(rf"({_NAMES}\s*(?:=|%3D)\s*)[^\s&'\";,]+", re.IGNORECASE)


def redact_text(text: str) -> str:
    """``text`` with the password of every URL in it, and of every ``password=...``, replaced."""
    return _QUERY_PASSWORD.sub(rf"\1{HIDDEN}", _USER_PASSWORD.sub(rf"\1:{HIDDEN}@", text))


def redacted(url: str) -> str:
    """A storage URL as it may be shown."""
    # one argument is one URL, spaces in its password included
    whole = re.sub(r"^([A-Za-z][\w+.-]*://[^:/@]*):.*@", rf"\1:{HIDDEN}@", url.strip(), flags=re.DOTALL)
    return " ".join(re.sub(rf"(?i)({_NAMES}=)[^&]+", rf"\1{HIDDEN}", whole).split())


def _passwords(url: str) -> list[str]:
    """The password as typed and as meant, longest first."""
    from urllib.parse import unquote

    found = [m[1] for m in (re.search(r"://[^:/@]*:(.*)@", url, re.DOTALL),) if m]
    found += re.findall(rf"(?i){_NAMES}=([^&]+)", url)
    return sorted({form for p in found for form in (p, unquote(p)) if len(form) > 2}, key=len, reverse=True)


def redact_error(error: BaseException, url: str) -> str:
    """The error in one line; a driver may repeat the URL, or pieces of it."""
    if type(error).__module__.startswith("optuna") and error.__cause__ is not None:
        error = error.__cause__
    # SQLAlchemy wraps the driver's error and adds the statement, the parameters and a link
    text = one_line(getattr(error, "orig", None) or error)
    for password in _passwords(url):
        text = text.replace(password, HIDDEN)
    return redact_text(text)


def _driver(url: str) -> str:
    """``postgresql://`` with the driver that is installed; other URLs as they are. Raises :class:`TuneError` where there is none."""
    match = re.match(r"postgres(?:ql)?://", url)
    if match is None:
        return url
    for module in ("psycopg", "psycopg2"):
        if importlib.util.find_spec(module) is not None:
            return f"postgresql+{module}://{url[match.end() :]}"
    raise TuneError("--storage: no PostgreSQL driver is installed; pip install 'psycopg[binary]'")


def open_storage(url: str, heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S) -> optuna.storages.RDBStorage:
    """The storage behind a URL, whose RUNNING trials are taken back after ``grace_s`` seconds without a sign of life.

    Raises :class:`TuneError` in one line without the password where it cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    full = _driver(url.strip())
    kwargs: dict[str, Any] = {}
    if full.startswith("sqlite"):
        kwargs["connect_args"] = {"timeout": BUSY_S}
    elif full.startswith("postgresql+psycopg"):
        # a server that is gone must show as an error, not as a process that waits
        kwargs["connect_args"] = {} if "connect_timeout" in full else {"connect_timeout": CONNECT_S}
        kwargs["pool_pre_ping"] = True
    if "{SCHEMA_VERSION}" not in full:  # Optuna's own template; any other brace is the user's
        full = full.replace("{", "{{").replace("}", "}}")
    for attempt in range(5):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # Optuna calls its heartbeats experimental
                storage = optuna.storages.RDBStorage(full, engine_kwargs=kwargs, heartbeat_interval=heartbeat_s, grace_period=grace_s)
            _tune_connections(storage, grace_s)
            return storage
        except Exception as e:  # SQLAlchemy, its drivers and Optuna each have their own
            # two processes that create the tables at once: the second finds them made on its next attempt
            if attempt == 4 or not re.search(r"already exists|duplicate key|UNIQUE constraint|being created", f"{e} {e.__cause__}"):
                wanted = "; wanted postgresql://user@host/database or sqlite:///file" if _is_no_url(e) else ""
                raise TuneError(f"--storage {redacted(url)}: cannot be opened: {redact_error(e, url)}{wanted}") from None
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("unreachable")


def _is_no_url(error: BaseException) -> bool:
    from sqlalchemy.exc import ArgumentError  # also of a scheme that nothing is known of

    # ImportError: of a database whose driver is not installed, which Optuna might open but nobody has tried
    return isinstance(error, ArgumentError | ImportError) or isinstance(error.__cause__, ArgumentError)


def sqlite_file(url: str) -> Path | None:
    """The file of an ``sqlite:///`` URL; None for other URLs and what is none, and where the database is in memory or a URI of SQLite's."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url.strip())
    except (ArgumentError, ValueError):  # a port that is no number
        return None
    name = parsed.database or ""
    in_memory = name in ("", ":memory:") or name.startswith("file:")
    return None if in_memory or parsed.get_backend_name() != "sqlite" else Path(name)


def is_private(storage: optuna.storages.RDBStorage) -> bool:
    """Whether it is in this process's memory: nobody else can join in, and nothing of it stays."""
    return storage.engine.name == "sqlite" and storage.engine.url.database in (None, "", ":memory:")


def _tune_connections(storage: optuna.storages.RDBStorage, grace_s: int) -> None:
    """Settings of each connection that Optuna leaves alone."""
    from sqlalchemy import event

    engine = storage.engine

    def sqlite(connection: Any, _: object) -> None:
        # an fsync per commit costs tens of milliseconds on a plain disk; a write-ahead log survives the death of a process without it
        connection.isolation_level = None
        cursor = connection.cursor()
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=NORMAL")
        except Exception:  # another process holds the file just now: it has switched the mode, or will
            pass
        cursor.close()

    def begin(connection: Any) -> None:
        # Optuna reads a trial's state and then writes it: nobody else may write in between
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def postgresql(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        # heartbeats are compared as local times of the connection that wrote them
        cursor.execute("SET TIME ZONE 'UTC'")
        # a worker that is stopped in the middle of a transaction must not keep its lock on the study
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{grace_s}s'")
        cursor.close()
        connection.commit()

    if is_private(storage):
        return
    if engine.name == "sqlite":
        event.listen(engine, "connect", sqlite)
        event.listen(engine, "begin", begin)
    elif engine.name == "postgresql":
        event.listen(engine, "connect", postgresql)
    engine.dispose()
