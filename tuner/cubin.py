"""Registers, stack, shared memory and threads of a compiled CUDA kernel, read from its ELF image, and the occupancy they allow.

No CUDA tool is needed: a cubin is an ELF file whose ``.nv.info`` sections hold (format, attribute, value) records. Attribute numbers are
those that ``cuobjdump -elf`` prints by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"\x7fELF"
_MACHINE_CUDA = 190
_HEADER, _SECTION, _SYMBOL = struct.Struct("<16xHHIQQQIHHHHHH"), struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
#: .nv.info records: a payload follows where the format is this one.
_SIZED = 4
_FRAME_SIZE, _REGISTERS = 0x11, 0x2F  # payload: symbol, value
_MAX_THREADS, _REQUIRED_THREADS = 0x05, 0x10  # payload: x, y, z; in the kernel's own section
#: Shared memory the driver keeps for itself in every block, from sm_80 on; part of .nv.shared in the image from sm_90 on.
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Resources:
    """One kernel. ``stack`` in bytes a thread: spilled registers and local arrays. ``static_shared`` in bytes a block, without the driver's
    kilobyte. ``threads``: the largest block it was compiled for, None where it does not say.
    """

    name: str
    registers: int
    stack: int
    static_shared: int
    threads: int | None


@dataclass(frozen=True)
class _Section:
    name: str
    offset: int
    size: int
    link: int


def _text(image: bytes, at: int) -> str:
    return image[at : image.index(b"\0", at)].decode()


def _sections(image: bytes) -> list[_Section]:
    _, machine, _, _, _, table, _, _, _, _, size, count, names = _HEADER.unpack_from(image)
    if image[:4] != _MAGIC or machine != _MACHINE_CUDA:
        raise ValueError("not a CUDA ELF image")
    raw = [_SECTION.unpack_from(image, table + k * size) for k in range(count)]
    strings = raw[names][4]
    return [_Section(_text(image, strings + r[0]), r[4], r[5], r[6]) for r in raw]


def _records(image: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    at, end = section.offset, section.offset + section.size
    while at + 4 <= end:
        form, attribute, value = struct.unpack_from("<BBH", image, at)
        at += 4
        payload = image[at : at + value] if form == _SIZED else b""
        at += len(payload)
        yield attribute, payload


def read_cubin(image: bytes) -> list[Resources]:
    """The kernels of one image. Raises ValueError for something else."""
    try:
        sections = _sections(image)
        by_name = {s.name: s for s in sections}
        symbols = by_name[".symtab"]
        strings = sections[symbols.link].offset
        names = [_text(image, strings + raw[0]) for raw in _SYMBOL.iter_unpack(image[symbols.offset : symbols.offset + symbols.size])]
        values: dict[int, dict[str, int]] = {_FRAME_SIZE: {}, _REGISTERS: {}}
        for attribute, payload in _records(image, by_name[".nv.info"]):
            if attribute in values and len(payload) == 8:
                symbol, value = struct.unpack("<II", payload)
                values[attribute][names[symbol]] = value
        found = []
        for section in sections:
            if not section.name.startswith(".text."):
                continue
            name = section.name.removeprefix(".text.")
            threads = None
            info = by_name.get(f".nv.info.{name}")
            for attribute, payload in _records(image, info) if info else ():
                if attribute in (_MAX_THREADS, _REQUIRED_THREADS) and len(payload) == 12:
                    x, y, z = struct.unpack("<III", payload)
                    threads = x * y * z
            shared = by_name.get(f".nv.shared.{name}")
            static = max(0, shared.size - RESERVED_SHARED) if shared else 0
            found.append(Resources(name, values[_REGISTERS].get(name, 0), values[_FRAME_SIZE].get(name, 0), static, threads))
    except (struct.error, KeyError, IndexError) as e:
        raise ValueError(f"a damaged CUDA image: {e}") from None
    return found


def find_kernels(file: bytes) -> list[Resources]:
    """The kernels of every CUDA image inside ``file``, e.g. the shared library that TileLang keeps of a compiled program."""
    return [found for image in cuda_images(file) for found in read_cubin(image)]


def cuda_images(file: bytes) -> list[bytes]:
    """The CUDA ELF images inside ``file``, each to the end of the file: its header says where it ends."""
    starts = [m.start() for m in re.finditer(re.escape(_MAGIC), file)]
    return [file[at:] for at in starts if len(file) >= at + 20 and struct.unpack_from("<H", file, at + 18)[0] == _MACHINE_CUDA]


@dataclass(frozen=True)
class _Limits:
    """Of one multiprocessor: threads, blocks, KiB of shared memory (CUDA C++ Programming Guide, technical specifications)."""

    threads: int
    blocks: int
    shared_kib: int


_LIMITS = {
    80: _Limits(2048, 32, 164),
    86: _Limits(1536, 16, 100),
    87: _Limits(1536, 16, 164),
    89: _Limits(1536, 24, 100),
    90: _Limits(2048, 32, 228),
    100: _Limits(2048, 32, 228),
    103: _Limits(2048, 32, 228),
    120: _Limits(1536, 24, 100),
}
_REGISTERS_PER_SM, _REGISTER_UNIT, _SHARED_UNIT, _WARP = 65536, 256, 128, 32


def blocks_per_sm(arch: str, registers: int, threads: int, shared: int) -> int | None:
    """Blocks that fit on one multiprocessor at once; None for an unknown architecture.

    ``registers`` a thread (given out in units of 256 a warp), ``shared`` bytes a block, dynamic and static.
    """
    digits = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    limits = _LIMITS.get(int(digits[1])) if digits else None
    if limits is None or threads < 1:
        return None
    warps = -(-threads // _WARP)
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS_PER_SM // (per_warp * warps) if registers else limits.blocks
    block_shared = -(-(shared + RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    return min(limits.blocks, limits.threads // (warps * _WARP), by_registers, limits.shared_kib * 1024 // block_shared)


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float | None:
    """Share of a multiprocessor's warps that are resident: blocks times their warps over the most there can be."""
    blocks = blocks_per_sm(arch, registers, threads, shared)
    if blocks is None:
        return None
    digits = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    assert digits is not None
    return blocks * -(-threads // _WARP) * _WARP / _LIMITS[int(digits[1])].threads
