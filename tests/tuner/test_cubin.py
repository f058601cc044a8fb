"""tuner/cubin.py: resources from a real image and from one made by hand, and occupancy by the published limits."""

from __future__ import annotations

import shutil
import struct
from types import SimpleNamespace

import pytest

from tl_kernels import KERNELS
from tl_kernels.launch import compile_kernel
from tuner import bench_kernels
from tuner.bench_kernels import image_resources, resources
from tuner.compile_job import lowered_shared_bytes
from tuner.cubin import Resources, blocks_per_sm, find_kernels, occupancy, read_cubin


def image(registers: int = 40, stack: int = 16, shared: int = 1024 + 512, threads: tuple[int, int, int] = (64, 2, 1)) -> bytes:
    """A CUDA ELF image with one kernel ``k`` and nothing else in it."""
    names = ["", ".shstrtab", ".strtab", ".symtab", ".nv.info", ".nv.info.k", ".nv.shared.k", ".text.k"]
    shstr = b"\0" + b"".join(n.encode() + b"\0" for n in names[1:])
    bodies = {
        ".shstrtab": shstr,
        ".strtab": b"\0k\0",
        ".symtab": bytes(24) + struct.pack("<IBBHQQ", 1, 0, 0, 7, 0, 0),
        ".nv.info": struct.pack("<BBHII", 4, 0x2F, 8, 1, registers) + struct.pack("<BBHII", 4, 0x11, 8, 1, stack),
        # a record without payload before the one that counts
        ".nv.info.k": struct.pack("<BBH", 3, 0x50, 7) + struct.pack("<BBHIII", 4, 0x05, 12, *threads),
        ".nv.shared.k": b"",
        ".text.k": bytes(128),
    }
    data, sections = bytearray(64), [bytes(64)]
    for name in names[1:]:
        size = shared if name == ".nv.shared.k" else len(bodies[name])  # takes no room in the file
        link = names.index(".strtab") if name == ".symtab" else 0
        sections.append(struct.pack("<IIQQQQIIQQ", shstr.index(name.encode() + b"\0"), 1, 0, 0, len(data), size, link, 0, 1, 0))
        data += bodies[name]
    table = len(data)
    head = struct.pack("<16xHHIQQQIHHHHHH", 2, 190, 1, 0, 0, table, 0, 64, 0, 0, 64, len(sections), 1)
    data[:64] = b"\x7fELF" + head[4:]
    return bytes(data) + b"".join(sections)


def test_an_image_made_by_hand():
    assert read_cubin(image()) == [Resources("k", registers=40, stack=16, static_shared=512, threads=128)]


def test_images_are_found_inside_a_library():
    host = b"\x7fELF" + bytes(14) + struct.pack("<H", 62) + bytes(100)
    (found,) = find_kernels(host + image(registers=77))
    assert found.registers == 77
    assert find_kernels(host) == []


@pytest.mark.parametrize("broken", [b"", b"not an image" * 20, image()[:200], image().replace(b".nv.info\0", b".no.info\0", 1)])
def test_damaged_images_are_refused(broken):
    with pytest.raises(ValueError, match="CUDA"):
        read_cubin(broken)


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        ("sm_90a", 32, 256, 0, 8),  # 2048 threads
        ("sm_90a", 255, 256, 0, 1),  # 65536 registers
        ("sm_90a", 168, 384, 0, 1),  # the same, 12 warps
        ("sm_90a", 33, 1024, 0, 1),  # 33 registers are given out as 40
        ("sm_90a", 32, 32, 0, 32),  # 32 blocks
        ("sm_90a", 32, 128, 113 * 1024, 2),  # 228 KiB, one kept by the driver in each block
        ("sm_90a", 32, 128, 114 * 1024, 1),
        ("sm_80", 32, 128, 81 * 1024, 2),
        ("sm_89", 32, 1024, 0, 1),  # 1536 threads
        ("sm_50", 32, 128, 0, None),
        ("cpu", 32, 128, 0, None),
    ],
)
def test_blocks_that_fit(arch, registers, threads, shared, blocks):
    assert blocks_per_sm(arch, registers, threads, shared) == blocks


def test_occupancy_is_resident_warps_over_all():
    assert occupancy("sm_90a", 94, 128, 20480) == 5 * 4 / 64
    assert occupancy("sm_50", 32, 128, 0) is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_compiled_kernel():
    kernel = KERNELS["pre"]
    p = kernel.problem(4, 2560)
    found = resources(kernel, p, kernel.default(p), "sm_90a")
    assert 16 <= found["registers"] <= 255
    assert found["stack"] == 0
    assert found["threads"] == kernel.default(p)["threads"]
    assert found["blocks_per_sm"] >= 1
    assert 0 < found["occupancy"] <= 1
    assert found["shared"] >= 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_program_of_the_cache_is_not_lowered_once_more_for_its_shared_memory(monkeypatch):
    kernel = KERNELS["coefficients"]
    p = kernel.problem(2, 64)
    program = kernel, p, kernel.default(p), "sm_90a"
    jit = compile_kernel(*program)
    lowered = lowered_shared_bytes(kernel, kernel.build(*program[1:3]), *program[2:])
    monkeypatch.setattr(bench_kernels, "lowered_shared_bytes", lambda *args: pytest.fail("lowered"))
    found = image_resources(SimpleNamespace(_tilelang_cache_path=jit._tilelang_cache_path), *program)
    assert found["shared"] >= lowered
    monkeypatch.setattr(bench_kernels, "cached_shared_bytes", lambda folder: None)
    monkeypatch.setattr(bench_kernels, "lowered_shared_bytes", lambda *args: lowered)
    assert image_resources(jit, *program) == found
