"""What a compiled program asks of memory and of the matrix units, counted in its machine code.

In machine code and not in PTX, because ptxas decides what spills and which accesses become one: spills stand nowhere in PTX. NVIDIA's
nvdisasm reads it, a 5 MB wheel that needs no CUDA toolkit and knows every architecture; the encoding itself is documented nowhere.
Counts are of the program's text: an instruction in a loop counts once.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tuner.errors import TuneError

WHEEL = "nvidia-cuda-nvdisasm"
#: Seconds for one program; it takes a third of one.
DISASSEMBLE_S = 60.0
#: Bytes of an instruction, on every architecture from sm_70 on.
INSTRUCTION = 16
#: Key of accesses by the bulk copy engine (TMA), whose bytes do not stand in the instruction.
BULK = "bulk"

# `/*0b40*/  @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;`
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_MMA = re.compile(r"[A-Z]G?MMA|UTC\w*MMA")

Widths = dict[str, int]


@dataclass
class Mix:
    """Instructions in the text of a program. ``Widths``: bytes a thread moves at once (``"16"``, or ``"bulk"``) -> instructions."""

    code: int = 0  # bytes
    loads: Widths = field(default_factory=dict)  # from global memory into registers
    stores: Widths = field(default_factory=dict)
    copies: Widths = field(default_factory=dict)  # from global into shared memory
    shared_loads: Widths = field(default_factory=dict)
    shared_stores: Widths = field(default_factory=dict)
    local_loads: int = 0
    local_stores: int = 0
    atomics: int = 0
    barriers: int = 0
    #: By opcode with shape and types: ``HGMMA.64x32x16.F32.BF16`` is a wgmma, ``HMMA.16816.F32.BF16`` an mma.sync.
    mma: dict[str, int] = field(default_factory=dict)
    #: Waits for wgmma. One after each means that nvcc took them apart (C7512: too few registers), several times as slow.
    mma_waits: int = 0


_COUNTED = {
    "LDL": "local_loads",
    "STL": "local_stores",
    "BAR": "barriers",
    "SYNCS": "barriers",
    **dict.fromkeys(("RED", "REDG", "ATOM", "ATOMG", "UTMAREDG", "UBLKRED"), "atomics"),
}
_BY_WIDTH = {
    "LDG": "loads",
    "LD": "loads",
    "STG": "stores",
    "ST": "stores",
    "LDGSTS": "copies",
    "UTMALDG": "copies",
    "UTMASTG": "stores",
    "LDS": "shared_loads",
    "LDSM": "shared_loads",
    "STS": "shared_stores",
    "STSM": "shared_stores",
}


def count(text: str) -> Mix:
    """The mix of what nvdisasm printed."""
    opcodes = Counter(_OPCODE.findall(text))
    mix = Mix(code=INSTRUCTION * sum(opcodes.values()))
    for opcode, times in sorted(opcodes.items()):
        head, *rest = opcode.split(".")
        where = _BY_WIDTH.get(head)
        if head == "UBLKCP":  # .S.G: to shared from global memory
            where = "copies" if rest[:1] == ["S"] else "stores"
        if head == "WARPGROUP" and rest[:1] == ["DEPBAR"]:
            mix.mma_waits += times
        elif head in _COUNTED:
            setattr(mix, _COUNTED[head], getattr(mix, _COUNTED[head]) + times)
        elif where is not None:
            widths = getattr(mix, where)
            width = _width(head, rest)
            widths[width] = widths.get(width, 0) + times
        elif _MMA.fullmatch(head):
            mix.mma[opcode] = times
    return mix


def _width(head: str, modifiers: list[str]) -> str:
    if head.startswith("U"):
        return BULK
    if head.endswith("SM"):  # LDSM.16.M88.4: four 8x8 matrices of 16 bits, 16 bytes a thread
        return str({"2": 8, "4": 16}.get(modifiers[-1] if modifiers else "", 4))
    return str(next((_WIDTH[m] for m in modifiers if m in _WIDTH), 4))


def find_nvdisasm() -> str:
    """The disassembler: of the wheel, on PATH or in CUDA_HOME. Raises :class:`TuneError` where there is none."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    candidates = [str(f.locate()) for f in files if f.name in ("nvdisasm", "nvdisasm.exe")]
    candidates += [str(Path(home) / "bin" / "nvdisasm") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = next((c for c in (*candidates[:1], shutil.which("nvdisasm"), *candidates[1:]) if c and os.access(c, os.X_OK)), None)
    if found is None:
        raise TuneError(f"no nvdisasm: machine code is compared, wanted `pip install {WHEEL}` or a CUDA toolkit that has it")
    return found


def instruction_mix(image: bytes) -> Mix:
    """The mix of one CUDA ELF image. Raises RuntimeError on one line where nvdisasm cannot read it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.cubin"
        path.write_bytes(image)
        command = [find_nvdisasm(), "--print-code", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DISASSEMBLE_S, errors="replace", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return count(done.stdout)
