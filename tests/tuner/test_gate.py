"""tuner/gate.py: no wrong numbers get past it."""

import pytest
import torch

from tl_kernels import KERNELS, reference
from tuner.gate import Case, GateError, check, reference_fp64, relative_error
from tuner.inputs import make_inputs

KERNEL = KERNELS["pre_bwd"]


class Fake:
    """A launcher that computes the reference in float32 and then does what ``fault`` says to the raw outputs."""

    def __init__(self, fault=lambda out: None, dtype="bfloat16", C=96):
        self.kernel, self.p = KERNEL, KERNEL.problem(4, C, dtype)
        self.fault, self.calls = fault, 0

    def empty_outputs(self, T, device):
        return [torch.empty(t.shape(self.p, T), dtype=getattr(torch, t.dtype_name(self.p)), device=device) for t in KERNEL.outputs]

    def __call__(self, *inputs, out):
        self.calls += 1
        for o, value in zip(out, KERNEL.reference(*(t.float() for t in inputs)), strict=True):
            o.copy_(value)
        self.fault(out)
        return tuple(out)


def case(fake, T=37):
    inputs = make_inputs(KERNEL, fake.p, T, seed=0)
    return Case(T, inputs, reference_fp64(KERNEL, fake.p, inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("T", [1, 37])
def test_right_numbers_pass_and_their_errors_are_named(dtype, T):
    fake = Fake(dtype=dtype)
    errors = check(fake, case(fake, T))
    assert set(errors) == {"dx", "dH_pre"}
    assert 0 <= errors["dH_pre"] < 1e-6


def test_a_planted_wrong_kernel_is_caught():
    def off_by_a_percent(out):
        out[0].mul_(1.01)

    fake = Fake(off_by_a_percent)
    with pytest.raises(GateError, match=r"dx: relative error 1\.\d+e-02 at T=37, wanted at most 4e-03"):
        check(fake, case(fake))


def test_an_unwritten_tail_is_caught():
    def tail(out):
        out[1][-1].fill_(float("nan"))  # what a program that skips the last token leaves of the poison

    fake = Fake(tail)
    with pytest.raises(GateError, match="dH_pre: 4 of 148 elements unwritten or NaN"):
        check(fake, case(fake))


def outside(tensor, elements):
    """The one element so far from the tensor's first."""
    return torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + elements)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("elements", "where"), [(-1, "before its start"), (-96, "before its start"), (None, "past its end")])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_write_outside_is_caught(which, elements, where, value):
    def write(out):
        outside(out[which], out[which].numel() if elements is None else elements).fill_(value)

    fake = Fake(write)
    with pytest.raises(GateError, match=f"{KERNEL.outputs[which].name}: written {where} at T=37"):
        check(fake, case(fake))


@pytest.mark.parametrize("T", [1, 37])
def test_a_whole_row_too_many_is_caught_at_its_far_end(T):
    """dx has rows of n C elements; a program that skips the row before the first leaves the nearer ones alone."""

    def write(out):
        outside(out[0], -4 * 1024).fill_(0.0)

    fake = Fake(write, C=1024)
    with pytest.raises(GateError, match="dx: written before its start"):
        check(fake, case(fake, T))


def test_a_changed_input_is_caught_and_spoils_nobody_elses():
    class Writes(Fake):
        def __call__(self, *inputs, out):
            results = super().__call__(*inputs, out=out)
            inputs[1].view(-1)[-1] += 1
            return results

    fake = Writes()
    theirs = case(fake)
    before = [t.clone() for t in theirs.inputs]
    with pytest.raises(GateError, match="x: an input, changed at T=37"):
        check(fake, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, theirs.inputs, strict=True))


def test_outputs_are_poisoned_and_aligned_as_they_are_in_use():
    seen = []

    class Looks(Fake):
        def __call__(self, *inputs, out):
            seen.extend((bool(o.isnan().all()), o.storage_offset() * o.element_size() % 512) for o in out)
            return super().__call__(*inputs, out=out)

    for C in (96, 97):  # rows of whole and of odd sizes
        fake = Looks(C=C)
        check(fake, case(fake))
    assert set(seen) == {(True, 0)}
    assert len(seen) == 8  # two outputs, two runs, twice


def test_a_result_that_changes_from_run_to_run_is_caught():
    def drift(out):
        out[1].view(-1)[0] += 1e-6 * fake.calls

    fake = Fake(drift)
    with pytest.raises(GateError, match="dH_pre: two runs on the same inputs differ"):
        check(fake, case(fake))


def test_tf32_precision_does_not_pass_for_float32():
    def truncate(out):
        out[1].copy_(out[1].to(torch.float16).float())

    fake = Fake(truncate)
    with pytest.raises(GateError, match="dH_pre: relative error"):
        check(fake, case(fake))


@pytest.mark.parametrize("name", ["post_res_bwd", "project_bwd", "activate_bwd", "pre_streams_grad"])
def test_the_chunked_reference_equals_the_whole_one(name):
    kernel = KERNELS[name]
    p = kernel.problem(4, 64)
    inputs = make_inputs(kernel, p, 37, seed=1)
    whole, chunked = (reference_fp64(kernel, p, inputs, chunk_bytes=b) for b in (1 << 40, 1))
    for tensor, a, b in zip(kernel.outputs, whole, chunked, strict=True):
        assert a.dtype is torch.float64
        assert relative_error(b, a) < 1e-12, tensor.name


class Splits:
    """``post_res_project`` computed in float32, y rounded, and what ``fault`` says; parts in three splits."""

    kernel = KERNELS["post_res_project"]

    def __init__(self, fault=lambda y, parts: None):
        self.p, self.fault = self.kernel.problem(4, 64), fault

    def empty_outputs(self, T, device):
        return [torch.empty(t.shape(self.p, T, 3), dtype=getattr(torch, t.dtype_name(self.p)), device=device) for t in self.kernel.outputs]

    def __call__(self, *inputs, out):
        y, _ = self.kernel.reference(*(t.float() for t in inputs))
        out[0].copy_(y)
        self.fault(*out)
        whole = reference.project_parts(out[0].float(), inputs[-1])
        out[1].copy_(whole * torch.tensor([0.5, 0.75, -0.25]).view(3, 1, 1))
        return tuple(out)

    def checked(self, T=37):
        inputs = make_inputs(self.kernel, self.p, T, seed=0)
        return check(self, Case(T, inputs, reference_fp64(self.kernel, self.p, inputs)))


def test_splits_are_judged_by_their_sum():
    assert Splits().checked()["parts"] < 1e-6


def test_a_result_may_round_either_way_and_what_follows_answers_to_it():
    """One element of y in a thousand a step higher: within y's tolerance, far outside that of parts if those answered to another y."""

    def other_way(y, parts):
        y.view(-1)[::1000] *= 1 + 2**-7

    assert Splits(other_way).checked()["parts"] < 1e-6
