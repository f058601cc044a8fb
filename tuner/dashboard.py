"""``mhc-tune dashboard``: optuna-dashboard on the tuner's storage, on this machine only and for looking only.

The page has no password, and from it a trial that a worker is measuring could be ended, or a study deleted. So the server binds to
127.0.0.1, answers to local names (a page elsewhere cannot read it through a name of its own) and refuses everything but reading.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from tuner.errors import TuneError
from tuner.storage import open_storage, redacted

HOST = "127.0.0.1"
LOCAL_NAMES = (HOST, "localhost")
READING = ("GET", "HEAD")

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def default_url(folder: Path) -> str:
    """The storage that ``mhc-tune`` wrote to ``folder``, ``<gpu>.db``. Raises :class:`TuneError` where there is none, or several."""
    found = sorted(folder.glob("*.db"))
    if not found:
        raise TuneError(f"no storage: wanted {folder}/<gpu>.db, which mhc-tune writes; start it where mhc-tune ran, or give --storage URL")
    if len(found) > 1:
        raise TuneError(f"--storage: there are {', '.join(map(str, found))}; name one, such as --storage sqlite:///{found[0]}")
    return f"sqlite:///{found[0]}"


def check_there(url: str) -> None:
    """Raise :class:`TuneError` for an SQLite file that does not exist: opening it would make it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return  # open_storage says what is wrong with it
    name = parsed.database
    if parsed.get_backend_name() == "sqlite" and name and name != ":memory:" and not Path(name).is_file():
        raise TuneError(f"--storage {redacted(url)}: there is no file {name}")


def looking_only(app: App) -> App:
    """``app`` for requests that read, made to this machine by one of its own names."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name = environ.get("HTTP_HOST", "").rsplit(":", 1)[0].lower()
        if name not in LOCAL_NAMES:
            return _refuse(start_response, "403 Forbidden", f"wanted {' or '.join(LOCAL_NAMES)} as the host")
        if environ["REQUEST_METHOD"] not in READING:
            return _refuse(start_response, "405 Method Not Allowed", "this dashboard is for looking only")
        return app(environ, start_response)

    return guarded


def _refuse(start_response: Callable[..., Any], status: str, reason: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "application/json")])
    return [f'{{"reason": "{reason}"}}'.encode()]


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A page asks every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # http.server's own asks a name server for this machine's name, which may take seconds
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


def make_server(url: str, port: int) -> WSGIServer:
    """A server on 127.0.0.1, not yet serving; port 0 takes a free one. Raises :class:`TuneError` in one line, without a password."""
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise TuneError("dashboard: optuna-dashboard is not installed here; pip install optuna-dashboard")
    check_there(url)
    try:
        server = _Server((HOST, port), _Quiet)
    except OSError as e:
        raise TuneError(f"--port {port}: cannot listen on {HOST}: {e.strerror or e}; give another one") from None
    try:
        storage = open_storage(url)
        import optuna_dashboard

        server.set_app(looking_only(optuna_dashboard.wsgi(storage)))
    except BaseException:
        server.server_close()
        raise
    return server


def run_dashboard(url: str | None, port: int, folder: Path) -> int:
    """Serve until Ctrl-C. Returns the exit code."""
    url = url or default_url(folder)
    with make_server(url, port) as server:
        print(f"{redacted(url)} is shown at http://{HOST}:{server.server_port}/dashboard (for looking only; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
