"""No profile, however malformed, ends in anything but a profile or one line that names the file and the field or the place."""

from __future__ import annotations

import copy
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from mhc import yamlfile
from mhc.profile import ProfileError, read_profile, save_profile
from mhc.schema import Profile
from tests.malformed import check_complaint, hunt, spoilt_fields, spoilt_text
from tests.mhc.test_schema import ENTRY, PROFILE

DOCUMENT: dict[str, Any] = {**copy.deepcopy(PROFILE), "entries": [copy.deepcopy({**ENTRY, "tokens": tokens}) for tokens in (4096, 8192)]}


def refused(path: Path, content: bytes, begins: tuple[str, ...] = ("",)) -> bool:
    """Whether ``content`` is no profile. Checks the complaint; where there is none, that what was read can be written and read again."""
    path.write_bytes(content)
    complaint = None
    try:
        profile = read_profile(path)
    except ProfileError as e:
        complaint = str(e)
    assert path.read_bytes() == content
    if complaint is None:
        save_profile(profile, path)
        assert read_profile(path) == profile
        return False
    check_complaint(complaint, str(path), begins)
    return True


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "p.yaml"


def test_a_spoilt_field_is_named(path):
    hunt("profile fields", spoilt_fields(DOCUMENT), lambda spoilt: refused(path, *spoilt))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ((), "top level"),
        (("entries", 3, "config", "threads"), "entries[3].config.threads"),
        (("entries", 3, ""), "entries[3].''"),
        (("a b", "\x1b[31m"), "'a b'.'\\x1b[31m'"),
        (("mhc-27b", "C"), "mhc-27b.C"),
    ],
)
def test_the_name_of_a_field(path, name):
    assert yamlfile.field_name(path) == name


def test_a_spoilt_text_is_one_line_and_never_run(path):
    save_profile(Profile.model_validate(DOCUMENT), path)
    text = b"".join(line for line in path.read_bytes().splitlines(True) if not line.startswith(b"#"))
    hunt("profile texts", spoilt_text(text), lambda content: refused(path, content))
    assert not Path("canary").exists()


def test_a_profile_cut_short_anywhere_is_one_line(path):
    save_profile(Profile.model_validate(PROFILE), path)
    whole = path.read_bytes()
    read = [length for length in range(len(whole)) if not refused(path, whole[:length])]
    # "source_hash: 0123" is a string too, which no kernel has
    assert all(whole.index(b"source_hash: ") < length for length in read)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path.name)


def make_large(path: Path) -> None:
    path.write_bytes(b"# " + b"x" * yamlfile.MAX_BYTES)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (Path.mkdir, "Is a directory"),
        (make_fifo, "is no regular file"),
        (make_socket, "No such device"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.symlink_to("/dev/tty"), ""),
        (lambda path: path.symlink_to(path), "Too many levels"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (make_large, "more than 4 MiB"),
    ],
    ids=["folder", "fifo", "socket", "zeros", "terminal", "loop", "dangling", "large"],
)
def test_what_is_no_file_to_read_is_one_line_at_once(path, make, complaint):
    make(path)
    start = time.monotonic()
    with pytest.raises(ProfileError, match="cannot be read: ") as e:
        read_profile(path)
    assert complaint in str(e.value)
    assert str(e.value).isprintable()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\udcff", "a\nb\x1b[31m"])
def test_a_name_that_no_file_may_have_is_one_line(tmp_path, name):
    with pytest.raises(ProfileError, match="cannot be read: ") as e:
        read_profile(tmp_path / name)
    assert str(e.value).isprintable()
    if "\0" in name or len(name) > 255:
        with pytest.raises(ProfileError, match="cannot be written: ") as e:
            save_profile(Profile.model_validate(PROFILE), tmp_path / name)
        assert str(e.value).isprintable()


@pytest.mark.parametrize("make", [Path.mkdir, make_fifo, make_socket, lambda path: path.symlink_to("/dev/null")])
def test_only_a_file_is_replaced(path, make):
    make(path)
    before = path.lstat()
    with pytest.raises(ProfileError, match=r"cannot be written: (is no regular file|Is a directory)"):
        save_profile(Profile.model_validate(PROFILE), path)
    assert os.path.samestat(path.lstat(), before)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[{a: "])
def test_a_million_levels_are_refused_before_libyaml_recurses(path, opening):
    path.write_text(opening * 600_000)
    with pytest.raises(ProfileError, match="nested deeper than 50 levels"):
        read_profile(path)
