"""``project_parts`` against the float64 reference."""

import itertools

import pytest

from tests.tl_kernels.checks import FEW, check, problems
from tl_kernels import KERNELS
from tl_kernels.mma import padded
from tl_kernels.pieces import pieces
from tl_kernels.project_parts import shared_bytes
from tl_kernels.spec import MAX_N
from tuner.compile_job import lowered, lowered_shared_bytes


@problems(FEW)
@pytest.mark.parametrize("name", ["project_parts"])
def test_matches_the_reference(name, device, n, C, dtype):
    check(name, device, n, C, dtype)


@problems(((3, 72, "bfloat16"),), tuple((n, C, "bfloat16") for n in (1, 2, 4, 8) for C in (77, 1280)))
@pytest.mark.parametrize("name", ["project_parts"])
def test_tf32_parts_of_bfloat16_streams(name, device, n, C, dtype):
    kernel = KERNELS[name]
    cfg = {**kernel.default(kernel.problem(n, C, dtype)), "mma": "tf32"}
    check(name, device, n, C, dtype, cfg=cfg)


KNOBS = ("block_T", "block_K", "splits", "threads", "stages", "mma", "overlap")
#: Tokens and channels of a block, splits, threads, stages: one and several warpgroups, tiles and splits that K does not fill, few tiles.
OVERLAPPED = {1: (64, 32, 1, 128, 2), 3: (64, 64, 4, 128, 4), 4: (128, 128, 2, 256, 3), 8: (256, 64, 4, 512, 3)}


@problems(
    ((1, 72, "bfloat16"), (3, 200, "bfloat16"), (4, 1280, "bfloat16"), (8, 520, "bfloat16")),
    tuple((n, 1280, "bfloat16") for n in OVERLAPPED),
)
@pytest.mark.parametrize("name", ["project_parts"])
def test_sums_and_phi_under_the_product(name, device, n, C, dtype):
    cfg = dict(zip(("block_T", "block_K", "splits", "threads", "stages"), OVERLAPPED[n], strict=True))
    check(name, device, n, C, dtype, cfg={**cfg, "mma": "bf16", "overlap": 1})


@pytest.mark.parametrize("n", range(1, MAX_N + 1))
def test_every_thread_loads_as_much_of_phi(n):
    kernel = KERNELS["project_parts"]
    p = kernel.problem(n, 1280)
    space = kernel.space(p)
    for cfg in (dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())):
        if cfg["overlap"] and kernel.invalid(p, cfg) is None:
            rows, wide = pieces(p, cfg["block_K"], cfg["threads"])
            assert p.M <= rows <= padded(p.M, 16)
            assert rows * cfg["block_K"] % (wide * cfg["threads"]) == 0


@pytest.mark.parametrize(
    ("n", "dtype", "cfg"),
    [
        (1, "bfloat16", (256, 32, 2, 256, 1, "bf16", 0)),  # z needs more than the tiles before it
        (8, "bfloat16", (64, 128, 2, 256, 3, "bf16", 0)),  # and would not fit beside these
        (4, "float32", (64, 64, 2, 128, 2, "tf32", 0)),
        (8, "bfloat16", (256, 64, 4, 512, 4, "bf16", 1)),
    ],
)
def test_shared_memory_is_known_exactly(n, dtype, cfg):
    kernel, cfg = KERNELS["project_parts"], dict(zip(KNOBS, cfg, strict=True))
    p = kernel.problem(n, 2560, dtype)
    assert kernel.invalid(p, cfg) is None
    assert shared_bytes(p, cfg) == lowered_shared_bytes(kernel, kernel.build(p, cfg), cfg, "sm_90a")


@pytest.mark.parametrize(("n", "cfg"), list(OVERLAPPED.items()))
def test_one_barrier_a_tile(n, cfg):
    kernel = KERNELS["project_parts"]
    cfg = {**dict(zip(("block_T", "block_K", "splits", "threads", "stages"), cfg, strict=True)), "mma": "bf16", "overlap": 1}
    source = lowered(kernel, kernel.build(kernel.problem(n, 1280), cfg), cfg, "sm_90a").kernel_source
    loop, after = source.split("for (int k = 0;")[1].split("AllReduce")[:2]
    assert loop.count("__syncthreads();") == 1
    # copies of this tile have arrived and are seen by the product; the next ones overwrite what all have read
    order = ["cp_async_wait", "fence_proxy_async", "__syncthreads", "wgmma_ss", "cp_async_gs", "wait_wgmma"]
    assert [loop.index(step) for step in order] == sorted(loop.index(step) for step in order)
    assert "buf_dyn_shmem" not in after
