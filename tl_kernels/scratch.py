"""Scratch that a program keeps from launch to launch: zero once, then the program's own (tl_kernels/meeting.py).

Two launches that overlap must not share it. Launches of one stream do not overlap, so every stream has its own; and a CUDA graph has its
own, because two graphs captured on one stream may be replayed side by side. A graph's is cleared by a node of that graph. In what
``torch.compile(mode="reduce-overhead")`` warms up and records, every launch has its own: nothing may stay in the pool of those graphs but
their results.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

#: A program's, by device and stream: the capture it belongs to, 0 for none, and the tensor. Another program could not go on from it.
Kept = dict[Any, tuple[int, torch.Tensor]]


def scratch(kept: Kept, device: torch.device, words: int) -> torch.Tensor:
    """``words`` uint32 on ``device`` for a launch on the current stream of the program that has ``kept``."""
    key: Any
    if device.type == "cpu":  # calls of one thread do not overlap
        key, capture, stream = threading.get_ident(), 0, 0
    else:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        capture = _capture_id()(stream) if torch.cuda.is_current_stream_capturing() else 0
        # one for a stream's eager launches, one for its present capture: older captures are over, their graphs hold their memory themselves
        key = (device.index, stream, capture != 0)
    found = kept.get(key)
    if found is not None and found[0] == capture:
        return found[1]
    zeros = torch.zeros(words, dtype=torch.uint32, device=device)
    if device.type == "cpu" or not _of_cudagraph_trees(device.index, stream):
        kept[key] = (capture, zeros)
    return zeros


def _of_cudagraph_trees(device: int, stream: int) -> bool:
    """Whether it is the stream on which Inductor warms up and records its CUDA graphs, and whose allocations are from their pool."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    # a thread that has no trees would get some of its own by being asked, and autograd's go on with those
    if trees is None or not torch._C._is_key_in_tls("tree_manager_containers"):
        return False
    manager = trees.get_manager(device, create_if_none_exists=False)
    return manager is not None and manager.stream.cuda_stream == stream


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
