"""Workloads: the packaged file holds the models it is named after, and a bad file is refused in one line."""

from __future__ import annotations

import pytest

from tuner.workloads import Workload, WorkloadError, load_workloads

GOOD = "{n: 4, C: 64, tokens: [256, 32], cpu_tokens: [8]}"


def test_the_packaged_file_names_the_models_and_their_widths():
    workloads = load_workloads()
    assert {name: w.C for name, w in workloads.items()} == {
        "mhc-3b": 1280,
        "mhc-9b": 1920,
        "mhc-27b": 2560,
        "deepseek-v4-flash": 4096,
        "deepseek-v4-pro": 7168,
    }
    assert {(w.n, w.dtype) for w in workloads.values()} == {(4, "bfloat16")}
    assert all(max(w.cpu_tokens) < min(w.tokens) for w in workloads.values()), "a CPU tune must stay short"


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"toy: {GOOD}")
    workload = load_workloads(path)["toy"]
    assert workload == Workload(n=4, C=64, dtype="bfloat16", tokens=[32, 256], cpu_tokens=[8])
    assert workload.buckets("cpu") == [8]
    assert workload.buckets("sm_90a") == [32, 256]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "top level: got None, wanted a valid dictionary"),
        ("{}", "top level: got {}"),
        ("toy: 3", "toy: got 3"),
        ("toy: {n: 4, tokens: [1], cpu_tokens: [1]}", "toy.C: missing"),
        (f"toy: {GOOD}\ntoy: {GOOD}", "line 2, column 1: the key 'toy' stands twice"),
        (f"3: {GOOD}", "3"),
        (f"'a b': {GOOD}", "a b"),
        (f"toy: {GOOD.replace('n: 4', 'n: 9')}", "toy.n: got 9, wanted less than or equal to 8"),
        (f"toy: {GOOD.replace('C: 64', 'C: sixty')}", "toy.C: got 'sixty', wanted a valid integer"),
        (f"toy: {GOOD.replace('[8]', '[]')}", "toy.cpu_tokens: got []"),
        (f"toy: {GOOD.replace('[8]', '[0]')}", "toy.cpu_tokens[0]: got 0"),
        (f"toy: {GOOD.replace('[8]', '[8, 8]')}", "toy.cpu_tokens: got [8, 8], wanted each bucket once"),
        (f"toy: {GOOD.replace('n: 4', 'n: 4, dtype: bf16')}", "toy.dtype: got 'bf16', wanted one of bfloat16"),
        (f"toy: {GOOD.replace('n: 4', 'n: 4, layers: 2')}", "toy.layers: unknown field"),
        ("toy: }", "line 1, column 6"),
    ],
)
def test_a_bad_file_is_one_line_naming_the_field(tmp_path, text, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(WorkloadError) as e:
        load_workloads(path)
    assert str(e.value).startswith(f"{path}: ")
    assert complaint in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(WorkloadError, match="cannot be read: No such file"):
        load_workloads(tmp_path / "none.yaml")
