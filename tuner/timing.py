"""Exclusive timing, one method for everything that is compared: samples in microseconds, their median and its confidence interval.

Tuner and benchmark share :class:`Clock`, so their figures mean the same. On CUDA every sample starts with the L2 cache full of other data,
read and not written. Written lines would be dirty, and evicting them would cost the timed call up to a cache's worth of somebody else's
write-backs. The other side of the coin: up to a cache's worth of the call's own writes is still in L2 when its clock stops, so a call
that moves little more than L2 looks faster than memory. Where a share of bandwidth is reported, a sample therefore moves many times L2
(several launches on inputs of their own, see tuner/bench_kernels.py), and copy bandwidth is measured by the same method in the same run.

A clock with a :class:`~tuner.device_state.Watch` takes its samples in batches and reads the device's clocks before and after each; a batch
that the watch calls dirty is dropped and taken again. All samples are CUDA events', of whatever is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tuner.device_state import State, Watch

Call = Callable[[], object]

#: A candidate this much slower than the best after its first samples is not worth more of them.
SLOW_FACTOR = 2.0
FIRST_SAMPLES = 3

#: Seconds that a batch between two readings of the clocks should take: about as long as a driver takes to change them. A reading costs
#: nothing while the device is busy anyway; where it takes longer than that, a batch is made this many times longer than a reading.
BATCH_S = 0.025
READS = 50
#: Rounds of the first batch, whose time says how many the next ones have.
FIRST_ROUNDS = 8
#: Seconds of other work before a dirty batch is taken again. Work, not rest: an idle chip's clock falls.
SETTLE_S = 0.05


def median(samples: Sequence[float]) -> float:
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free confidence interval of the median: the tightest pair of order statistics, as far from either end, that holds it
    at least that surely.

    Where no pair does (95%: fewer than six samples), the range of all of them is returned.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("samples: got none, wanted at least one")
    rank = max(1, median_rank(len(ordered), (1 - confidence) / 2))
    return ordered[rank - 1], ordered[-rank]


def median_rank(n: int, error: float) -> int:
    """The largest k for which the k-th smallest of ``n`` samples lies above the median with a chance of at most ``error``, by the exact
    binomial distribution (the sign test); 0: none.
    """
    k, below, ways = 0, 0, 1
    while k < (n + 1) // 2:
        below += ways  # of 2**n outcomes, those with at most k samples below the median
        if below / 2**n > error:
            break
        ways = ways * (n - k) // (k + 1)
        k += 1
    return k


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
    """Times calls on one device; see the module's page for what stands in L2 before each sample. Without a ``watch`` that sees the
    device's clocks, every sample counts.
    """

    def __init__(self, device: str | torch.device, watch: Watch | None = None) -> None:
        self.device = torch.device(device)
        self.watch = Watch() if watch is None else watch
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
        timed = _as_timed(calls)
        if not self.watch.sees:
            return self._take(timed, rounds, 0)
        taken: list[list[float]] = []
        before, size = self.watch.recent() or self._look(), FIRST_ROUNDS
        while len(taken) < rounds:
            start = time.perf_counter()
            batch = self._take(timed, min(size, rounds - len(taken)), len(taken))
            round_s = (time.perf_counter() - start) / len(batch)
            after = self.watch.last
            if self.watch.keep(before, after, len(batch) * len(timed)):
                taken += batch
                before, size = after, max(1, int(max(BATCH_S, READS * self.watch.read_s) / round_s))
            else:
                before = self._look(SETTLE_S)
        return taken

    def warm_up(self, calls: Sequence[Call | Timed], rounds: int) -> list[list[float]]:
        """As :meth:`interleaved`, for the first calls of something: whatever the clocks do meanwhile is not held against the timing."""
        return self._take(_as_timed(calls), rounds, 0)

    def _take(self, timed: Sequence[Timed], rounds: int, first: int) -> list[list[float]]:
        """Rounds ``first``, ``first + 1``, ... The watch reads the clocks during the last one: under load, and in nobody's time."""
        taken: list[list[Callable[[], float]]] = []
        last = torch.cuda.Event() if self.device.type == "cuda" and self.watch.sees else None
        for r in range(first, first + rounds):
            if last is not None and r == first + rounds - 1:
                last.record()
            row: dict[int, Callable[[], float]] = {}
            for k in range(len(timed)):
                which = (r + k) % len(timed)
                row[which] = self._one(timed[which])
            taken.append([row[k] for k in range(len(timed))])
        if last is not None:
            last.synchronize()
        if self.watch.sees:
            self.watch.read()
        self._synchronize()
        return [[read() for read in row] for row in taken]

    def _look(self, seconds: float = 0.0) -> State:
        """The device's state while it works at nothing that counts, after ``seconds`` of that."""
        until = time.perf_counter() + seconds
        self._flush()
        while time.perf_counter() < until:
            self._flush()
            self._synchronize()
        self._flush()
        state = self.watch.read()
        self._synchronize()
        return state

    def _flush(self) -> None:
        """Fill L2 with other data, on CUDA."""
        if self.device.type == "cuda":
            torch.sum(self._other_data, 0, keepdim=True, out=self._sum)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _one(self, timed: Timed) -> Callable[[], float]:
        """Take one sample; the result reads it, on CUDA after a synchronisation."""
        if self.device.type == "cpu":
            spent = wall_us(timed.call, timed.count)
            return lambda: spent
        self._flush()
        if timed.eager:
            self._synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(timed.count):
            timed.call()
        stop.record()
        return lambda: start.elapsed_time(stop) * 1e3 / timed.count

    def measure(self, call: Call, samples: int, budget_ms: float, best_us: float | None = None) -> tuple[list[float], bool]:
        """Warm up, sample within ``budget_ms``. Returns the samples and whether it stopped early: clearly slower than ``best_us``."""
        self.warm_up([call], 1 if self.device.type == "cpu" else 3)
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


def _as_timed(calls: Sequence[Call | Timed]) -> list[Timed]:
    return [c if isinstance(c, Timed) else Timed(c) for c in calls]


def wall_us(call: Call, count: int = 1) -> float:
    """The host's time for one of ``count`` calls in a row; whatever they enqueue on a device may still run."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) * 1e6 / count
