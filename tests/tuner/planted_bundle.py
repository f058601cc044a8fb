"""Stand-ins for the job of `mhc-tune compile`, run in real worker processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

Library = tuple[bytes, list[tuple[int, int]]]


def library(name: str, p: Any, cfg: dict[str, Any], target: str) -> Library:
    return f"{name} {p} {sorted(cfg.items())} {target}".encode(), [(0, 0)]


def faulty(name: str, p: Any, cfg: dict[str, Any], target: str) -> Library:
    """``pre`` raises, ``sinkhorn`` takes its process along."""
    if name == "pre":
        raise RuntimeError("a long trace\n  of many lines\nno available layout found")
    if name == "sinkhorn":
        os.abort()
    return library(name, p, cfg, target)


def endless(name: str, p: Any, cfg: dict[str, Any], target: str) -> Library:
    """Leaves its process id, and never ends."""
    Path(os.environ["PLANTED_PID"]).write_text(str(os.getpid()))
    time.sleep(600)
    return library(name, p, cfg, target)
