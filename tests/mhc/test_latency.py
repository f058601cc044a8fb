"""Latency of a boundary as training code calls it, with --mhc-latency; the baselines are in .mhc-latency/, a file a device."""

from __future__ import annotations

import pytest
import torch

import mhc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8192, 2560), (64, 2560)] if DEVICE == "cuda" else [(64, 1280)]
N = 4


@pytest.mark.parametrize(("T", "C"), SHAPES)
def test_boundary_forward(mhc_latency, T, C):
    hc = mhc.HyperConnection(C, n=N).to(DEVICE)
    h = torch.randn(T, N, C, device=DEVICE, dtype=torch.bfloat16)

    def boundary():
        with torch.no_grad():
            u, ctx = hc.pre(h)
            return hc.post(u, ctx)

    # at least h and u are read, u and the result written
    mhc_latency(boundary, bytes_moved=2 * (N + 1) * T * C * h.element_size())
