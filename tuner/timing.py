"""Exclusive timing, one method for everything that is compared: samples in microseconds, their median and its confidence interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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


class Clock:
    """Times calls on one device. On CUDA the L2 cache is flushed by the same buffer write before every call."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._flush: torch.Tensor | None = None
        if self.device.type == "cuda":
            l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 50 << 20)
            # several times the cache, and long enough that the host enqueues the timed call while it runs
            self._flush = torch.empty(max(256 << 20, 4 * l2), dtype=torch.int8, device=self.device)

    def sample(self, call: Call, count: int) -> list[float]:
        """``count`` samples of one call, in microseconds, in the order taken."""
        return [s[0] for s in self.interleaved([call], count)]

    def interleaved(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """``rounds`` rounds of one sample of every call: drift of the clock hits all of them alike."""
        if self.device.type == "cpu":
            return [[_wall_us(call) for call in calls] for _ in range(rounds)]
        pairs = []
        for _ in range(rounds):
            row = []
            for call in calls:
                assert self._flush is not None
                self._flush.zero_()
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                stop.record()
                row.append((start, stop))
            pairs.append(row)
        torch.cuda.synchronize(self.device)
        return [[start.elapsed_time(stop) * 1e3 for start, stop in row] for row in pairs]

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

    def copy_gbps(self, nbytes: int | None = None) -> float:
        """Copy bandwidth in GB/s (bytes read plus written): what a perfect memory-bound kernel would reach here."""
        nbytes = nbytes or (64 << 20 if self.device.type == "cpu" else 1 << 30)
        source = torch.empty(nbytes, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        self.sample(lambda: target.copy_(source), 2)
        return 2 * nbytes / median(self.sample(lambda: target.copy_(source), 9)) / 1e3


def _wall_us(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6
