"""``mhc-tune compile``: every program of a profile, compiled without its GPU into a folder that ``mhc`` loads (mhc/bundle.py)."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mhc.yamlfile import printable
from tl_kernels.child_python import cores
from tuner.compile_each import compile_each
from tuner.display import make_console
from tuner.errors import INTERRUPTED, TuneError, writing
from tuner.hardware import Hardware, find_compiler
from tuner.plan import pick_kernels, split_names
from tuner.run import term_is_interrupt
from tuner.selection import find_profile, load
from tuner.workers import WorkerError

#: Exit code where some programs, or all, could not be compiled.
INCOMPLETE = 1
#: Seconds for one program: a bundle is built where nobody waits, maybe on a busy machine.
COMPILE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class CompileRequest:
    """The command line as typed; None means the default."""

    gpu: str | None
    output: Path
    profile: str | None
    kernels: str | None
    jobs: int | None
    command: str


@dataclass(frozen=True)
class _Wanted:
    """One distinct program: ``p`` and ``config`` of the first entry that asks for it."""

    kernel: str
    p: Any
    config: dict[str, Any]
    source_hash: str
    key: tuple[Any, ...]

    @property
    def label(self) -> str:
        return f"{self.kernel} n={self.p.n} C={'any' if self.key[2] is None else self.p.C} {self.p.dtype} {self.config}"


def library_job(name: str, p: Any, cfg: dict[str, Any], target: str) -> tuple[bytes, list[tuple[int, int]]]:
    """Compile one program: its shared library (host code and, on CUDA, the cubin), and for the CPU target which dimension of which tensor
    gives each size it takes. Raises what TileLang and the compiler raise.
    """
    from tl_kernels import KERNELS
    from tl_kernels.launch import compile_kernel

    jit = compile_kernel(KERNELS[name], p, cfg, target)
    folder = getattr(jit, "_tilelang_cache_path", None)
    if folder is None:
        what = "its blocks wait for each other" if hasattr(jit, "grid") else "TileLang's cache is switched off (TILELANG_DISABLE_CACHE)"
        raise RuntimeError(f"no library to ship: {what}")
    if target != "cpu":
        return (Path(folder) / "executable.so").read_bytes(), []
    sizes = list(jit.adapter.dynamic_symbolic_map.values())
    if any(kind != 0 for kind, *_ in sizes):
        raise RuntimeError("its library takes a stride, wanted sizes only")
    return (Path(folder) / "kernel_lib.so").read_bytes(), [(int(tensor), int(dimension)) for _, tensor, dimension, _ in sizes]


def compile_bundle(request: CompileRequest) -> int:
    """Write the bundle; returns the exit code. Raises :class:`TuneError` for what the user can mend."""
    names = pick_kernels(split_names(request.kernels))
    if request.gpu is None and request.profile is None:
        raise TuneError("--gpu is missing, wanted a GPU's profile name (h100, ...), cpu, or --profile with a path")
    source, path = find_profile("auto" if request.gpu is None else request.gpu, request.profile, cpu=True)
    profile = load(path, "" if request.profile is None else f"--profile {source}")
    where = profile.provenance
    compiler = find_compiler(Hardware(profile=source, name=where.gpu, arch=where.arch))
    _check_output(request.output)
    console = make_console()
    programs, notes = _programs(profile, names, source)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    if not programs:
        of = f" of {', '.join(names)}" if request.kernels else ""
        raise TuneError(f"{source}: nothing to compile{of}, wanted entries that TileLang serves; mhc-tune --gpu {source} makes entries")
    jobs = min(request.jobs or cores(), len(programs))
    console.print(
        f"mhc-tune compile: {len(programs)} programs of {source} for {where.gpu} ({where.arch}) into {request.output}, compile processes:"
        f" {jobs}",
        markup=False,
        soft_wrap=True,
    )
    start = time.monotonic()
    try:
        with term_is_interrupt(), writing(f"--output {request.output}"), _new_folder(request.output) as folder:
            # distinct programs have distinct labels: what else their keys hold follows from n and C
            args = {w.label: (w.kernel, w.p, w.config, where.arch) for w in programs}
            found = compile_each(library_job, args, jobs, console, timeout=COMPILE_TIMEOUT_S)
            failed = [(w, str(found[w.label])) for w in programs if isinstance(found[w.label], WorkerError)]
            built = [_keep(w, found[w.label], folder) for w in programs if not isinstance(found[w.label], WorkerError)]
            if built:
                _write_manifest(folder, built, profile, source, compiler, request)
                _publish(folder, request.output)
    except KeyboardInterrupt:
        print(f"mhc-tune: interrupted; {request.output} is as it was", file=sys.stderr)
        return INTERRUPTED
    for wanted, reason in failed:
        print(f"mhc-tune: not compiled: {wanted.label}: {printable(reason)}", file=sys.stderr)
    if not built:
        print(f"mhc-tune: nothing was compiled; {request.output} is as it was", file=sys.stderr)
        return INCOMPLETE
    size, seconds = sum(program["bytes"] for program in built) / (1 << 20), time.monotonic() - start
    console.print(
        f"done: {len(built)} of {len(programs)} programs compiled, {size:.1f} MiB in {seconds:.0f} s; to use them:"
        f" MHC_BUNDLE={request.output}, or mhc.load_bundle({str(request.output)!r})",
        markup=False,
        soft_wrap=True,
    )
    return INCOMPLETE if failed else 0


def _programs(profile: Any, names: Sequence[str], source: str) -> tuple[list[_Wanted], list[str]]:
    """What ``import mhc`` runs at the shapes of the profile's entries, each program once; and what is worth saying about it."""
    from mhc.bundle import program_key
    from mhc.profile import choose_from
    from tl_kernels import KERNELS

    found: dict[tuple[Any, ...], _Wanted] = {}
    stale: set[str] = set()
    reference = 0
    for entry in profile.entries:
        if entry.kernel not in names:
            continue
        kernel = KERNELS[entry.kernel]
        p = kernel.problem(entry.n, entry.C, entry.dtype)
        if kernel.unserved_on(p, profile.provenance.arch):
            continue
        if entry.source_hash != kernel.source_hash:
            stale.add(entry.kernel)
        choice, _ = choose_from(profile, entry.kernel, p, entry.tokens)
        if choice.impl == "reference":
            reference += 1
            continue
        key = program_key(kernel, p, choice.config)
        found.setdefault(key, _Wanted(entry.kernel, p, dict(choice.config), kernel.source_hash, key))
    notes = []
    if stale:
        listed = ", ".join(sorted(stale))
        notes.append(f"{listed}: entries of {source} were tuned for another version of the kernel; compiled is what runs without them")
    if reference:
        notes.append(f"{reference} entries of {source} are served by PyTorch: nothing to compile")
    return list(found.values()), notes


