"""tuner/devices.py: which GPUs one run measures on."""

from types import SimpleNamespace

import pytest
import torch

from tuner.devices import Device, aim, pick, visible_devices
from tuner.errors import TuneError

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
MIXED = [Device(0, "GPU-a", "h200", H200), Device(1, "GPU-b", "h100", H100), Device(2, "GPU-c", "h100", H100)]


@pytest.fixture
def machine(monkeypatch):
    """``machine(name, ...)``: a machine with these GPUs; (name, uuid) where torch tells one."""

    def make(*gpus):
        props = [SimpleNamespace(name=gpu) if isinstance(gpu, str) else SimpleNamespace(name=gpu[0], uuid=gpu[1]) for gpu in gpus]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(props))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(props))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: props[i])

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def test_all_of_one_kind_are_used_unless_some_are_named():
    assert [d.index for d in pick(None, H100, MIXED)] == [1, 2]
    assert [d.index for d in pick("all", H200, MIXED)] == [0]
    assert [d.index for d in pick("2, 1,2", H100, MIXED)] == [2, 1]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("3", "got '3', wanted numbers"), ("a", "got 'a'"), ("", "got ''"), ("1,0", f"device 0 is {H200!r}, wanted {H100!r} only")],
)
def test_a_device_that_is_not_there_or_of_another_kind_is_refused(wanted, said):
    with pytest.raises(TuneError, match="--devices") as e:
        pick(wanted, H100, MIXED)
    assert said in str(e.value)
    assert f"1 ({H100})" in str(e.value)


def test_the_cpu_is_one_device_that_sees_what_this_process_sees():
    (device,) = pick(None, "Some CPU", [])
    assert device.env == {}


def test_each_device_is_shown_alone_to_its_process(machine, monkeypatch):
    machine(H100, (H100, "1234"))
    assert [d.env for d in visible_devices()] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "GPU-1234"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-abc")
    assert [d.visible for d in visible_devices()] == ["3", "MIG-abc"]


def test_a_profile_that_is_not_the_first_device_is_aimed_at(machine, monkeypatch):
    machine(H200, H100)
    set_to = []
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    aim("auto")
    aim("cpu")
    aim("H100")
    aim("b200")
    assert set_to == [1]


def test_a_machine_without_a_gpu_has_none(machine):
    machine()
    assert visible_devices() == []
