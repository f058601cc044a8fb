"""The profile schema: what it takes, and that it refuses everything else by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from pydantic import ValidationError

from mhc.profile import read_profile, save_profile
from mhc.schema import Profile
from mhc.yamlfile import first_complaint

ENTRY: dict[str, Any] = {
    "kernel": "post_res",
    "n": 4,
    "C": 2560,
    "dtype": "bfloat16",
    "tokens": 8192,
    "impl": "tilelang",
    "config": {"block_C": 640, "threads": 80, "swizzle": "row", "async": True},
    "time_us": 126.5,
    "time_ci_us": [126.1, 127],
    "gbps": 2980,
    "copy_share": 0.99,
    "default_us": 140.0,
    "runner_up_us": None,
    "verdict": "win",
    "error": {"y": 1.5e-3},
    "source_hash": "0123456789abcdef",
}
PROFILE: dict[str, Any] = {
    "schema_version": 1,
    "provenance": {
        "gpu": "NVIDIA H100 80GB HBM3",
        "arch": "sm_90a",
        "sm_count": 132,
        "power_limit_w": 700,
        "driver": "580.1",
        "cuda": "13.0",
        "torch": "2.13.0",
        "tilelang": "0.1.15",
        "copy_gbps": 2990.0,
        "seed": 0,
        "trials": 100,
        "date": "2026-11-21",
        "commit": None,
        "command": "mhc-tune --gpu h100",
    },
    "entries": [ENTRY],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good profile with one field, ``entries.0.n``, replaced; ``...`` removes it."""
    data = copy.deepcopy(PROFILE)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    node: Any = data
    for p in parents:
        node = node[p]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


def test_a_profile_keeps_every_value_and_type():
    profile = Profile.model_validate(PROFILE)
    entry = profile.entries[0]
    assert entry.config == ENTRY["config"]
    assert {k: type(v) for k, v in entry.config.items()} == {"block_C": int, "threads": int, "swizzle": str, "async": bool}
    assert entry.time_ci_us == (126.1, 127.0)
    assert entry.key == ("post_res", 4, 2560, "bfloat16", 8192)
    assert Profile.model_validate(profile.model_dump(mode="json")) == profile


#: What later tuners add to an entry.
EVIDENCE: dict[str, Any] = {
    "default_ci_us": [139.5, 141],
    "default_config": {"block_C": 128, "threads": 64},
    "runner_up_ci_us": [126.6, 127.5],
    "gain_ci": [0.09, 0.1],
    "trials": 16,
    "funnel": {"space": 432, "constraint": 120, "shared": 0, "ok": 12},
    "sampler": "tpe",
    "registers": 64,
    "stack": 0,
    "shared_bytes": 22528,
    "clock_mhz": 1755,
    "dirty": "the clock fell from 1980 to 1755 MHz",
    "date": "2026-11-22T06:50:26+00:00",
    "tilelang": "0.1.15",
    "driver": "580.1",
    "commit": "525d4e6ed3ea+",
}


def test_the_evidence_of_an_entry_survives_the_file(tmp_path):
    entry = {**ENTRY, **EVIDENCE}
    profile = Profile.model_validate({**PROFILE, "entries": [entry]})
    save_profile(profile, tmp_path / "p.yaml")
    read = read_profile(tmp_path / "p.yaml")
    assert read == profile
    kept = read.entries[0].model_dump(mode="json")
    assert {name: kept[name] for name in EVIDENCE} == EVIDENCE


def test_an_entry_of_an_older_tuner_loads_without_it_and_is_written_without_it(tmp_path):
    profile = Profile.model_validate(PROFILE)
    assert all(getattr(profile.entries[0], name) is None for name in EVIDENCE)
    save_profile(profile, tmp_path / "p.yaml")
    assert "null" not in (tmp_path / "p.yaml").read_text()
    assert read_profile(tmp_path / "p.yaml") == profile


def test_where_the_default_does_not_work_an_entry_has_no_time_of_it(tmp_path):
    profile = Profile.model_validate(changed("entries.0.default_us", ...))
    save_profile(profile, tmp_path / "p.yaml")
    assert read_profile(tmp_path / "p.yaml").entries[0].default_us is None


@pytest.mark.parametrize("name", EVIDENCE)
def test_evidence_may_be_missing_one_by_one(name):
    entry = {**ENTRY, **EVIDENCE, name: None}
    assert getattr(Profile.model_validate({**PROFILE, "entries": [entry]}).entries[0], name) is None


@pytest.mark.parametrize("date", ["2026-11-22T06:50:26+00:00", "2026-11-22T06:50:26Z", "2026-11-22"])
def test_dates_are_iso_dates(date):
    assert Profile.model_validate(changed("entries.0.date", date)).entries[0].date == date


