"""tuner/device_state.py: what NVML says, and what of it makes a timing dirty. A fake NVML, and the real one on a GPU."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tuner import device_state as module
from tuner.device_state import CLOCK_SLACK, REPEATS, Monitor, State, Watch, find_handle, open_monitor, read_state, why_dirty

FULL = State(sm_mhz=1980.0)


class FakeNvml:
    """pynvml's functions for GPUs {PCI address: UUID}; ``says`` gives each query's value, or the error it raises."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, gpus=None, **says):
        self.gpus = gpus or {"00000000:3B:00.0": "GPU-aa", "00000000:AF:00.0": "GPU-bb"}
        self.says = {"clock": {1: 1980, 2: 2619}, "bits": 0, "heat": 41, "power": 123_456, "running": [], **says}

    def _say(self, what):
        value = self.says[what]
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self):
        self._say("init") if "init" in self.says else None

    def nvmlDeviceGetHandleByPciBusId(self, address):
        if address.decode() not in self.gpus:
            raise self.NVMLError("Not Found")
        return address.decode()

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for address, known in self.gpus.items():
            if known == uuid.decode():
                return address
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        return f"parent of {handle}"

    def nvmlDeviceGetClockInfo(self, handle, which):
        return self._say("clock")[which]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._say("bits")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._say("heat")

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._say("power")

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return self._say("running")


@pytest.fixture
def second(monkeypatch):
    """CUDA's device 0 is the machine's second GPU, as under CUDA_VISIBLE_DEVICES=1."""
    properties = SimpleNamespace(pci_bus_id=0xAF, pci_device_id=0, pci_domain_id=0, uuid="bb")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def test_a_reading_has_every_figure_in_its_unit(second):
    running = [SimpleNamespace(pid=pid) for pid in (os.getpid(), 11, 12)]
    state = read_state("cuda", FakeNvml(bits=0x4 | 0x40 | 1 << 40, running=running))
    assert state == State(1980.0, 2619.0, ("sw_power_cap", "hw_thermal_slowdown", "bit_40"), 41.0, 123.456, 2)


@pytest.mark.parametrize("what", ["clock", "bits", "heat", "power", "running"])
def test_a_query_that_fails_leaves_the_others(second, what):
    state = read_state("cuda", FakeNvml(**{what: FakeNvml.NVMLError("Not Supported")}))
    missing = {"clock": "sm_mhz", "heat": "temperature_c", "power": "power_w", "running": "others"}
    if what == "bits":
        assert state.reasons == ()
    else:
        assert getattr(state, missing[what]) is None
    assert (state.sm_mhz, state.power_w).count(None) == (what in ("clock", "power"))


def test_processes_of_a_container_do_not_count_this_one_as_another(second, monkeypatch):
    running = [SimpleNamespace(pid=pid) for pid in (5_000_001, 5_000_002)]  # the host's ids, this process's among them
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert read_state("cuda", FakeNvml(running=running)).others == 1


def test_the_gpu_is_found_by_pci_address_then_uuid_and_a_slice_by_its_gpu(second):
    nvml = FakeNvml()
    assert find_handle(nvml, second) == "00000000:AF:00.0"
    assert find_handle(nvml, SimpleNamespace(uuid="aa")) == "00000000:3B:00.0"
    # where the container's PCI address is not the host's
    assert find_handle(nvml, SimpleNamespace(pci_bus_id=1, pci_device_id=0, pci_domain_id=0, uuid="bb")) == "00000000:AF:00.0"
    assert find_handle(FakeNvml({"slice 0": "MIG-cc"}), SimpleNamespace(uuid="cc")) == "parent of slice 0"
    with pytest.raises(FakeNvml.NVMLError):
        find_handle(nvml, SimpleNamespace(uuid="dd"))


def test_without_nvml_the_state_is_unknown_and_said_once(second, monkeypatch, caplog):
    def no_module(name):
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", no_module)
    assert read_state("cuda") == State()
    with caplog.at_level(logging.WARNING, module.__name__):
        watch = Watch.of("cuda")
        for _ in range(9):
            assert watch.keep(watch.read(), watch.read(), 5)
    assert [r.getMessage() for r in caplog.records] == [
        "clocks and throttle reasons of the GPU are unknown (nvidia-ml-py is not installed): no sample is dropped for them"
    ]
    assert watch.report() == {"clock_mhz": None, "dropped": 0, "dirty": None}
    assert not watch.sees


