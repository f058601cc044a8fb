"""Profiles of kernels that do nothing, on a machine with one H100 that is not there."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest

from mhc import profile as mp
from mhc.profile import load_profile, save_profile
from mhc.schema import Profile
from tests.mhc.test_schema import ENTRY, PROFILE
from tl_kernels.spec import Kernel, Problem, Tensor

DEFAULT = {"block_C": 128, "threads": 64}


def build(p: Problem, cfg: Any) -> None:
    """Never called; its module is what source_hash reads."""


def fake_kernel(name: str, tensor: Tensor) -> Kernel:
    return Kernel(
        name=name,
        build=build,
        inputs=(tensor,),
        outputs=(tensor,),
        space=lambda p: {"block_C": (128, 256, 512), "threads": (64, 128)},
        default=lambda p: dict(DEFAULT),
        invalid=lambda p, cfg: f"block_C={cfg['block_C']}: larger than C={p.C}" if cfg["block_C"] > p.C else None,
        reference=lambda p, *inputs: inputs,
    )


KERNELS = {
    "post_res": fake_kernel("post_res", Tensor("x", "T n C", "stream")),
    "pre": fake_kernel("pre", Tensor("x", "T n C", "stream")),
    "sinkhorn": fake_kernel("sinkhorn", Tensor("h_res", "T n n")),
    "sum_parts": fake_kernel("sum_parts", Tensor("dphi", "M K")),
}
HASH = KERNELS["post_res"].source_hash


def entry(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(ENTRY), "config": {"block_C": 256, "threads": 128}, "source_hash": HASH, **fields}


def profile(*entries: dict[str, Any], gpu: str = "NVIDIA H100 80GB HBM3", arch: str = "sm_90a", **where: Any) -> Profile:
    provenance = {**PROFILE["provenance"], "gpu": gpu, "arch": arch, **where}
    return Profile.model_validate({**PROFILE, "provenance": provenance, "entries": list(entries)})


def load(tmp_path: Path, *entries: dict[str, Any], **provenance: str) -> Path:
    path = tmp_path / "mine.yaml"
    save_profile(profile(*entries, **provenance), path)
    load_profile(path)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with one H100, the fake kernels, and an empty folder of packaged profiles, which is returned."""
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "workloads.yaml").write_text("{}")
    monkeypatch.setattr(mp, "KERNELS", KERNELS)
    monkeypatch.setattr(mp, "packaged_dir", lambda: configs)
    monkeypatch.setattr(mp, "device_name", lambda device: "AMD EPYC" if device.type == "cpu" else "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(mp, "device_arch", lambda device: "cpu" if device.type == "cpu" else "sm_90a")
    monkeypatch.setattr(mp, "multiprocessors", lambda device: 132)
    monkeypatch.delenv("MHC_PROFILE", raising=False)
    mp.reset()
    yield configs
    mp.reset()


@pytest.fixture
def said(caplog):
    """The warnings given so far."""
    caplog.set_level(logging.DEBUG, logger="mhc")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "mhc" and r.levelno >= logging.WARNING]