def test_impl_is_tilelang_unless_said():
    assert Profile.model_validate(changed("entries.0.impl", ...)).entries[0].impl == "tilelang"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("schema_version", 2, "schema_version: got 2, wanted 1"),
        ("provenance.gpu", ..., "provenance.gpu: missing"),
        ("provenance.gpu", "", "provenance.gpu: got ''"),
        ("provenance.arch", "hopper", "provenance.arch: got 'hopper'"),
        ("provenance.copy_gbps", 0, "provenance.copy_gbps: got 0"),
        ("provenance.host", "a", "provenance.host: unknown field"),
        ("entries", {}, "entries: got {}, wanted a valid list"),
        ("entries.0", 3, "entries[0]: got 3"),
        ("entries.0.kernel", "Post Res", "entries[0].kernel: got 'Post Res'"),
        ("entries.0.n", 9, "entries[0].n: got 9, wanted less than or equal to 8"),
        ("entries.0.n", "4", "entries[0].n: got '4', wanted a valid integer"),
        ("entries.0.n", True, "entries[0].n: got True, wanted a valid integer"),
        ("entries.0.C", 0, "entries[0].C: got 0"),
        ("entries.0.dtype", "bf16", "entries[0].dtype: got 'bf16', wanted one of bfloat16"),
        ("entries.0.tokens", 0, "entries[0].tokens: got 0"),
        ("entries.0.impl", "triton", "entries[0].impl: got 'triton', wanted 'tilelang' or 'reference'"),
        ("entries.0.config.threads", 1.5, "entries[0].config.threads: got 1.5, wanted an integer, a string or a boolean"),
        ("entries.0.config.threads", [1], "entries[0].config.threads: got [1], wanted an integer"),
        ("entries.0.time_us", -1.0, "entries[0].time_us: got -1.0"),
        ("entries.0.time_us", math.nan, "entries[0].time_us: got nan"),
        ("entries.0.time_us", math.inf, "entries[0].time_us: got inf"),
        ("entries.0.time_ci_us", [2, 1], "entries[0].time_ci_us: got [2, 1], wanted [low, high]"),
        ("entries.0.time_ci_us", [1, math.nan], "entries[0].time_ci_us: got [1, nan], wanted [low, high]"),
        ("entries.0.time_ci_us", [1], "entries[0].time_ci_us: got [1], wanted [low, high]"),
        ("entries.0.time_ci_us", "12", "entries[0].time_ci_us: got '12', wanted [low, high]"),
        ("entries.0.default_us", 0.0, "entries[0].default_us: got 0.0"),
        ("entries", [{**ENTRY, "default_us": None, "verdict": "tie"}], "entries[0].verdict: got 'tie', wanted 'win' where there is no"),
        ("entries.0.verdict", "best", "entries[0].verdict: got 'best'"),
        ("entries.0.error", {"y": math.nan}, "entries[0].error.y: got nan"),
        ("entries.0.source_hash", ..., "entries[0].source_hash: missing"),
        ("entries.0.note", "x", "entries[0].note: unknown field"),
        ("entries.0.default_ci_us", [2, 1], "entries[0].default_ci_us: got [2, 1], wanted [low, high] in microseconds"),
        ("entries.0.runner_up_ci_us", 7, "entries[0].runner_up_ci_us: got 7, wanted [low, high]"),
        (
            "entries.0.gain_ci",
            [0.1, 1.0],
            "entries[0].gain_ci: got [0.1, 1.0], wanted [low, high] as shares of the default's time, below 1",
        ),
        ("entries.0.gain_ci", [-math.inf, 0.1], "entries[0].gain_ci: got [-inf, 0.1], wanted [low, high]"),
        ("entries.0.gain_ci", [True, 0.5], "entries[0].gain_ci: got [True, 0.5], wanted [low, high]"),
        ("entries.0.trials", -1, "entries[0].trials: got -1, wanted greater than or equal to 0"),
        ("entries.0.trials", 1.0, "entries[0].trials: got 1.0, wanted a valid integer"),
        ("entries.0.funnel", {"ok": -1}, "entries[0].funnel: got {'ok': -1}, wanted how many configurations ended at each rung"),
        ("entries.0.funnel", {"ok": True}, "entries[0].funnel: got {'ok': True}, wanted how many"),
        ("entries.0.funnel", {1: 1}, "entries[0].funnel: got {1: 1}, wanted how many"),
        ("entries.0.funnel", [1], "entries[0].funnel: got [1], wanted how many"),
        ("entries.0.sampler", "", "entries[0].sampler: got ''"),
        ("entries.0.registers", "64", "entries[0].registers: got '64', wanted a valid integer"),
        ("entries.0.stack", -8, "entries[0].stack: got -8"),
        ("entries.0.shared_bytes", 0.5, "entries[0].shared_bytes: got 0.5"),
        ("entries.0.clock_mhz", 0, "entries[0].clock_mhz: got 0, wanted greater than 0"),
        ("entries.0.dirty", 1, "entries[0].dirty: got 1, wanted a valid string"),
        ("entries.0.date", "yesterday", "entries[0].date: got 'yesterday', wanted an ISO date such as 2026-11-22"),
        ("entries.0.date", 20261122, "entries[0].date: got 20261122, wanted an ISO date"),
        ("entries.0.driver", "", "entries[0].driver: got ''"),
        ("entries", [ENTRY, ENTRY], "entries[1] repeats entries[0]"),
    ],
)
def test_a_bad_field_is_named(path, value, complaint):
    with pytest.raises(ValidationError) as e:
        Profile.model_validate(changed(path, value))
    assert complaint in first_complaint(e.value)


def test_the_number_of_further_complaints_is_said():
    data = changed("entries.0.n", 0)
    data["entries"][0]["C"] = 0
    with pytest.raises(ValidationError) as e:
        Profile.model_validate(data)
    assert first_complaint(e.value).endswith("(and 1 more)")