def _keep(wanted: _Wanted, compiled: tuple[bytes, list[tuple[int, int]]], folder: Path) -> dict[str, Any]:
    """Write what :func:`library_job` gave and give its place in the manifest."""
    library, dynamic = compiled
    digest = hashlib.sha256(library).hexdigest()
    # by content: a manifest never finds the library of an older bundle under the name of its own
    name = f"{wanted.kernel}-{digest[:16]}.so"
    with open(folder / name, "wb") as stream:
        stream.write(library)
        stream.flush()
        os.fsync(stream.fileno())
    kernel, n, C, dtype, options, _ = wanted.key
    return {
        "kernel": kernel,
        "n": n,
        "C": C,
        "dtype": dtype,
        "options": dict(options),
        "config": wanted.config,
        "source_hash": wanted.source_hash,
        "file": name,
        "sha256": digest,
        "bytes": len(library),
        "dynamic": dynamic,
    }


def _write_manifest(
    folder: Path, programs: list[dict[str, Any]], profile: Any, source: str, compiler: str, request: CompileRequest
) -> None:
    from mhc.bundle import MANIFEST, SCHEMA_VERSION, Manifest, here
    from mhc.files import replace_file

    manifest = Manifest.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "arch": profile.provenance.arch,
            "platform": here(),
            "profile": source,
            "gpu": profile.provenance.gpu,
            "toolchain": toolchain(compiler),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": request.command,
            "programs": programs,
        }
    )
    replace_file(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def toolchain(compiler: str) -> dict[str, str]:
    """Releases of all that had a hand in the libraries; ``compiler``: path of nvcc or g++."""
    import torch
    import tvm_ffi

    from mhc.bundle import tilelang_release

    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        raise TuneError(f"{compiler} --version: {e}, wanted its release") from None
    release = re.search(r"\bV(\d+[\d.]*)", said) or re.search(r"(\d+\.\d+[\d.]*)\s*$", said.splitlines()[0])
    return {
        "tilelang": tilelang_release(),
        "tvm_ffi": tvm_ffi.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        Path(compiler).name: release[1] if release else said.splitlines()[0],
    }


def _check_output(output: Path) -> None:
    """Refuse to replace what is no bundle, and the folder that this process is in, which would have no name any more."""
    from mhc.bundle import MANIFEST

    if Path.cwd().is_relative_to(output.resolve()):
        raise TuneError(f"--output {output}: is, or holds, the current folder, wanted a new folder, or a bundle to replace")
    if not output.is_dir():
        if output.exists() or output.is_symlink():
            raise TuneError(f"--output {output}: is no folder, wanted a new one, or a bundle to replace")
    elif output.is_symlink():
        raise TuneError(f"--output {output}: is a link, wanted a new folder, or a bundle to replace")
    elif not (output / MANIFEST).is_file() and any(output.iterdir()):
        raise TuneError(f"--output {output}: holds something that is no bundle, wanted a new folder, or a bundle to replace")


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output``, gone at the end unless it was published."""
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{output.absolute().name}.", suffix=".tmp"))
    try:
        folder.chmod(0o755)  # mkdtemp makes it private
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, output: Path) -> None:
    """Give ``folder`` its name; a bundle that had it goes. Who has loaded libraries of that one keeps them."""
    if not output.exists():
        os.rename(folder, output)
    elif not _exchange(folder, output):
        old = folder.with_suffix(".old")
        os.rename(output, old)
        try:
            os.rename(folder, output)
        except BaseException:
            os.rename(old, output)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names, so that there is always one under each; False where this system or its file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
