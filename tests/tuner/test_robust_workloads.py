"""No workloads file, however malformed, ends in anything but workloads or one line that names the file and the field or the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.malformed import check_complaint, hunt, spoilt_fields, spoilt_text
from tuner.workloads import Workload, WorkloadError, load_workloads

DOCUMENT: dict[str, Any] = {
    "toy": {"n": 4, "C": 64, "dtype": "float32", "tokens": [32, 256], "cpu_tokens": [8]},
    "mhc-27b": {"n": 2, "C": 2560, "tokens": [4096], "cpu_tokens": [64, 128]},
}


def refused(path: Path, content: bytes, begins: tuple[str, ...] = ("",)) -> bool:
    """Whether ``content`` holds no workloads; checks the complaint, and where there is none, what was read."""
    path.write_bytes(content)
    try:
        found = load_workloads(path)
    except WorkloadError as e:
        check_complaint(str(e), str(path), begins)
        return True
    assert found
    for workload in found.values():
        assert Workload.model_validate(workload.model_dump()) == workload
        assert max(workload.C, *workload.tokens, *workload.cpu_tokens) < 2**31
    return False


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "w.yaml"


def test_a_spoilt_field_is_named(path):
    hunt("workload fields", spoilt_fields(DOCUMENT), lambda spoilt: refused(path, *spoilt))


def test_a_spoilt_text_is_one_line_and_never_run(path):
    text = yaml.safe_dump(DOCUMENT, sort_keys=False, default_flow_style=None).encode()
    hunt("workload texts", spoilt_text(text), lambda content: refused(path, content))
    assert not Path("canary").exists()
