"""tuner/hardware.py: the wrong machine is named, with what to run instead."""

import pytest

from tuner import hardware
from tuner.errors import TuneError
from tuner.hardware import Hardware, find_compiler, resolve

H200 = Hardware(profile="h200", name="NVIDIA H200", arch="sm_90a")


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(hardware, "_gpu", lambda: H200)
    assert resolve("auto") == H200
    assert resolve("h200") == H200
    assert resolve("cpu").arch == "cpu"
    monkeypatch.setattr(hardware, "_gpu", lambda: None)
    assert resolve("auto").profile == "cpu"


def test_another_gpu_is_named_with_the_command_for_it(monkeypatch):
    monkeypatch.setattr(hardware, "_gpu", lambda: H200)
    with pytest.raises(TuneError, match=r"--gpu h100: found 'NVIDIA H200' \(h200\); use --gpu h200 for this one"):
        resolve("h100")


def test_no_gpu_is_said_with_the_command_for_the_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "_gpu", lambda: None)
    monkeypatch.setattr(hardware, "nvidia_smi", lambda fields: [])
    with pytest.raises(TuneError, match=r"found no CUDA device.*use --gpu cpu here"):
        resolve("h100")
    monkeypatch.setattr(hardware, "nvidia_smi", lambda fields: ["NVIDIA H100 80GB HBM3"])
    with pytest.raises(TuneError, match=r"nvidia-smi shows 'NVIDIA H100 80GB HBM3', but this torch .* cannot use it"):
        resolve("h100")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(TuneError, match=r"g\+\+"):
        find_compiler(Hardware(profile="cpu", name="x", arch="cpu"))
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: False)
    with pytest.raises(TuneError, match="no nvcc"):
        find_compiler(H200)
