"""Which implementation serves, and what is said about it."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import mhc
from mhc import backend, profile
from tests.mhc.conftest import OPERATORS, make_inputs
from tl_kernels import reference

CPU = torch.device("cpu")


def test_use_backend_nests_and_ends():
    before = backend.current()
    with mhc.use_backend("reference"):
        with mhc.use_backend("tilelang"):
            assert backend.current() == "tilelang"
        assert backend.current() == "reference"
    assert backend.current() == before


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="use_backend: got 'triton', wanted one of auto, tilelang, reference"), mhc.use_backend("triton"):
        pass


def test_an_unknown_backend_in_the_environment_is_named():
    run = subprocess.run([sys.executable, "-c", "import mhc"], env={**os.environ, "MHC_BACKEND": "gpu"}, capture_output=True, text=True)
    assert run.returncode != 0
    assert "MHC_BACKEND: got 'gpu', wanted one of auto, tilelang, reference" in run.stderr


def test_the_environment_forces_the_reference():
    code = (
        "import sys, torch, mhc; u, _ = mhc.HyperConnection(8).pre(torch.ones(2, 4, 8));"
        "assert u.shape == (2, 8); assert 'tilelang' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MHC_BACKEND": "reference"}, check=True)


def test_no_compiler_means_the_reference_and_one_line(monkeypatch, caplog):
    from tl_kernels import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)
    backend._cpu_target.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="mhc"), mhc.use_backend("auto"):
            for T in (2, 3):
                args = make_inputs("post_res", T=T, C=24)
                torch.testing.assert_close(torch.ops.mhc.post_res(*args), reference.post_res(*args))
    finally:
        backend._cpu_target.cache_clear()
    said = [r.getMessage() for r in caplog.records if "C++ compiler" in r.getMessage()]
    assert len(said) == 1


def test_a_profile_that_prefers_the_reference_is_followed_on_auto_only(monkeypatch):
    """The same call, one backend after the other: what is remembered of a shape must not outlive the choice."""
    served = []
    run_reference = backend.run_reference
    monkeypatch.setattr(backend, "run_reference", lambda name, *rest: served.append(name) or run_reference(name, *rest))
    choice = profile.choose("pre", *_problem(), CPU)
    args = make_inputs("pre", T=5, C=64)
    prefers = {impl: profile.Choice(choice.config, impl, "exact") for impl in ("reference", "tilelang")}
    now = {"impl": "reference"}
    monkeypatch.setattr(profile, "choose", lambda *call: prefers[now["impl"]])
    profile.reset()  # what was chosen before is asked for again
    with mhc.use_backend("tilelang"):
        torch.ops.mhc.pre(*args)
        assert served == []
    with mhc.use_backend("auto"):
        torch.ops.mhc.pre(*args)
        assert served == ["pre"]
        now["impl"] = "tilelang"
        profile.reset()
        torch.ops.mhc.pre(*args)
        assert served == ["pre"]


def _problem():
    from tl_kernels import KERNELS

    return KERNELS["pre"].problem(4, 64, "float32"), 5


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_computes_bfloat16_streams_in_float32(name):
    """One rounding at the end: the same as the float32 answer on the same values, rounded."""
    args = make_inputs(name, dtype=torch.bfloat16)
    with mhc.use_backend("reference"):
        op = getattr(torch.ops.mhc, name).default
        got, want = op(*args), op(*(a.float() for a in args))
    for g, w in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(g, w.to(g.dtype))