def test_a_missing_driver_and_the_cpu_are_unknown_states(second, caplog):
    assert "Driver Not Loaded" in open_monitor("cuda", FakeNvml(init=FakeNvml.NVMLError("Driver Not Loaded")))
    assert not Watch.of("cpu").sees
    assert not caplog.records  # nobody misses a GPU's clocks on the CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_unknown_state_with_the_real_library_too():
    assert read_state("cuda") == State()


def with_reasons(*reasons):
    return State(sm_mhz=1980.0, reasons=reasons)


@pytest.mark.parametrize("reason", ["hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"])
def test_slowdowns_are_dirty_at_either_end(reason):
    assert why_dirty(with_reasons(reason), FULL, 1980.0) == reason
    assert why_dirty(FULL, with_reasons("gpu_idle", reason), 1980.0) == reason


def test_the_power_cap_alone_and_idling_are_not():
    assert why_dirty(with_reasons("sw_power_cap"), with_reasons("sw_power_cap", "gpu_idle", "applications_clocks_setting"), 1980.0) is None


def test_clocks_may_differ_by_five_percent():
    edge = 1980.0 * (1 - CLOCK_SLACK)
    assert why_dirty(State(edge), State(edge), 1980.0) is None
    assert why_dirty(State(edge - 1), State(edge - 1), 1980.0) == "SM clock 1880 MHz, 1980 seen before"
    assert why_dirty(State(edge), FULL, 1980.0) is None
    assert why_dirty(State(1200.0), FULL, 1980.0) == "SM clock moved from 1200 to 1980 MHz"
    assert why_dirty(FULL, State(1200.0), 1980.0) == "SM clock moved from 1980 to 1200 MHz"


def test_unknown_clocks_are_not_dirty_and_unknown_reasons_neither():
    assert why_dirty(State(), State(), 0.0) is None
    assert why_dirty(State(), FULL, 1980.0) is None


def test_a_watch_drops_so_often_then_keeps_and_says_why():
    watch = Watch(Monitor(FakeNvml(), "handle"))
    watch.read()
    low = State(1000.0)
    assert watch.keep(FULL, FULL, 10)
    assert [watch.keep(low, low, 4) for _ in range(REPEATS + 2)] == [False] * REPEATS + [True] * 2
    assert watch.report() == {"clock_mhz": 1000.0, "dropped": 4 * REPEATS, "dirty": "SM clock 1000 MHz, 1980 seen before (2 of 3 batches)"}
    watch.start()
    assert watch.report() == {"clock_mhz": None, "dropped": 0, "dirty": None}
    assert not watch.keep(low, low, 4)  # the highest clock outlives the timing


def test_only_a_fresh_reading_says_how_a_batch_begins(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    watch = Watch(Monitor(FakeNvml(), "handle"))
    assert watch.recent() is None
    watch.read()
    now[0] = 0.019
    assert watch.recent() == FULL
    now[0] = 0.021
    assert watch.recent() is None


@pytest.mark.gpu
def test_nvml_on_a_real_gpu():
    torch.ones(1, device="cuda")
    state = read_state()
    assert 100 < state.sm_mhz < 4000
    assert 100 < state.memory_mhz < 20_000
    assert 0 < state.temperature_c < 120
    assert 5 < state.power_w < 2000
    assert state.others is not None
    assert state.others >= 0
    assert Watch.of("cuda").sees


@pytest.mark.gpu
def test_a_gpu_named_by_uuid_is_the_same_gpu():
    ask = """
import pynvml, torch
from tuner.device_state import find_handle
pynvml.nvmlInit()
print(pynvml.nvmlDeviceGetUUID(find_handle(pynvml, torch.cuda.get_device_properties(0))), torch.cuda.get_device_properties(0).uuid)
"""

    def uuids(**env):
        command = [sys.executable, "-c", ask]
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.split()

    last = f"GPU-{torch.cuda.get_device_properties(torch.cuda.device_count() - 1).uuid}"
    nvml_uuid, torch_uuid = uuids(CUDA_VISIBLE_DEVICES=last)
    assert nvml_uuid == last == f"GPU-{torch_uuid}"


@pytest.mark.gpu
def test_the_real_library_tells_reasons_and_not_nothing():
    monitor = open_monitor("cuda")
    assert isinstance(monitor, Monitor)
    assert monitor._ask("nvmlDeviceGetCurrentClocksThrottleReasons") is not None
