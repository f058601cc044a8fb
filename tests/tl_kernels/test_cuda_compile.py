"""Every program compiles for CUDA, those with matrix products, whose instructions differ, for every supported architecture, from the one
source; nvcc needs no GPU.
"""

import itertools
import re
import shutil

import numpy as np
import pytest

from tl_kernels import KERNELS, NAMES, WHOLE
from tl_kernels.launch import compile_kernel
from tl_kernels.spec import SHARED_LIMIT
from tl_kernels.whole import SPACE, registers_of
from tuner.compile_job import lowered, lowered_shared_bytes
from tuner.fingerprint import fingerprint

nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120a")


#: What runs where: a kernel says which instructions it asks for.
PAIRS = [(name, arch) for arch in ARCHS for name in NAMES if KERNELS[name].unserved_on(KERNELS[name].problem(4, 2560), arch) is None]
# the source for sm_120a is that for sm_100a: one of them, with TMA, shows that nvcc takes it
PAIRS = [(name, arch) for name, arch in PAIRS if name == "project_bwd" or arch != "sm_120a"]
#: Those with matrix products. A program takes a core about 12 seconds, so the others are compiled for the first that serves them alone.
PRODUCTS = ("project", "project_bwd", "project_parts", "post_res_project", "streams_grad", "pre_streams_grad", *WHOLE)
PAIRS = [(name, arch) for i, (name, arch) in enumerate(PAIRS) if name in PRODUCTS or name not in {known for known, _ in PAIRS[:i]}]


def compile_default(name, arch):
    """The CUDA source of a kernel's default configuration. Half the streams are half the unrolled code: four where programs are tuned."""
    kernel = KERNELS[name]
    p = kernel.problem(4 if arch == "sm_90a" and name != "pre_streams_grad" else 2, 2560)
    return compile_kernel(kernel, p, kernel.default(p), arch).get_kernel_source()


@nvcc
@pytest.mark.parametrize(("name", "arch"), PAIRS)
def test_default_compiles(name, arch):
    assert f"{name}_kernel" in compile_default(name, arch)


@nvcc
@pytest.mark.parametrize(("name", "dtype"), [("project", "float16"), ("project_bwd", "float32")])
def test_tf32_path_compiles(name, dtype):
    kernel = KERNELS[name]
    p = kernel.problem(3, 100, dtype)
    assert f"{name}_kernel" in compile_kernel(kernel, p, kernel.default(p), "sm_90a").get_kernel_source()


@nvcc
@pytest.mark.parametrize(("block_T", "roles"), [(16, 3), (16, 4), (32, 4)])
def test_the_product_reads_phi_from_registers(block_T, roles):
    kernel = KERNELS["project_pre"]
    p = kernel.problem(4, 2560)
    fits = (s for s in kernel.seeds if kernel.invalid(p, s) is None)
    seed = next(s for s in fits if (s["threads"], s["block_T"], s["roles"]) == (256, block_T, roles))
    source = compile_kernel(kernel, p, dict(seed), "sm_90a").get_kernel_source()
    assert "wgmma_rs" in source
    for count, more in registers_of(p, seed).values():
        assert source.count(f"warpgroup_reg_{'alloc' if more else 'dealloc'}<{count}>") == 1
    found = fingerprint(kernel, p, dict(seed), "sm_90a")
    assert found.mma_waits == 1, "with too few registers nvcc makes every wgmma wait for the one before (C7512)"
    assert found.stack == 0, "registers that spill while phi is loaded cost 20 us"


def test_reads_of_phi_stay_within_it_where_a_slice_sticks_out():
    """Under a condition TileLang drops a T.min that the condition makes needless, and loads before the condition."""
    kernel = KERNELS["project_pre"]
    p = kernel.problem(4, 2568)
    cfg = kernel.default(p)
    source = lowered(kernel, kernel.build(p, cfg), cfg, "sm_90a").kernel_source
    loads = [line for line in source.splitlines() if "(phi + " in line or " phi[" in line]
    assert loads
    assert all("min(" in line for line in loads)


@nvcc
def test_words_of_the_peers_are_read_at_fixed_offsets_of_one_address():
    """A condition at each load, or the row within the address, makes nvcc compute every address anew, and wait: 4000 cycles a tile."""
    kernel = KERNELS["project_pre"]
    p = kernel.problem(4, 2560)
    cfg = next(dict(s) for s in kernel.seeds if s["levels"] == 1 and kernel.invalid(p, s) is None)
    source = compile_kernel(kernel, p, cfg, "sm_90a").get_kernel_source()
    loads = [line for line in source.splitlines() if "= AtomicLoad(" in line]
    assert loads
    assert all("at[" in line and "if" not in line for line in loads)


def places_of_threads(source, place, threads):
    """Of every copy into the streams' tiles and every read of 16 bytes from them: the elements [threads, ...] of a tile, in order."""
    around, found = [], []
    for line in source.splitlines():
        loop = re.match(r"\s*for \(int (\w+) = 0; \1 < (\d+);", line)
        at = re.search(r"cp_async_gs\w*<16>\(\(&\(\(\(bfloat16_t\*\)x_s\)\[(.*?)\]\)\), \(&", line)
        at = at or re.search(r"\(\w+ \+ .*?\) = \*\(uint4\*\)\(\(\(bfloat16_t\*\)x_s\) \+ \((.*)\)\);", line)
        if at:
            inner = [loop for loop in around if loop]
            expression = at[1].replace("((int)threadIdx.x)", "tx").replace("/", "//")
            rest = dict.fromkeys(re.findall(r"\bi(?:_\d+)?\b", expression), 10)  # the tile: any
            elements = [
                eval(expression, {"tx": np.arange(threads), **rest, **dict(zip([name for name, _ in inner], values, strict=True))})
                for values in itertools.product(*(range(extent) for _, extent in inner))
            ]
            found.append(np.stack([np.unique(row) for row in np.stack(elements, 1) % place]))
        around += [(loop[1], int(loop[2])) if loop else None] * line.count("{")
        del around[len(around) - line.count("}") :]
    return found


@pytest.mark.parametrize(
    ("name", "cfg"),
    [("project_pre", (32, 128, 6, 256, 1, 2, 1, 0, 4, 3, 3)), ("post_res_project_pre", (16, 128, 6, 128, 3, 1, 1, 0, 4, 3, 3))],
)
def test_a_thread_copies_what_it_reads(name, cfg):
    """Between a tile's last use, the copy of the next one into its place and the first use of that there is no barrier."""
    kernel, cfg = KERNELS[name], dict(zip(SPACE, cfg, strict=True))
    p = kernel.problem(4, 2560)
    place, threads = cfg["block_T"] * 4 * cfg["block_C"], cfg["threads"]
    first, *others = places_of_threads(lowered(kernel, kernel.build(p, cfg), cfg, "sm_90a").kernel_source, place, threads)
    assert len(others) == 3, "copies before the loop and in it, reads for u and for the work"
    assert len(np.unique(first)) * 8 == place
    for other in others:
        assert np.array_equal(first, other)


@pytest.mark.parametrize("name", [name for name in NAMES if not KERNELS[name].shortcut])
def test_default_fits_the_smallest_shared_memory(name):
    kernel = KERNELS[name]
    p = kernel.problem(8, 7168, "float32")
    cfg = kernel.default(p)
    assert lowered_shared_bytes(kernel, kernel.build(p, cfg), cfg, "sm_90a") <= min(SHARED_LIMIT.values()) * 1024
