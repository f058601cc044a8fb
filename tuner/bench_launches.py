"""What a call launches on the GPU, by kernel name, from torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: Kernels of PyTorch's own (elementwise, copies, fills, reductions) and the driver's copies and fills; library GEMMs are not among them.
_TORCH = re.compile(r"at::native|at::cuda|^Mem(set|cpy)\b|at_cuda_detail")


def is_torch(name: str) -> bool:
    """Whether PyTorch, not the implementation under test, brought this kernel."""
    return _TORCH.search(name) is not None


def short(name: str) -> str:
    """A kernel's name without what every name has."""
    return re.sub(r"^void |\(anonymous namespace\)::|at::native::|<unnamed>::", "", name)[:100]


def summary(events: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """(kernel, us) pairs -> launches and time, those of PyTorch's own kernels, and one line a kernel, the longest first."""
    kernels: dict[str, dict[str, Any]] = {}
    for name, us in events:
        line = kernels.setdefault(name, {"name": short(name), "launches": 0, "us": 0.0, "torch": is_torch(name)})
        line["launches"] += 1
        line["us"] += us
    lines = sorted(kernels.values(), key=lambda line: -line["us"])
    own = [line for line in lines if line["torch"]]
    return {
        "launches": sum(line["launches"] for line in lines),
        "us": sum(line["us"] for line in lines),
        "torch_launches": sum(line["launches"] for line in own),
        "torch_us": sum(line["us"] for line in own),
        "kernels": lines,
    }


def count_launches(call: Callable[[], object]) -> dict[str, Any] | None:
    """One call under the profiler; None where it sees no kernels (a driver that grants no counters)."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    seen = [e for e in prof.events() or () if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    events = [(e.name, float(e.time_range.elapsed_us())) for e in seen]
    return summary(events) if events else None
