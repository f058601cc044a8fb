"""The profile's file: what is saved is read back, and everything malformed is one line."""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhc.profile import ProfileError, read_profile, save_profile
from mhc.schema import Profile
from tests.conftest import here
from tests.mhc.profiles import entry, profile
from tests.mhc.test_schema import PROFILE

pytestmark = pytest.mark.usefixtures("machine")


def test_what_is_saved_is_read_back(tmp_path):
    path = tmp_path / "new" / "h100.yaml"
    saved = profile(entry(), entry(tokens=2048, runner_up_us=130.25))
    save_profile(saved, path)
    assert read_profile(path) == saved
    assert path.read_text().startswith("# Tuned mHC kernel configurations")


def test_saving_leaves_nothing_but_the_file_and_lets_others_read_it(tmp_path):
    path = tmp_path / "p.yaml"
    save_profile(profile(entry()), path)
    save_profile(profile(), path)
    assert read_profile(path).entries == []
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["p.yaml"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.yaml"
    save_profile(profile(entry()), path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileError, match="cannot be written: No space left on device"):
        save_profile(profile(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["p.yaml"]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "real" / "p.yaml")
    save_profile(profile(entry()), link)
    assert link.is_symlink()
    assert len(read_profile(tmp_path / "real" / "p.yaml").entries) == 1


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot be written") as e:
        save_profile(profile(), tmp_path / "file" / "p.yaml")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "top level: got None, wanted a valid dictionary"),
        ("[1, 2]", "top level: got [1, 2], wanted a valid dictionary"),
        ("schema_version: 1\nschema_version: 1\n", "line 2, column 1: the key 'schema_version' stands twice"),
        ("provenance: {gpu: a, gpu: b}", "the key 'gpu' stands twice"),
        ("a: [1,\n\n}", "line 3, column 1"),
        ("a: \t- b\n c", "wanted YAML"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("? [a, [b]]\n: 1", "unhashable"),
        ("x: " + "9" * 5000, "wanted YAML"),
        ("a: &a [*a]", "schema_version: missing"),
        ("[" * 20_000, "wanted YAML"),
        ("schema_version: 1\nprovenance: {date: 2026-13-45}\nentries: []", "provenance."),
    ],
)
def test_a_malformed_file_is_one_line_naming_the_file(tmp_path, text, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError) as e:
        read_profile(path)
    assert str(e.value).startswith(f"{path}: ")
    assert complaint in str(e.value)
    assert "\n" not in str(e.value)


def test_an_unquoted_date_is_a_string(tmp_path):
    path = tmp_path / "p.yaml"
    save_profile(profile(), path)
    path.write_text(path.read_text().replace("'2026-11-21'", "2026-11-21"))
    assert "date: 2026-11-21" in path.read_text()
    assert read_profile(path).provenance.date == "2026-11-21"


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"a: \x00", None])
def test_a_file_that_is_no_text_or_not_there(tmp_path, content):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError) as e:
        read_profile(path)
    assert str(e.value).startswith(f"{path}: ")
    assert "\n" not in str(e.value)


def test_a_folder_is_no_profile(tmp_path):
    closed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "close", here(lambda handle, close=os.close: closed.append(handle) or close(handle), os.close))
        with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
            read_profile(tmp_path)
    assert len(closed) == 1


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def read_or_complain(path: Path) -> None:
    complaint = ""
    try:
        read_profile(path)
    except ProfileError as e:
        complaint = str(e)
    if complaint:
        assert complaint.startswith(f"{path}: ")
        assert len(complaint.splitlines()) == 1


@FUZZ
@given(data=st.data())
def test_any_field_replaced_by_anything_is_read_or_refused_in_one_line(tmp_path, data):
    document: Any = copy.deepcopy({**PROFILE, "entries": [entry()]})
    node = document
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(VALUES)
        break
    path = tmp_path / "fuzz.yaml"
    path.write_text(yaml.safe_dump(document))
    read_or_complain(path)


@FUZZ
@given(text=st.text(alphabet=st.sampled_from("ab:-{}[]&*!?|>'\"#%@,\n \t0.1eé"), max_size=40) | st.binary(max_size=40))
def test_any_text_or_bytes_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    read_or_complain(path)


TEXT = st.text(min_size=1, max_size=30).filter(lambda s: s.isprintable() or s.isspace())


@FUZZ
@given(gpu=TEXT, command=TEXT, source_hash=TEXT, seed=st.integers(), us=st.floats(1e-6, 1e9), knob=st.integers() | st.booleans() | TEXT)
def test_any_good_profile_survives_the_file(tmp_path, gpu, command, source_hash, seed, us, knob):
    data = {**PROFILE, "provenance": {**PROFILE["provenance"], "gpu": gpu, "command": command, "seed": seed}}
    good = Profile.model_validate({**data, "entries": [entry(source_hash=source_hash, time_us=us, config={"k": knob})]})
    save_profile(good, tmp_path / "fuzz.yaml")
    back = read_profile(tmp_path / "fuzz.yaml")
    assert back == good
    assert type(back.entries[0].config["k"]) is type(knob)
