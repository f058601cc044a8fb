"""A made-up ledger over a real kernel's space: times as a GPU gives them, with waves of blocks, occupancy and a narrow best corner."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tl_kernels import KERNELS
from tl_kernels.spec import SHARED_LIMIT
from tuner.hardware import Hardware
from tuner.space import Space
from tuner.task import Task

SMS = 132


def _unit(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def time_us(kernel: str, T: int, C: int, cfg: dict[str, Any], floor_us: float, world: int) -> float:
    """Waves of blocks over the SMs, each as fast as its tile, pipeline and occupancy allow, and 2% that nothing explains."""
    block_T, block_C, threads = cfg.get("block_T", 64), cfg.get("block_C", cfg.get("block_K", 64)), cfg["threads"]
    stages, splits, overlap = cfg.get("stages", 1), cfg.get("splits", 1), cfg.get("overlap", 0)
    shared = block_T * block_C * 10 * stages + 20_000
    resident = max(1, min(SHARED_LIMIT[90] * 1024 // shared, 2048 // threads // 2))
    blocks = -(-T // block_T) * splits
    waves = blocks / (SMS * resident)
    quantized = -(-blocks // (SMS * resident)) / waves
    # each world has its own chip: how much tiles, warps, pipelining and their interplay matter
    tile = (64 / block_C) ** (0.25 + 0.2 * _unit(world, "tile")) if block_C < 64 else 1 + 0.15 * _unit(world, block_C)
    tall = (64 / block_T) ** (0.3 * _unit(world, "tall"))
    per_warp = block_T * block_C / threads
    warps = 1 + (0.6 * _unit(world, "spill") * max(0.0, per_warp / 16 - 1)) + (0.2 if per_warp < 4 else 0.0)
    piped = {1: 1.25 + 0.3 * _unit(world, "stage"), 2: 1.0}.get(stages, 1.0 + 0.08 * (_unit(world, "deep") - 0.3))
    overlapped = 1.0 if overlap == 0 else 0.75 if stages > 1 else 1.1
    hidden = 1 + 0.35 / resident**1.5 / (1 + stages + overlap)
    odd = 1 + 0.02 * _unit(world, kernel, sorted(cfg.items()))
    return floor_us * quantized**0.7 * tile * tall * warps * piped * overlapped * hidden * odd * (1 + 0.004 * splits)


def make_study(kernel: str, C: int = 2560, T: int = 8192, world: int = 0) -> dict[str, Any]:
    """A study as ``--raw`` writes it, exhaustive."""
    spec = KERNELS[kernel]
    p = spec.problem(4, C)
    task = Task(kernel, p, T, "sm_90a", "h100", (C,))
    floor_us = spec.bytes_moved(p, T) / 3025e3
    trials = []
    for cfg in Space(spec, p, task.arch).feasible():
        luck = _unit(world, "fate", kernel, cfg.get("block_C"), cfg.get("block_T"), cfg["threads"], cfg.get("stages"))
        # whole corners of a space fail alike: a layout that does not exist, a tile that spills
        outcome = "infeasible" if luck < 0.06 else "compile_error" if luck < 0.12 else "ok"
        us = time_us(kernel, T, C, cfg, floor_us, world) if outcome == "ok" or cfg == spec.default(p) else None
        trials.append({"config": cfg, "outcome": "ok" if us else outcome, "time_us": us, "reason": None if us else "planted"})
    return {
        "kernel": kernel,
        "n": 4,
        "C": [C],
        "dtype": "bfloat16",
        "tokens": T,
        "study": task.key,
        "state": "done",
        "default": spec.default(p),
        "confirmation": None,
        "trials": trials,
    }


def make_ledger(*studies: dict[str, Any]) -> dict[str, Any]:
    hardware = Hardware(profile="h100", name="Planted H100", arch="sm_90a", sm_count=SMS)
    return {"schema_version": 1, "hardware": vars(hardware), "copy_gbps": 3025.0, "seed": 0, "command": "planted", "studies": list(studies)}


def text(*studies: dict[str, Any]) -> str:
    return json.dumps(make_ledger(*studies))
