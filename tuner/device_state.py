"""What a GPU was doing while it was timed: clocks and throttle reasons through NVML, and which of them make a timing dirty.

``nvidia-ml-py`` (imported as ``pynvml``) is asked when there is a GPU; without it, without a driver or where a query is not supported the
state is unknown, which is logged once and drops nothing.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from tuner.errors import one_line

log = logging.getLogger(__name__)

#: NVML's bits of what holds the clocks down. Written out: pynvml's releases call them by two names.
REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")

#: Share by which a clock may be lower than the highest seen, or move within a batch.
CLOCK_SLACK = 0.05
#: Batches that one timing may drop. After that it is kept as it is, and flagged.
REPEATS = 3
#: Seconds for which a reading still tells how the next batch begins.
FRESH_S = 0.02


@dataclass(frozen=True)
class State:
    """One reading; None where NVML does not say. Clocks in MHz, temperature in degrees Celsius, power in watts; ``others`` counts the
    compute processes on the GPU beside this one.
    """

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    reasons: tuple[str, ...] = ()
    temperature_c: float | None = None
    power_w: float | None = None
    others: int | None = None


def why_dirty(before: State, after: State, highest_mhz: float) -> str | None:
    """Why samples taken between two readings do not count, or None.

    - A thermal or hardware slowdown, or the power brake. Heat or the power supply then divide the clock, in steps shorter than a batch:
      what is timed is the machine room. The software's power cap alone does not make a batch dirty: under tensor cores it is an H100's
      steady state, and a configuration that draws more is slower in training too. One bound by memory hardly reaches it; it is recorded,
      and where it costs clock the next two rules see it.
    - The SM clock is more than 5% below the highest that this process has seen. A candidate timed then would lose to one timed earlier
      for nothing: what is not bound by memory alone follows the SM clock (results/notes.md: 21 to 26% longer at 1.44 GHz), and
      candidates differ by a few percent. Clocks go in small steps (15 MHz on an H100), and within 5% a step or two is no event.
    - The SM clock moved by more than 5% between the readings: the batch is a mixture, and its median says nothing about either clock.

    Other processes on the GPU are no reason: one that only holds a context disturbs nothing, NVML cannot tell it from one that works, and
    our own wait for tuner/device_lock.py.
    """
    slow = [r for r in SLOWDOWNS if r in before.reasons or r in after.reasons]
    if slow:
        return ", ".join(slow)
    if before.sm_mhz is None or after.sm_mhz is None:
        return None
    lowest, larger = sorted((before.sm_mhz, after.sm_mhz))
    if lowest < (1 - CLOCK_SLACK) * larger:
        return f"SM clock moved from {before.sm_mhz:.0f} to {after.sm_mhz:.0f} MHz"
    if lowest < (1 - CLOCK_SLACK) * highest_mhz:
        return f"SM clock {lowest:.0f} MHz, {highest_mhz:.0f} seen before"
    return None


class Monitor:
    """NVML's view of one GPU. A query that fails gives None: the device's errors are CUDA's to raise."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def _ask(self, query: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, query)(self._handle, *args)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def clock(self) -> State:
        """The two queries that judging a batch takes."""
        mhz = self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        names = tuple(REASONS.get(1 << i, f"bit_{i}") for i in range(64) if bits and int(bits) >> i & 1)
        return State(sm_mhz=float(mhz) if mhz else None, reasons=names)

    def state(self) -> State:
        """Everything."""
        memory = self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM)
        heat = self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU)
        power = self._ask("nvmlDeviceGetPowerUsage")
        running = self._ask("nvmlDeviceGetComputeRunningProcesses")
        others = None
        if running is not None:
            # in a container NVML tells the host's ids, or nothing: then this process cannot be found by its id
            own = any(process.pid == os.getpid() for process in running) or torch.cuda.is_initialized()
            others = max(0, len(running) - own)
        return replace(
            self.clock(),
            memory_mhz=float(memory) if memory else None,
            temperature_c=None if heat is None else float(heat),
            power_w=None if power is None else power / 1e3,
            others=others,
        )


