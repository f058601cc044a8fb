"""What made host.txt: one boundary alone, eagerly, how many calls in a row. PYTHONPATH=. python results/h100/host.py"""

import gc
import statistics
import time

import torch

from tuner.bench_case import Case
from tuner.bench_rivals import rival

case = Case.stack(8192, 4, 2560, torch.bfloat16, torch.device("cuda"), 0, 1)[0]
ours = rival("ours").make(case)


def both():
    return ours.forward_backward(case.dy)


def in_a_row(calls, samples=40):
    """Microseconds a call from an idle device: by its events, and until the host is through."""
    taken = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        for _ in range(calls):
            both()
        host = (time.perf_counter() - began) * 1e6 / calls
        stop.record()
        stop.synchronize()
        taken.append((start.elapsed_time(stop) * 1e3 / calls, host))
    gpu, host = (statistics.median(times) for times in zip(*taken, strict=True))
    return f"gpu {gpu:.0f} host {host:.0f} us"


def host_us(call):
    taken = []
    for _ in range(200):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1e6)
    return f"{statistics.median(taken):.0f} us"


for _ in range(20):
    both()
for calls in (1, 2, 5, 10, 20, 50):
    print("calls in a row", calls, in_a_row(calls))
with torch.autograd.set_multithreading_enabled(False):
    for calls in (1, 2, 5, 10, 20):
        print("backward in the calling thread, calls in a row", calls, in_a_row(calls))
print("host fwd only (no grad)", host_us(ours.forward_only))
print("host fwd", host_us(ours.forward))
print("host fwd+bwd", host_us(both))
gc.disable()
print("gc off, 5 in a row:", in_a_row(5))
