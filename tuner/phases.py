"""Where the time went: seconds of the measuring processes by what they were doing, and of the storage beside them."""

from __future__ import annotations

from collections.abc import Mapping

#: What a measuring process may be doing, in the order shown.
PHASES = {
    "compile": "waiting for compiles",
    "others": "waiting for other workers",
    "gate": "correctness gate",
    "timing": "timing",
    "confirm": "confirmation",
    "copy": "copy bandwidth and start",
    "load": "loading kernels, inputs, the device's lock",
}


class Phases:
    """Seconds by phase, added up over all devices."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += max(0.0, seconds)

    def lines(self, wall_s: float, devices: int, storage_s: float) -> list[str]:
        """For people: shares of the devices' time, largest first, then the storage, whose time passes beside theirs."""
        whole = max(wall_s * devices, 1e-9)
        used: Mapping[str, float] = {PHASES[name]: s for name, s in self.seconds.items() if s > 0.005 * whole}
        rest = whole - sum(used.values())
        parts = sorted(used.items(), key=lambda item: -item[1])
        if rest > 0.005 * whole:
            parts.append(("starting, stopping and the rest", rest))
        on = f" on {devices} devices" if devices > 1 else ""
        shown = ", ".join(f"{name} {s:.0f} s ({s / whole:.0%})" for name, s in parts)
        return [f"where the time went ({wall_s:.0f} s{on}): {shown}", f"storage: {storage_s:.1f} s, beside the above"]
