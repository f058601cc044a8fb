"""Exclusive timing, one method for everything that is compared: samples in microseconds, their median and its confidence interval.

Tuner and benchmark share :class:`Clock`, so their figures mean the same. On CUDA every sample starts with the L2 cache full of other data,
read and not written. Written lines would be dirty, and evicting them would cost the timed call up to a cache's worth of somebody else's
write-backs. The other side of the coin: up to a cache's worth of the call's own writes is still in L2 when its clock stops, so a call
that moves little more than L2 looks faster than memory. Where a share of bandwidth is reported, a sample therefore moves many times L2
(several launches on inputs of their own, see tuner/bench_kernels.py), and copy bandwidth is measured by the same method in the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

Call = Callable[[], object]

#: A candidate this much slower than the best after its first samples is not worth more of them.
SLOW_FACTOR = 2.0
FIRST_SAMPLES = 3


def median(samples: Sequence[float]) -> float:
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free confidence interval of the median from order statistics (normal approximation of the binomial ranks).

    With fewer than six samples no pair of order statistics reaches 95%: the range of all of them is returned.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if n == 0:
        raise ValueError("samples: got none, wanted at least one")
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - reach) - (1 if n < 6 else 0))
    high = min(n - 1, math.ceil(n / 2 + reach) - 1 + (1 if n < 6 else 0))
    return ordered[low], ordered[max(low, high)]


@dataclass(frozen=True)
class Timed:
    """What one sample is: ``count`` calls in a row, whose time is divided by ``count``.

    ``eager`` waits for an idle device before the clock starts, so that launching is inside the time; otherwise the host launches ahead
    while the cache is being filled, and only the device's time is seen.
    """

    call: Call
    count: int = 1
    eager: bool = False


class Clock:
    """Times calls on one device; see the module's page for what stands in L2 before each sample."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 50 << 20)
            # several times the cache, and long enough that the host enqueues the timed call while it runs
            size = max(256 << 20, 4 * l2) // 4
            self._other_data = torch.zeros(size, dtype=torch.float32, device=self.device)
            self._sum = torch.zeros(1, dtype=torch.float32, device=self.device)

    def sample(self, call: Call, count: int) -> list[float]:
        """``count`` samples of one call, in microseconds, in the order taken."""
        return [s[0] for s in self.interleaved([call], count)]

    def interleaved(self, calls: Sequence[Call | Timed], rounds: int) -> list[list[float]]:
        """``rounds`` rounds of one sample of every call: drift of the clock hits all of them alike. Every round starts with another one."""
        timed = [c if isinstance(c, Timed) else Timed(c) for c in calls]
        taken: list[list[Callable[[], float]]] = []
        for r in range(rounds):
            row: dict[int, Callable[[], float]] = {}
            for k in range(len(timed)):
                which = (r + k) % len(timed)
                row[which] = self._one(timed[which])
            taken.append([row[k] for k in range(len(timed))])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [[read() for read in row] for row in taken]

    def _one(self, timed: Timed) -> Callable[[], float]:
        """Take one sample; the result reads it, on CUDA after a synchronisation."""
        if self.device.type == "cpu":
            spent = wall_us(timed.call, timed.count)
            return lambda: spent
        torch.sum(self._other_data, 0, keepdim=True, out=self._sum)
        if timed.eager:
            torch.cuda.synchronize(self.device)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(timed.count):
            timed.call()
        stop.record()
        return lambda: start.elapsed_time(stop) * 1e3 / timed.count

    def measure(self, call: Call, samples: int, budget_ms: float, best_us: float | None = None) -> tuple[list[float], bool]:
        """Warm up, sample within ``budget_ms``. Returns the samples and whether it stopped early: clearly slower than ``best_us``."""
        self.sample(call, 1 if self.device.type == "cpu" else 3)
        taken = self.sample(call, 1)
        if taken[0] < budget_ms * 1e3:
            taken += self.sample(call, FIRST_SAMPLES - 1)
        if best_us is not None and min(taken) > SLOW_FACTOR * best_us:
            return taken, True
        more = min(samples - len(taken), int(budget_ms * 1e3 / max(1e-3, median(taken))) - len(taken))
        return taken + (self.sample(call, more) if more > 0 else []), False

    def copy_call(self, nbytes: int | None = None) -> tuple[Call, int]:
        """A device-to-device copy, and the bytes it reads plus writes: many times any cache."""
        nbytes = nbytes or (64 << 20 if self.device.type == "cpu" else 1 << 30)
        source = torch.empty(nbytes, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * nbytes

    def copy_gbps(self, nbytes: int | None = None) -> float:
        """Copy bandwidth in GB/s (bytes read plus written): what a perfect memory-bound kernel would reach here."""
        copy, moved = self.copy_call(nbytes)
        self.sample(copy, 2)
        return moved / median(self.sample(copy, 9)) / 1e3


def wall_us(call: Call, count: int = 1) -> float:
    """The host's time for one of ``count`` calls in a row; whatever they enqueue on a device may still run."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) * 1e6 / count
