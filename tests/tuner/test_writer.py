"""tuner/writer.py: entries merged with the file that is there."""

import pytest

from mhc.profile import read_profile
from mhc.schema import Entry
from tests.tuner.conftest import HARDWARE
from tl_kernels import KERNELS
from tuner.errors import TuneError
from tuner.hardware import Hardware
from tuner.writer import ProfileWriter, make_provenance


def entry(kernel="pre", C=1280, us=10.0, source_hash=None):
    return Entry(
        kernel=kernel, n=4, C=C, dtype="bfloat16", tokens=64, config={"block_C": 640, "threads": 80}, time_us=us, time_ci_us=(us, us),
        gbps=1.0, copy_share=0.1, default_us=us, verdict="default", error={"u": 1e-3},
        source_hash=source_hash or KERNELS[kernel].source_hash,
    )  # fmt: skip


def provenance(hardware=HARDWARE):
    return make_provenance(hardware, 10.0, 0, 3, "mhc-tune")


def test_what_was_not_retuned_is_kept_and_what_was_is_replaced(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry(C=1280), entry("post_res", C=1280)], provenance())
    ProfileWriter(path, HARDWARE).add([entry(C=1280, us=5.0), entry(C=2560)], provenance())
    found = {(e.kernel, e.C): e.time_us for e in read_profile(path).entries}
    assert found == {("pre", 1280): 5.0, ("pre", 2560): 10.0, ("post_res", 1280): 10.0}


def test_stale_entries_are_dropped_and_said_to_be(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry(source_hash="0" * 16), entry("post_res")], provenance())
    writer = ProfileWriter(path, HARDWARE)
    assert "1 entries dropped" in writer.notes[0]
    writer.add([entry(C=2560)], provenance())
    assert {(e.kernel, e.C) for e in read_profile(path).entries} == {("pre", 2560), ("post_res", 1280)}


def test_entries_of_another_device_are_dropped_and_said_to_be(tmp_path):
    path = tmp_path / "cpu.yaml"
    ProfileWriter(path, HARDWARE).add([entry()], provenance())
    writer = ProfileWriter(path, Hardware(profile="cpu", name="Another CPU", arch="cpu"))
    assert "was tuned on Test CPU" in writer.notes[0]
    assert writer.entries == []


def test_a_bad_file_is_refused_before_tuning(tmp_path):
    path = tmp_path / "cpu.yaml"
    path.write_text("entries: [")
    with pytest.raises(TuneError, match=r"cpu\.yaml"):
        ProfileWriter(path, HARDWARE)


def test_a_folder_that_cannot_be_made_is_refused_before_tuning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneError, match="cannot be written"):
        ProfileWriter(tmp_path / "file" / "cpu.yaml", HARDWARE)
