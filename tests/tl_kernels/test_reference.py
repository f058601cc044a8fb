"""The specification itself: what the formulas promise, whatever a kernel makes of them."""

import pytest
import torch

from tl_kernels import reference


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_project_bwd_is_the_gradient_of_project():
    x, phi, dz, drinv = rand(5, 3, 7), rand(15, 21), rand(5, 15), rand(5)
    _, rinv = reference.project(x, phi)
    by_hand = reference.project_bwd(dz, drinv, x, phi, rinv)
    for a, b in zip(by_hand, reference.vjp(reference.project, (x, phi), (dz, drinv)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["columns_first", "rows_first"])
def test_sinkhorn_is_doubly_stochastic(order):
    H = reference.sinkhorn(rand(9, 4, 4), order=order)
    torch.testing.assert_close(H.sum(1), torch.ones(9, 4, dtype=H.dtype), atol=1e-4, rtol=0)
    torch.testing.assert_close(H.sum(2), torch.ones(9, 4, dtype=H.dtype), atol=1e-4, rtol=0)


def test_orders_are_transposes_of_each_other():
    h = rand(9, 4, 4)
    rows = reference.sinkhorn(h.transpose(1, 2), order="rows_first").transpose(1, 2)
    torch.testing.assert_close(reference.sinkhorn(h), rows)


def test_h_res_is_the_transpose_of_the_stored_order():
    M = 8  # n = 2: pre 2, post 2, comb [j, i] 4
    z = torch.zeros(1, M, dtype=torch.float64)
    z[0, 4 + 0 * 2 + 1] = 5.0  # source 0, target 1
    _, _, h = reference.activate(z, torch.ones(1, dtype=z.dtype), torch.ones(3, dtype=z.dtype), torch.zeros(M, dtype=z.dtype))
    assert h[0, 1, 0] == 5.0


@pytest.mark.parametrize("n", range(1, 9))
def test_streams_inverts_M(n):
    assert reference.streams(n * n + 2 * n) == n
