"""``python -m tuner.startup_worker RIVAL T n C DTYPE DEVICE [warm_up]``: start as a training script does, up to the end of its first step.

Prints a JSON object: the wall clock (seconds since the epoch) when Python ran, when torch was imported, when the implementation was
imported and its parameters were on the device, and when the first and the second forward + backward had ended, and how many programs were
taken from a bundle; or ``{"missing": why}``.
"""

from __future__ import annotations

import time

STARTED = time.time()

import json  # noqa: E402  (what is imported is what is timed)
import sys  # noqa: E402

import torch  # noqa: E402

TORCH = time.time()


def main(name: str, T: str, n: str, C: str, dtype: str, device: str, warm_up: str = "") -> None:
    from tuner.bench_case import Case
    from tuner.bench_rivals import rival
    from tuner.errors import one_line

    def done() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.time()

    case = Case.random(int(T), int(n), int(C), getattr(torch, dtype), torch.device(device))
    try:
        if warm_up:
            import mhc

            mhc.warm_up(mhc.HyperConnection(int(C), int(n), device=case.x.device), int(T), case.x.dtype)
        boundary = rival(name).make(case)
    except ImportError as error:
        print(json.dumps({"missing": one_line(error)}))
        return
    stamps = {"python": STARTED, "torch": TORCH, "ready": done()}
    for step in ("first", "second"):
        boundary.forward_backward(case.dy)
        stamps[step] = done()
    ours = sys.modules.get("mhc.bundle")
    bundle = ours.loaded() if ours else None
    print(json.dumps({**stamps, "bundled": bundle.used if bundle else 0}))


if __name__ == "__main__":
    main(*sys.argv[1:])
