"""Malformed files, and how many inputs the property-based tests take.

At least 1000 are refused in every run of the tests, the same ones each time; ``MHC_FUZZ_EXAMPLES=20000 pytest -s tests -k robust`` is a
campaign of new ones, and says how many inputs it took.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhc.yamlfile import field_name, printable

CAMPAIGN = "MHC_FUZZ_EXAMPLES" in os.environ
WANTED = int(os.environ.get("MHC_FUZZ_EXAMPLES", "1000"))
SHARES = {"profile fields": 0.25, "profile texts": 0.25, "workload fields": 0.1, "workload texts": 0.1, "command lines": 0.3}
assert WANTED >= 1000
assert math.isclose(sum(SHARES.values()), 1)


def hunt(part: str, inputs: st.SearchStrategy[Any], refused: Callable[[Any], bool], spare: float = 2.0) -> None:
    """Call ``refused``, which checks an input and says whether it was malformed, until the share of ``part`` was.

    ``spare``: how many inputs it may take for each that is malformed; some are valid all the same.
    """
    wanted, counted, tried = math.ceil(WANTED * SHARES[part]), set(), 0

    @settings(
        max_examples=math.ceil(spare * wanted),
        database=None,
        deadline=None,
        derandomize=not CAMPAIGN,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(value: Any) -> None:
        nonlocal tried
        if len(counted) == wanted:
            return
        tried += 1
        if refused(value):
            counted.add(repr(value))

    one()
    print(f"\n{part}: {len(counted)} different ones refused, of {tried} inputs")
    assert len(counted) == wanted


#: Whole numbers around every limit, and values of every type, which a field may not be.
HUGE = st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**30, -(10**63), 10**64, 10**400])
NUMBERS = st.integers() | HUGE | st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e308, 5e-324])
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", "\x1b[31m", "\x00", "\x85", "\u2028", "\u202e", "x" * 5000, "2026-13-45", "=", "<<", "~"]
)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def _paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [at, *(path for key in keys for path in _paths(node[key], (*at, key)))]


@st.composite
def spoilt_fields(draw: st.DrawFn, document: dict[str, Any]) -> tuple[bytes, tuple[str, ...]]:
    """``document`` with one field replaced, removed or added, as YAML; and how a complaint about it may begin."""
    data = copy.deepcopy(document)
    path = draw(st.sampled_from(_paths(data)))
    parents, target = {}, data
    for key in path:
        parents, target = target, target[key]
    way = draw(st.sampled_from(["replace", "replace", "remove", "add", "wrap"]))
    if way == "add" and isinstance(target, dict):
        key = draw(TEXTS)
        target[key] = draw(JUNK)
        path = (*path, key)
    elif way == "add" and isinstance(target, list):
        target.append(draw(JUNK))
        path = (*path, len(target) - 1)
    elif not path:
        data = draw(JUNK)
    elif way == "remove":
        del parents[path[-1]]
    else:
        parents[path[-1]] = [target] if way == "wrap" else draw(JUNK)
    # a number may be refused as it is read, before it is a field's; what two entries are looked up by may now be the same
    begins = (printable(field_name(path)), f"{printable(field_name(path[:-1]))}:", "line ", "top level: entries[") if path else ("",)
    return yaml.safe_dump(data, sort_keys=False).encode(), begins


#: What the worst YAML has in it.
NASTY = [
    "!!python/object/apply:os.mkdir [canary]", "!!python/name:os.system", "!!python/object/new:os.mkdir [canary]", "!<tag:x> 1", "! ''",
    "!!int x", "!!float ''", "!!bool maybe", "!!timestamp x", "!!binary '%'", "!!set {a}", "!!omap [a: 1]", "!!null x", "!!merge x",
    "&a [*a]", "*nowhere", "&a {<<: *a}", "{<<: [{a: 1}, {a: 1}]}", "<<: 3", "? [a, [b]]\n: 1", "? {a: 1}\n: 1", "? ", ": ", "=", "<<",
    "&a [" + "[" * 60 + "]" * 60 + "]", "- " * 3000, "{a: " * 3000, "[" * 3000, "x" * 5000, "9" * 5000, "0x" + "f" * 9000,
    "1:" * 9000 + "1", "1:" * 9000 + "1.5", "0x_", "0b", "._", ".nan", "-.inf", "1e999", "12:30",
    "\t", "\x00", "\x07", "\x1b[2J", "\x85", "\u2028", "\ufeff",
    "'", '"', '"\\x"', '"\\ud800"', "|", ">9", "%YAML 9.9\n---", "%TAG ! x", "---", "...", "--- a\n--- b", "@", "`", "#", "}", "]", ", ,",
    "n: 4", "\nn: 4\nn: 4", "\nschema_version: 1\n", "schema_version: 1\nschema_version: 1", "a: b: c",
]  # fmt: skip


@st.composite
def spoilt_text(draw: st.DrawFn, text: bytes) -> bytes:
    """``text`` with something put in, taken out, repeated or cut off; or nothing like it."""
    start, length = draw(st.integers(0, len(text) - 1)), draw(st.integers(1, 40))
    match draw(st.sampled_from(["nasty", "nasty", "value", "bytes", "delete", "repeat", "cut", "flip", "bomb", "anything"])):
        case "nasty":
            new = draw(st.sampled_from(NASTY)).encode()
            return text[:start] + new + text[start:]
        case "value":  # in place of a line's value
            lines = text.split(b"\n")
            at = draw(st.sampled_from([i for i, line in enumerate(lines) if b": " in line]))
            lines[at] = lines[at].partition(b": ")[0] + b": " + draw(st.sampled_from(NASTY)).encode()
            return b"\n".join(lines)
        case "bytes":
            return text[:start] + draw(st.binary(min_size=1, max_size=4)) + text[start:]
        case "delete":
            return text[:start] + text[start + length :]
        case "repeat":
            return text[:start] + text[start : start + length] * draw(st.integers(2, 30)) + text[start + length :]
        case "cut":
            return text[:start]
        case "flip":
            return text[:start] + bytes([text[start] ^ draw(st.integers(1, 255))]) + text[start + 1 :]
        case "bomb":
            return _bomb(draw(st.sampled_from(["[{}]", "{{<<: [{}]}}", "{{<<: {}}}"])), draw(st.integers(5, 40))) + text
        case _:
            return draw(st.binary(max_size=40)) + draw(st.text("ab:-{}[]&*!?|>'\"#%@,\n \t0.1eé", max_size=40)).encode()


def _bomb(form: str, levels: int) -> bytes:
    """A billion laughs: each line holds the one before it ten times."""
    times = 10 if "[" in form else 1
    lines = [f"l{i}: &l{i} " + form.format(", ".join([f"*l{i - 1}"] * times)) for i in range(1, levels)]
    return "\n".join(["l0: &l0 {k: 1}", *lines, ""]).encode()


_FIELD_OR_PLACE = re.compile(
    r": missing, wanted|: unknown field, wanted|: got |\] repeats entries\[|^line \d+, column \d+: |position \d+|nested deeper"
)


def check_complaint(complaint: str, file: str, begins: tuple[str, ...] = ("",)) -> None:
    """One short printable line that names the file, and then a field or a place, as one of ``begins`` does."""
    assert complaint.isprintable(), complaint
    assert len(complaint) < 600 + len(file), complaint
    assert complaint.startswith(f"{file}: "), complaint
    said = complaint.removeprefix(f"{file}: ")
    assert _FIELD_OR_PLACE.search(said), complaint
    assert said.startswith(begins), (complaint, begins)
