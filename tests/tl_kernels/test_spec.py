"""Specs as data: problems, bytes, constraints, and defaults that work for every size."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest

from tl_kernels import KERNELS, NAMES, STEPS, spec
from tl_kernels.spec import Problem

SIZES = [(n, C, dtype) for n in range(1, 9) for C in (1, 33, 100, 1280, 1920, 2560, 4096, 7168) for dtype in ("bfloat16", "float32")]


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_valid_for_every_size(name):
    kernel = KERNELS[name]
    for n, C, dtype in SIZES:
        p = kernel.problem(n, C, dtype)
        if kernel.unserved(p) is None:
            assert kernel.invalid(p, kernel.default(p)) is None, (p, kernel.default(p))


@pytest.mark.parametrize("name", NAMES)
def test_the_space_holds_the_default_and_something_else(name):
    kernel = KERNELS[name]
    p = kernel.problem(4, 2560)
    space = kernel.space(p)
    assert set(space) == set(kernel.default(p))
    assert all(kernel.default(p)[knob] in values for knob, values in space.items())
    assert any(len(values) > 1 for values in space.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("C", [1, 8, 16])
def test_few_channels_leave_something_to_choose_from(name, C):
    kernel = KERNELS[name]
    for n in (1, 4, 8):
        for dtype in ("bfloat16", "float32"):
            p = kernel.problem(n, C, dtype)
            if kernel.unserved(p) is None:
                space, default = kernel.space(p), kernel.default(p)
                assert all(space.values())
                if "block_C" in space and name in STEPS:  # of the others the default may lie outside
                    assert all(default[knob] in values for knob, values in space.items()), p


def test_bytes_are_the_floor_of_the_design():
    """Units u = T C 2 bytes at n = 4: project 4, pre 5, post_res 9 (design.md section 3), besides the coefficients."""
    T, C = 8192, 2560
    u = T * C * 2
    small = T * (24 + 1) * 4 + 24 * 4 * C * 4
    assert KERNELS["project"].bytes_moved(KERNELS["project"].problem(4, C), T) == 4 * u + small
    assert KERNELS["pre"].bytes_moved(KERNELS["pre"].problem(4, C), T) == 5 * u + T * 4 * 4
    assert KERNELS["post_res"].bytes_moved(KERNELS["post_res"].problem(4, C), T) == 9 * u + T * 20 * 4


@pytest.mark.parametrize(("n", "C", "dtype"), [(0, 64, "bfloat16"), (9, 64, "bfloat16"), (4, 0, "bfloat16"), (4, 64, "int8")])
def test_a_problem_out_of_range_names_the_argument(n, C, dtype):
    with pytest.raises(ValueError, match="wanted"):
        Problem(n, C, dtype)


def test_an_unknown_option_or_kernel_is_refused():
    with pytest.raises(TypeError, match="no_such"):
        KERNELS["sinkhorn"].problem(4, 64, no_such=1)
    with pytest.raises(KeyError, match="project"):
        KERNELS["no_such"]


def modules_of(kernel):
    found = []
    spec._collect(kernel.build.__module__, found)
    return {name.removeprefix("tl_kernels.") for name in found}


def test_a_hash_changes_with_a_constant_of_another_file(monkeypatch):
    before, source = KERNELS["streams_grad"].source_hash, inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module).replace("\nROLE = 128\n", "\nROLE = 256\n"))
    assert replace(KERNELS["streams_grad"]).source_hash != before


def test_what_counts_for_a_hash():
    assert modules_of(KERNELS["sum_parts"]) >= {"sum_parts", "sizes"}
    assert modules_of(KERNELS["streams_grad"]) >= {"streams_grad", "channel_slice", "meeting", "mma", "sizes"}
    assert modules_of(KERNELS["pre_streams_grad"]) >= {"pre_streams_grad_kept", "kept_tiles", "shares"}
    for kernel in KERNELS.values():
        assert not modules_of(kernel) & {"spec", "reference", "launch", "scratch", "cpu", "cpu_roles", "deferred"}


@pytest.mark.parametrize("file", sorted(Path(spec.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_every_import_from_the_package_is_seen(file):
    """They are looked for without parsing."""
    text, wanted = file.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if node.module == "tl_kernels":
                wanted |= {("", alias.name) for alias in node.names}
            elif node.module.startswith("tl_kernels."):
                wanted.add((node.module.removeprefix("tl_kernels."), ""))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("tl_kernels") for alias in node.names), "from tl_kernels import"
    found = spec._IMPORT.findall(text)
    assert {(module, "" if module else name) for module, names in found for name in names.split(", ")} == wanted


def test_hashes_differ_between_files_and_agree_inside_one():
    assert KERNELS["pre"].source_hash != KERNELS["project"].source_hash
    assert KERNELS["pre"].source_hash == KERNELS["pre_bwd"].source_hash
