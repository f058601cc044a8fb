"""Why an entry moved: every combination of what may differ."""

import itertools
from dataclasses import replace

import pytest

from tuner.attribution import Attribution, Origin, attribute
from tuner.regression import Rule, judge

RULE = Rule(tolerance=0.05, floor_us=0.5)
TOOLS = {"tilelang": "0.1.15", "torch": "2.11", "driver": "580", "cuda": "13.0"}
BEFORE = Origin("hash", "text", {"impl": "tilelang", "threads": 128}, TOOLS, clock_mhz=1980.0, copy_gbps=3000.0)
#: What may differ -> how, and the words for it.
DIFFERENCES = {
    "code": ({"program": "other", "source_hash": "new"}, "code: the generated program differs (text -> other)"),
    "configuration": ({"config": {"impl": "tilelang", "threads": 64}}, "configuration: threads 128 -> 64"),
    "toolchain": ({"toolchain": {**TOOLS, "torch": "2.13"}}, "toolchain: torch 2.11 -> 2.13"),
}


def change(now, before=100.0, band=0.02):
    return judge([now], [before], band, RULE)


@pytest.mark.parametrize("now", [115.0, 85.0])
@pytest.mark.parametrize("which", [c for r in range(4) for c in itertools.combinations(DIFFERENCES, r)], ids="+".join)
def test_what_differs_is_named(which, now):
    fields = {k: v for name in which for k, v in DIFFERENCES[name][0].items()}
    found = attribute(change(now), BEFORE, replace(BEFORE, **fields), RULE)
    assert found.verdict == ("regressed" if now > 100 else "improved")
    assert found.causes == (which or ("unexplained",))
    words = [DIFFERENCES[name][1] for name in which]
    if "configuration" in which and "code" in which:  # another configuration is another program: then the sources say whether code is
        words[0] = "code: the kernel's sources differ (hash -> new)"
    assert list(found.words) == (words or ["unexplained: code, configuration, toolchain and clocks are the same as far as they are known"])


def test_the_generated_text_knows_better_than_the_sources():
    a_comment = replace(BEFORE, source_hash="new")
    assert attribute(change(115.0), BEFORE, a_comment, RULE).causes == ("unexplained",)
    assert attribute(change(115.0), replace(BEFORE, program=None), a_comment, RULE).causes == ("code",)


@pytest.mark.parametrize("which", [c for r in range(4) for c in itertools.combinations(DIFFERENCES, r)], ids="+".join)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clock_mhz": 1720.0}, "clocks: SM clock 1980 -> 1720 MHz"),
        ({"copy_gbps": 2600.0}, "clocks: copy bandwidth 3000 -> 2600 GB/s"),
        ({"clock_mhz": 1900.0, "copy_gbps": 2600.0}, "clocks: copy bandwidth 3000 -> 2600 GB/s"),
        ({"dirty": "hw_thermal_slowdown"}, "clocks: this timing was disturbed: hw_thermal_slowdown"),
        # slower by far more than that, but then nobody knows
        ({"clock_mhz": 1000.0}, "clocks: SM clock 1980 -> 1000 MHz"),
    ],
)
def test_clocks_that_explain_a_slowdown_come_first_and_are_no_failure(fields, words, which):
    others = {k: v for name in which for k, v in DIFFERENCES[name][0].items()}
    now = replace(BEFORE, **fields, **others)
    found = attribute(change(115.0), BEFORE, now, RULE)
    assert (found.verdict, found.causes, found.words[0]) == ("clocks", ("clocks", *which), words)
    strict = attribute(change(115.0), BEFORE, now, RULE, strict=True)
    assert (strict.verdict, strict.causes) == ("regressed", ("clocks", *which))


@pytest.mark.parametrize(
    "fields",
    [
        {"clock_mhz": 1900.0},  # 4% of 15
        {"clock_mhz": 2200.0},  # faster
        {"clock_mhz": None, "copy_gbps": None},
    ],
)
def test_clocks_that_explain_too_little_are_not_named(fields):
    assert attribute(change(115.0), BEFORE, replace(BEFORE, **fields), RULE).causes == ("unexplained",)


def test_dirt_on_both_sides_explains_nothing():
    both = replace(BEFORE, dirty="hw_slowdown")
    assert attribute(change(115.0), both, both, RULE).verdict == "regressed"
    assert attribute(change(115.0), both, BEFORE, RULE).verdict == "regressed"


def test_gains_that_the_clocks_explain_are_no_gains():
    assert attribute(change(85.0), replace(BEFORE, clock_mhz=1700.0), BEFORE, RULE, strict=True).verdict == "clocks"
    found = attribute(change(85.0), replace(BEFORE, dirty="hw_slowdown"), BEFORE, RULE)
    assert found.words == ("clocks: the earlier timing was disturbed: hw_slowdown",)


def test_noise_is_noise_whatever_differs():
    now = replace(BEFORE, program="other", clock_mhz=1000.0)
    found = attribute(change(115.0, band=0.2), BEFORE, now, RULE)
    assert found == Attribution("noise", ("noise",), ("noise: runs of identical code differ by up to 20.0%",))


def test_what_did_not_move_has_no_cause():
    assert attribute(change(104.0), BEFORE, replace(BEFORE, program="other", clock_mhz=1000.0), RULE) == Attribution("same")