def find_handle(nvml: Any, properties: Any) -> Any:
    """NVML's handle of the device with these properties (torch's), whatever CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER make its index.

    By PCI address, which for a MIG slice leads to the GPU that has the clocks; else by UUID. Raises NVML's error, or LookupError where
    there is nothing to go by.
    """
    bus, device, domain = (getattr(properties, f"pci_{part}_id", None) for part in ("bus", "device", "domain"))
    uuid = getattr(properties, "uuid", None)
    if bus is not None and device is not None:
        try:
            return nvml.nvmlDeviceGetHandleByPciBusId(f"{domain or 0:08X}:{bus:02X}:{device:02X}.0".encode())
        except nvml.NVMLError:
            if uuid is None:
                raise
    if uuid is None:
        raise LookupError("torch tells neither the UUID nor the PCI address of the device")
    bare = str(uuid).removeprefix("GPU-").removeprefix("MIG-")
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}".encode())
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}".encode()))


def open_monitor(device: str | torch.device, nvml: Any = None) -> Monitor | str:
    """The monitor of a CUDA device, or why there is none. ``nvml`` stands in for ``pynvml``."""
    if torch.device(device).type != "cuda":
        return "it is no GPU"
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError:
        return "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
        return Monitor(nvml, find_handle(nvml, torch.cuda.get_device_properties(device)))
    except (nvml.NVMLError, AttributeError, LookupError, RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        return one_line(e)


def read_state(device: str | torch.device = "cuda", nvml: Any = None) -> State:
    """All that NVML tells of a device now; every field None where it tells nothing."""
    monitor = open_monitor(device, nvml)
    return State() if isinstance(monitor, str) else monitor.state()


class Watch:
    """Says batch by batch whether samples count, and keeps account of one timing. One object for a device and process, because the
    highest clock seen is part of the judgement.
    """

    def __init__(self, monitor: Monitor | None = None) -> None:
        self._monitor = monitor
        self.highest_mhz = 0.0
        self.last = State()
        self.read_s = 0.0  # what the last reading took
        self._read_at = -FRESH_S
        self.start()

    @classmethod
    def of(cls, device: str | torch.device, nvml: Any = None) -> Watch:
        """The watch of a device; it sees nothing on the CPU, nor where NVML cannot be asked (logged: call once a process)."""
        monitor = open_monitor(device, nvml)
        if isinstance(monitor, Monitor):
            return cls(monitor)
        if torch.device(device).type == "cuda":
            log.warning("clocks and throttle reasons of the GPU are unknown (%s): no sample is dropped for them", monitor)
        return cls()

    @property
    def sees(self) -> bool:
        """Whether there is anything to read."""
        return self._monitor is not None

    def start(self) -> None:
        """Begin the account of another timing."""
        self.dropped = 0
        self._repeats, self._kept = 0, 0
        self._clocks: list[float] = []
        self._dirty: list[str] = []

    def read(self) -> State:
        start = time.perf_counter()
        state = self._monitor.clock() if self._monitor is not None else State()
        self.highest_mhz = max(self.highest_mhz, state.sm_mhz or 0.0)
        self.last, self._read_at = state, time.perf_counter()
        self.read_s = self._read_at - start
        return state

    def recent(self) -> State | None:
        """The last reading, if it is fresh enough to tell how a batch begins."""
        return self.last if time.perf_counter() - self._read_at < FRESH_S else None

    def keep(self, before: State, after: State, samples: int) -> bool:
        """Whether a batch of so many samples counts; if not it is to be taken again."""
        why = why_dirty(before, after, self.highest_mhz)
        if why is not None and self._repeats < REPEATS:
            self._repeats += 1
            self.dropped += samples
            return False
        self._kept += 1
        self._clocks += [mhz for mhz in (before.sm_mhz, after.sm_mhz) if mhz is not None]
        self._dirty += [why] if why is not None else []
        return True

    def report(self) -> dict[str, Any]:
        """``clock_mhz``: the median SM clock of what counts, ``dropped``: samples thrown away, ``dirty``: why what counts is not clean."""
        clocks = sorted(self._clocks)
        dirty = f"{self._dirty[0]} ({len(self._dirty)} of {self._kept} batches)" if self._dirty else None
        return {"clock_mhz": clocks[len(clocks) // 2] if clocks else None, "dropped": self.dropped, "dirty": dirty}
