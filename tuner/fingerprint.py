"""What the compiler made of a program, in the numbers that decide its speed; and the committed file of them, beside the profile.

``configs/h100.fingerprints.json`` holds one for every distinct program of ``configs/h100.yaml``, a line each, so that a change reads well
in a pull request. Written by ``mhc-tune check --static --gpu h100 --update``.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mhc.schema import Strict
from tl_kernels.spec import Config, Kernel, Problem
from tuner.compile_job import cached_shared_bytes, lowered_shared_bytes, refuse
from tuner.cubin import cuda_images, read_cubin
from tuner.errors import TuneError
from tuner.modelfile import read_model, write_model
from tuner.sass import BULK, instruction_mix

Count = Annotated[int, Field(ge=0)]
Width = Annotated[str, Field(pattern=rf"^(1|2|4|8|16|32|{BULK})$")]
Widths = dict[Width, Count]


class Fingerprint(Strict):
    """One compiled program. Instructions are counted in its text, see :class:`tuner.sass.Mix`; ``Widths``: bytes -> instructions."""

    registers: Annotated[Count, Field(description="a thread")]
    stack: Annotated[Count, Field(description="bytes a thread: spilled registers and local arrays")]
    shared: Annotated[Count, Field(description="bytes a block, static and dynamic")]
    threads: Annotated[Count, Field(description="a block")]
    code: Annotated[Count, Field(description="bytes")]
    loads: Widths
    stores: Widths
    copies: Annotated[Widths, Field(description="from global into shared memory")]
    shared_loads: Widths
    shared_stores: Widths
    local_loads: Count
    local_stores: Count
    atomics: Count
    barriers: Count
    mma: Annotated[dict[str, Count], Field(description="by opcode with shape and types")]
    mma_waits: Annotated[Count, Field(description="waits for wgmma")]
    nvcc: Annotated[str, Field(description="release that made the machine code, as the image says")]
    tilelang: str


class Fingerprints(Strict):
    """A file of them, by :func:`tuner.bench_compile.describe`."""

    schema_version: Literal[1] = 1
    arch: Annotated[str, Field(pattern=r"^sm_\d+[a-z]?$")]
    programs: dict[str, Fingerprint]


def fingerprint(kernel: Kernel, p: Problem, cfg: Config, arch: str) -> Fingerprint:
    """Compile a configuration, or take it from TileLang's disk cache, and look at the image.

    Raises what TileLang and nvcc raise, and RuntimeError for a program that could not launch.
    """
    import tilelang

    from tl_kernels.launch import compile_kernel

    folder = getattr(compile_kernel(kernel, p, cfg, arch), "_tilelang_cache_path", None)
    if folder is None:
        raise RuntimeError("TileLang's disk cache is switched off (TILELANG_DISABLE_CACHE); the image is read from it")
    images = cuda_images((Path(folder) / "executable.so").read_bytes())
    resources = [r for image in images for r in read_cubin(image)]
    if len(images) != 1 or len(resources) != 1:
        raise RuntimeError(f"{len(images)} images of {len(resources)} kernels, wanted one image of one kernel")
    (image,), (found,) = images, resources
    dynamic = cached_shared_bytes(Path(folder))
    if dynamic is None:
        dynamic = lowered_shared_bytes(kernel, kernel.build(p, cfg), cfg, arch)
    shared, threads = dynamic + found.static_shared, found.threads or 0
    refused = refuse(arch, shared, threads, found.registers, None)
    if refused is not None:
        raise RuntimeError(refused[1])
    release = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", image)
    return Fingerprint(
        registers=found.registers,
        stack=found.stack,
        shared=shared,
        threads=threads,
        **asdict(instruction_mix(image)),
        nvcc=release[1].decode() if release else "unknown",
        tilelang=tilelang.__version__,
    )


def fingerprint_job(name: str, p: Problem, cfg: Config, arch: str) -> dict[str, Any]:
    """In a worker: ``seconds`` it took and the fields of :func:`fingerprint`."""
    from tl_kernels import KERNELS

    start = time.perf_counter()
    found = fingerprint(KERNELS[name], p, cfg, arch).model_dump()
    return {"seconds": time.perf_counter() - start, **found}


def fingerprints_path(profile: Path) -> Path:
    """``configs/h100.yaml`` -> ``configs/h100.fingerprints.json``."""
    return profile.with_suffix(".fingerprints.json")


def read_fingerprints(path: Path, writer: str = "mhc-tune check --static --gpu h100 --update") -> Fingerprints:
    """``writer``: the command that writes them. Raises :class:`TuneError` on one line that names the file and the field."""
    found = read_model(Fingerprints, path, f"--fingerprints {path}", writer)
    if found is None:
        raise TuneError(f"--fingerprints {path}: no fingerprints to compare with; write them: {writer}")
    return found


def write_fingerprints(path: Path, fingerprints: Fingerprints) -> None:
    """One program a line, sorted. Raises :class:`TuneError`."""
    write_model(path, f"--fingerprints {path}", fingerprints, "programs")
