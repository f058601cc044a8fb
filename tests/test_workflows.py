"""The GitHub workflows: safe to run on a pull request, and every command in them is one that this tree has."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from tuner import cli

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: Of the timed check. Until the command line has it, nothing is known of them; from then on they must be there like all others.
TIMED = {"--against", "--baseline"}


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def workflow(path):
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # `on` stays a word


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(program):
    """Every line of a workflow's scripts that calls this program, from the program on."""
    for path in WORKFLOWS:
        for step in steps(yaml.load(path.read_text(), Loader=yaml.BaseLoader)):
            for line in step.get("run", "").splitlines():
                found = re.search(rf"(?:^|[/\s]){re.escape(program)}\s+(.*)", line)
                if found:
                    yield found[1]


def options(command):
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", command))


def test_there_is_one_for_a_gpu_and_one_without():
    assert {"ci", "static", "latency-gpu"} <= {path.stem for path in WORKFLOWS}


def test_a_pull_request_gets_no_secret_and_cannot_write(path, workflow):
    text = path.read_text()
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())
    assert not {"pull_request_target", "workflow_run"} & set(workflow["on"])
    assert "secrets." not in text
    for step in steps(workflow):
        assert "${{" not in step.get("run", ""), "a script takes what others named from its environment, not from its text"
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


def test_a_job_ends(workflow):
    assert all(int(job["timeout-minutes"]) <= 90 for job in workflow["jobs"].values())


def test_the_gpu_is_one_job_s_and_no_stranger_s():
    (path,) = [path for path in WORKFLOWS if path.stem == "latency-gpu"]
    workflow = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    assert job["concurrency"] == {"group": "latency-gpu", "cancel-in-progress": "false"}
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]
    assert steps(workflow)[0]["with"]["fetch-depth"] == "0"


@pytest.mark.parametrize("command", list(commands("mhc-tune")))
def test_mhc_tune_has_every_option(command):
    group = typer.main.get_command(cli.app)
    name = command.split()[0]
    known = {option for p in group.commands[name].params for option in p.opts}
    pending = TIMED if name == "check" and not TIMED & known else set()
    assert options(command) - known <= pending


@functools.cache
def pytest_options():
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return options(done.stdout) | set(re.findall(r"^\s+(-\w)\b", done.stdout, re.M))


@pytest.mark.parametrize("command", list(commands("pytest")))
def test_pytest_has_every_option(command):
    given = {re.sub(r"^(-[a-z])\d+$", r"\1", option) for option in options(command)}
    assert given <= pytest_options()


@pytest.mark.parametrize("command", list(commands("make")))
def test_make_has_every_target(command):
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert command.split()[0] in phony[1].split()
