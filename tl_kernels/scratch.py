"""Scratch that a program keeps from launch to launch: zero once, then the program's own (tl_kernels/meeting.py).

Two launches that overlap must not share it. Launches of one stream do not overlap, so every stream has its own; and a CUDA graph has its
own, because two graphs captured on one stream may be replayed side by side. A graph's is cleared by a node of that graph.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

#: By owner (a compiled program, kept for ever as these are), device and stream: the capture it belongs to, 0 for none, and the tensor.
_KEPT: dict[Any, tuple[int, torch.Tensor]] = {}
_LOCK = threading.Lock()


def scratch(owner: object, device: torch.device, words: int) -> torch.Tensor:
    """``words`` uint32 on ``device`` for a launch of ``owner`` on the current stream."""
    if device.type == "cpu":  # calls of one thread do not overlap
        return _kept((id(owner), threading.get_ident()), 0, words, device)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    capture = _capture_id()(stream) if torch.cuda.is_current_stream_capturing() else 0
    # one for a stream's eager launches, one for its present capture: older captures are over, and their graphs hold their memory themselves
    return _kept((id(owner), device.index, stream, capture != 0), capture, words, device)


def _kept(key: Any, capture: int, words: int, device: torch.device) -> torch.Tensor:
    kept = _KEPT.get(key)
    if kept is None or kept[0] != capture or kept[1].numel() != words:
        with _LOCK:
            kept = _KEPT[key] = (capture, torch.zeros(words, dtype=torch.uint32, device=device))
    return kept[1]


@functools.cache
def _capture_id() -> Callable[[int], int]:
    """What the driver calls the capture that a stream is in."""
    query = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    query.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_uint64), *[ctypes.c_void_p] * 3]

    def capture_id(stream: int) -> int:
        status, which = ctypes.c_int(), ctypes.c_uint64()
        error = query(stream, ctypes.byref(status), ctypes.byref(which), None, None, None)
        if error:
            raise RuntimeError(f"cuStreamGetCaptureInfo: error {error}")
        return which.value

    return capture_id
