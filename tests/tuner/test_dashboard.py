"""tuner/dashboard.py: on this machine only, for looking only, and what is wrong is one line without a password."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import optuna
import pytest

from tests.conftest import python_path
from tuner import dashboard
from tuner.dashboard import HOST, check_there, default_url, looking_only, make_server
from tuner.errors import TuneError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def url(tmp_path):
    """A storage with one study of three trials."""
    (tmp_path / ".mhc-tune").mkdir()
    url = f"sqlite:///{tmp_path}/.mhc-tune/cpu.db"
    study = optuna.create_study(study_name="pre|4|1280", storage=url)
    study.optimize(lambda trial: trial.suggest_categorical("block_C", (64, 128)), n_trials=3)
    return url


@pytest.fixture
def server(url):
    pytest.importorskip("optuna_dashboard")
    with make_server(url, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def ask(server, path, method="GET", host=None):
    """Status and body of a request to the server."""
    request = urllib.request.Request(f"http://{HOST}:{server.server_port}{path}", method=method, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def own_addresses():
    """Addresses of this machine other than 127.0.0.1, as far as it has any."""
    found = {"127.0.0.2"}  # the whole of 127/8 is this machine
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; says which address would
            found.add(probe.getsockname()[0])
    except OSError:
        pass
    return found - {HOST}


def test_it_answers_on_127_0_0_1_with_the_studies_and_nowhere_else(server):
    status, page = ask(server, "/dashboard")
    assert status == 200
    assert "<html" in page.lower()
    (study,) = json.loads(ask(server, "/api/studies")[1])["study_summaries"]
    assert study["study_name"] == "pre|4|1280"
    trials = json.loads(ask(server, f"/api/studies/{study['study_id']}")[1])["trials"]
    assert len(trials) == 3
    for address in own_addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, server.server_port), timeout=10)


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/trials/0/tell"), ("DELETE", "/api/studies/1"), ("PUT", "/api/studies/1/note")])
def test_nothing_can_be_changed(server, method, path):
    assert ask(server, path, method) == (405, '{"reason": "this dashboard is for looking only"}')
    assert len(json.loads(ask(server, "/api/studies")[1])["study_summaries"]) == 1


def test_only_this_machines_names_are_answered(server):
    """A page elsewhere whose name was made to mean 127.0.0.1 must not read it."""
    assert ask(server, "/api/studies", host="evil.example:8080")[0] == 403
    assert ask(server, "/api/studies", host="localhost:9000")[0] == 200, "as through ssh -L"


def test_a_request_without_a_host_is_refused():
    said = []
    body = looking_only(lambda environ, start: pytest.fail("asked"))({"REQUEST_METHOD": "GET"}, lambda *args: said.append(args))
    assert said[0][0] == "403 Forbidden"
    assert b"localhost" in b"".join(body)


def test_a_port_in_use_is_one_line(server, url):
    with pytest.raises(
        TuneError, match=f"^--port {server.server_port}: cannot listen on 127.0.0.1: Address already in use; give another one$"
    ):
        make_server(url, server.server_port)


def test_a_missing_package_is_one_line(monkeypatch, url):
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TuneError, match=r"optuna-dashboard is not installed here; pip install optuna-dashboard$"):
        make_server(url, 0)


def test_a_missing_file_is_one_line_and_is_not_made(tmp_path):
    with pytest.raises(TuneError, match=r"^--storage sqlite:///.*none\.db: there is no file .*none\.db$"):
        check_there(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


def test_a_storage_that_cannot_be_opened_is_one_line_and_frees_the_port(tmp_path):
    pytest.importorskip("optuna_dashboard")
    (tmp_path / "text.db").write_text("no database " * 100)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    for _ in range(2):
        with pytest.raises(TuneError, match=r"^--storage sqlite:///.*text\.db: cannot be opened: ") as error:
            make_server(f"sqlite:///{tmp_path}/text.db", port)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["postgresql://me:geheim@127.0.0.1:1/test", "nowhere://me:geheim@host/test", "no url at all"])
def test_no_password_is_shown(url):
    pytest.importorskip("optuna_dashboard")
    with pytest.raises(TuneError) as error:
        make_server(url, 0)
    assert "geheim" not in str(error.value)
    assert "--storage" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_printed_has_no_password(monkeypatch, capsys, tmp_path):
    class Stopped(contextlib.nullcontext):
        server_port = 1234

        def __enter__(self):
            return self

        def serve_forever(self):
            raise KeyboardInterrupt

    asked = []
    monkeypatch.setattr(dashboard, "make_server", lambda url, port: asked.append((url, port)) or Stopped())
    assert dashboard.run_dashboard("postgresql://me:geheim@host/test", 1234, tmp_path) == 0
    assert asked == [("postgresql://me:geheim@host/test", 1234)]
    out = capsys.readouterr().out
    assert "geheim" not in out
    assert "@host/test is shown at http://127.0.0.1:1234/dashboard" in out


def test_the_default_storage_is_the_one_in_the_folder(tmp_path):
    with pytest.raises(TuneError, match=r"^no storage: wanted .*<gpu>\.db"):
        default_url(tmp_path)
    (tmp_path / "cpu.db").touch()
    assert default_url(tmp_path) == f"sqlite:///{tmp_path}/cpu.db"
    (tmp_path / "h100.db").touch()
    with pytest.raises(TuneError, match=r"^--storage: there are .*cpu\.db, .*h100\.db; name one"):
        default_url(tmp_path)


def test_the_command_serves_until_ctrl_c(tmp_path, url):
    pytest.importorskip("optuna_dashboard")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": python_path(ROOT), "MHC_TUNE_STORAGE": ""}
    command = [sys.executable, "-m", "tuner.cli", "dashboard", "--port", str(port)]
    child = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = child.stdout.readline()
        assert said.startswith(f"sqlite:///.mhc-tune/cpu.db is shown at http://127.0.0.1:{port}/dashboard "), child.stderr.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=60) as answer:
            assert "pre|4|1280" in answer.read().decode()
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
        assert child.returncode == 0
        assert err == ""
    finally:
        child.kill()
        child.communicate()
