"""``python -m tuner.bench_worker DEVICE``: entrants in a process of their own, driven by JSON lines on stdin and stdout.

A request is ``{"do": ..., ...}``, its answer ``{"ok": ...}`` or ``{"error": "one line"}``. Between requests the process leaves its device
idle, so that the one who asks may time others meanwhile. What a rival prints goes to stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import sys
from typing import Any

import torch

from tuner.bench_entrant import Entrant, Spec, release
from tuner.errors import one_line
from tuner.orphan import end_with_parent
from tuner.timing import Clock


def forget_autotuning() -> int:
    """Empty the choices of every ``triton.autotune`` in this process (its compiled programs stay). Returns how many had any."""
    if "triton" not in sys.modules:
        return 0
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    tuners = [t for t in gc.get_objects() if issubclass(type(t), autotuner) and t.cache]
    for tuner in tuners:
        tuner.cache.clear()
    return len(tuners)


class Worker:
    """The requests it answers are its methods."""

    def __init__(self, device: str) -> None:
        self.clock = Clock(torch.device(device))
        self.entrants: dict[int, Entrant] = {}

    def hello(self) -> dict[str, Any]:
        return {"python": platform.python_version(), "torch": torch.__version__}

    def warm(self, specs: list[dict[str, Any]]) -> str | None:
        """Compile what these need; nothing is kept but the compiled code. Returns why the rival cannot be imported, or None."""
        for spec in specs:
            entrant = Entrant(Spec(**{**spec, "timed": False}), self.clock)
            missing: str | None = entrant.row["missing"]
            entrant.close()
            release()
            if missing:
                return missing
        return None

    def retune(self, specs: list[dict[str, Any]]) -> int:
        """Let Triton's autotuners choose once more, now that nobody else uses the device. Returns how many had chosen."""
        chosen = forget_autotuning()
        if chosen:
            self.warm(specs)
        return chosen

    def open(self, id: int, spec: dict[str, Any]) -> dict[str, Any]:
        self.entrants[id] = entrant = Entrant(Spec(**spec), self.clock)
        release(everything=False)
        return {"row": entrant.row, "keys": entrant.keys}

    def sample(self, id: int) -> dict[str, float]:
        return self.entrants[id].sample()

    def host(self, id: int) -> dict[str, float]:
        return self.entrants[id].host()

    def launches(self, id: int) -> dict[str, Any]:
        return self.entrants[id].launches()

    def close(self, id: int) -> None:
        entrant = self.entrants.pop(id, None)
        if entrant is not None:
            entrant.close()
        release()


def main(device: str) -> None:
    # whoever prints in this process prints to stderr, the protocol has the old stdout to itself
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    end_with_parent()
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(device)
            result: dict[str, Any] = {"ok": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            result = {"error": one_line(error)}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
