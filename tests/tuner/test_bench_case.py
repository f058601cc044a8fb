"""tuner/bench_case.py: shapes as typed, cases that repeat, and the float64 answer of a stack."""

from __future__ import annotations

import math

import pytest
import torch

from tuner import bench_case
from tuner.bench_case import Case, Shape, expected, finite_error, plain_boundary
from tuner.errors import TuneError

CPU = torch.device("cpu")


def stack(layers: int, T: int = 6) -> list[Case]:
    return Case.stack(T, 3, 16, torch.float32, CPU, seed=3, layers=layers)


def test_shapes_are_read_with_their_rivals():
    assert Shape.parse("8192x4x2560") == Shape(8192, 4, 2560)
    assert Shape.parse(" 64x2x256:ours+eager").only == ("ours", "eager")
    assert str(Shape(1, 2, 3)) == "1 x 2 x 3"


@pytest.mark.parametrize("text", ["8192x4", "x4x2", "8x9x16", "0x4x16", "8x4x0", "8x4x16:", "8 x 4 x 16"])
def test_bad_shapes_say_what_is_wanted(text):
    with pytest.raises(TuneError, match="--shapes: got"):
        Shape.parse(text)


def test_a_shape_that_takes_no_rivals_says_so():
    assert Shape.parse("8x4x16", "--shape", narrow=False) == Shape(8, 4, 16)
    with pytest.raises(TuneError, match=r"^--shape: got '8x4x16:ours', wanted TxnxC such as 8192x4x2560$"):
        Shape.parse("8x4x16:ours", "--shape", narrow=False)


def test_floor_is_that_of_the_design_at_four_streams():
    assert Shape(8192, 4, 2560).floor_units == {"forward": 10, "forward_backward": 33}
    assert Shape(8192, 4, 2560).unit_bytes("bfloat16") == 8192 * 2560 * 2
    assert Shape(8, 4, 16).unit_bytes("float32") == 8 * 16 * 4


def test_cases_are_random_and_repeatable():
    one, same, other = (Case.random(6, 3, 16, torch.float32, CPU, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.fn, same.fn)
    assert not torch.equal(one.x, other.x)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_stack_shares_its_streams_and_has_parameters_of_its_own():
    first, second, third = stack(3)
    alone = Case.random(6, 3, 16, torch.float32, CPU, seed=3)
    assert torch.equal(first.fn, alone.fn)
    assert second.x is first.x
    assert not torch.equal(first.fn, second.fn)
    assert not torch.equal(second.base, third.base)


def test_the_answer_of_a_stack_is_autograd_through_it_in_float64():
    cases = stack(2)
    leaves = [t.double().requires_grad_() for c in cases for t in (c.fn, c.base, c.scale)]
    x = cases[0].x.double().requires_grad_()
    y = plain_boundary(plain_boundary(x, *leaves[:3]), *leaves[3:])
    dx, *grads = torch.autograd.grad(y, [x, *leaves], cases[0].dy.double())
    got_y, got_dx, layers = expected(cases)
    assert torch.equal(got_y, y)
    assert torch.equal(got_dx, dx)
    for got, want in zip((t for layer in layers for t in layer.values()), grads, strict=True):
        assert torch.equal(got, want)


def test_the_answer_does_not_depend_on_how_it_is_cut(monkeypatch):
    whole = expected(stack(2, T=7))
    monkeypatch.setattr(bench_case, "CHUNK_BYTES", 2 * 10 * 3 * 16 * 8 * 3)  # three tokens at a time: 3, 3, 1
    cut = expected(stack(2, T=7))
    assert finite_error(cut[0], whole[0]) < 1e-14
    assert finite_error(cut[1], whole[1]) < 1e-14
    for a, b in zip(cut[2], whole[2], strict=True):
        assert max(finite_error(a[name], b[name]) for name in b) < 1e-13


def test_sinkhorn_order_and_rounded_weights_are_seen():
    cases = [Case(c.x, c.dy, c.fn, c.base, 3 * c.scale) for c in Case.stack(6, 3, 16, torch.bfloat16, CPU, seed=3)]
    plain = expected(cases)
    assert finite_error(expected(cases, order="rows_first")[0], plain[0]) > 1e-5
    assert finite_error(expected(cases, rounds_fn=True)[0], plain[0]) > 1e-5


def test_errors_that_are_not_numbers_are_infinite():
    want = torch.ones(3, dtype=torch.float64)
    assert finite_error(torch.tensor([1.0, math.nan, 1.0]), want) == math.inf
    assert finite_error(torch.tensor([1.0, math.inf, 1.0]), want) == math.inf
    assert finite_error(torch.ones(3), want) == 0
