"""Programs that were compiled elsewhere: a folder of shared libraries and a manifest, as ``mhc-tune compile`` writes it.

:func:`load_bundle` names the folder, or the environment variable ``MHC_BUNDLE`` does when ``mhc`` is imported. A program that it holds for
this device is loaded from where it lies, and neither traced nor lowered nor compiled: no compiler is needed, TileLang is not even imported,
and any number of processes can start from one folder at once, since nobody writes. Whatever does not fit is said once, by a warning of the
logger ``mhc``, and compiled here instead:

* the whole bundle, where it is for another architecture, another platform or another release of TileLang;
* a program, where it was compiled from another version of the kernel (``source_hash``), or where it is not in the bundle;
* a file that is missing, truncated, or not what the manifest says (SHA-256, checked when it is first loaded).

The hashes find accidents, not enemies: a library runs as you, so load only bundles of people you trust.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mhc.files import read_text
from mhc.schema import Knob, Strict, Text
from mhc.yamlfile import YAMLFileError, first_complaint
from tl_kernels import deferred, launch
from tl_kernels.spec import Config, Kernel, Problem

log = logging.getLogger("mhc")

MANIFEST = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1
MAX_MANIFEST_BYTES = 16 << 20
VARIABLE = "MHC_BUNDLE"
#: What a program may call beyond TVM's runtime; TileLang's library holds it.
_NEEDS_TILELANG = (b"__tvm_tensormap_create", b"__tvm_cuda_stream_")

Run = Callable[..., Any]
Key = tuple[Any, ...]


class BundleError(YAMLFileError):
    """What is wrong with a bundle, on one line naming the file."""


class Program(Strict):
    """One program and the file that holds it. ``n``, ``C`` and ``dtype`` as in a profile."""

    kernel: Text
    n: int
    C: Annotated[int | None, Field(description="None: one program serves every C")]
    dtype: Annotated[str | None, Field(description="None: one program serves every dtype of the streams")]
    options: Annotated[dict[str, int | float | str | bool], Field(description="scalars baked into the program")]
    config: dict[str, Knob]
    source_hash: Annotated[Text, Field(description="Kernel.source_hash when this was compiled")]
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.so$", description="in the bundle's folder")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=1)]
    dynamic: list[tuple[int, int]] = Field(
        default_factory=list, description="CPU target: which dimension of which tensor gives each size that the program takes"
    )

    @property
    def key(self) -> Key:
        return (self.kernel, self.n, self.C, self.dtype, tuple(sorted(self.options.items())), tuple(sorted(self.config.items())))


class Manifest(Strict):
    """All of a bundle but the libraries."""

    schema_version: Literal[1]
    arch: Annotated[str, Field(pattern=r"^(cpu|sm_\d+[a-z]?)$", description="'cpu' or a CUDA architecture, 'sm_90a'")]
    platform: Annotated[Text, Field(description="operating system and processor the host code is for")]
    profile: Text
    gpu: Text
    toolchain: Annotated[dict[str, str], Field(description="releases of tilelang, tvm_ffi, torch, python and the compiler")]
    date: Text
    command: Text
    programs: list[Program]


class _UnfitError(Exception):
    """Why a file of a bundle does not serve; said once for each ``key``."""

    def __init__(self, file: str, reason: str, *key: Any) -> None:
        super().__init__(reason)
        self.file, self.reason, self.key = file, reason, (file, *key)


def here() -> str:
    """The platform that a library compiled here runs on: ``linux-x86_64``."""
    return f"{sys.platform}-{platform.machine()}"


@functools.cache
def tilelang_release() -> str:
    """The installed release of TileLang, without importing it; ``"none"`` where there is none."""
    try:
        return importlib.metadata.version("tilelang")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def program_key(kernel: Kernel, p: Problem, cfg: Config) -> Key:
    """Equal for what one program serves."""
    C, dtype = p.C if kernel.has_channels else None, p.dtype if kernel.has_streams else None
    return (kernel.name, p.n, C, dtype, p.options, tuple(sorted(cfg.items())))


class Bundle:
    """A bundle that was read; its libraries are loaded when they are asked for."""

    def __init__(self, path: str | Path) -> None:
        """Raises :class:`BundleError` where ``path`` is no bundle, or of a format that this version does not read."""
        self.path = Path(path).absolute()  # libraries are loaded later, maybe from another working folder
        self.manifest = _read(self.path)
        self._programs = {program.key: program for program in self.manifest.programs}
        self._runs: dict[str, Run] = {}
        self._said: set[Key] = set()

    def find(self, kernel: Kernel, p: Problem, cfg: Config, target: str, instead: str = "compiled here instead") -> Run | None:
        """What takes the program's tensors, or None where something else serves; then the reason and ``instead`` were logged, once."""
        with _STATE.lock:
            try:
                return self._run(kernel, p, cfg, target)
            except _UnfitError as unfit:
                if unfit.key not in self._said:
                    self._said.add(unfit.key)
                    log.warning("%s", BundleError(self.path / unfit.file, f"{unfit.reason}; {instead}"))
                return None

    def holds(self, kernel: Kernel, p: Problem, cfg: Config, target: str) -> bool:
        """Whether :meth:`find` would find it; nothing is logged."""
        with _STATE.lock:
            try:
                self._run(kernel, p, cfg, target)
            except _UnfitError:
                return False
            return True

    @property
    def used(self) -> int:
        """Programs that were loaded."""
        return len(self._runs)

    def _run(self, kernel: Kernel, p: Problem, cfg: Config, target: str) -> Run:
        program = self._program(kernel, p, cfg, target)
        if program.file not in self._runs:
            self._runs[program.file] = self._load(program)
        return self._runs[program.file]

    def _program(self, kernel: Kernel, p: Problem, cfg: Config, target: str) -> Program:
        made = self.manifest
        release = made.toolchain.get("tilelang", "unknown")
        if made.arch != target:
            raise _UnfitError(MANIFEST, f"compiled for {made.arch}, wanted {target}", target)
        if made.platform != here():
            raise _UnfitError(MANIFEST, f"compiled for {made.platform}, wanted {here()}")
        if release != tilelang_release():
            raise _UnfitError(MANIFEST, f"compiled by TileLang {release}, wanted {tilelang_release()}")
        key = program_key(kernel, p, cfg)
        program = self._programs.get(key)
        if program is None:
            C = "any" if key[2] is None else p.C
            what = f"no program for {kernel.name} n={p.n}, C={C}, {p.dtype}, {_listed(p.options)}, config {_listed(key[5])}"
            raise _UnfitError(MANIFEST, what, key)
        if program.source_hash != kernel.source_hash:
            what = f"{kernel.name} has source_hash {program.source_hash}, wanted {kernel.source_hash} (this version of the kernel)"
            raise _UnfitError(MANIFEST, what, kernel.name)
        return program

    def _load(self, program: Program) -> Run:
        file = self.path / program.file
        try:
            content = file.read_bytes()
        except OSError as e:
            raise _UnfitError(program.file, f"cannot be read: {e.strerror or e}") from None
        digest = hashlib.sha256(content).hexdigest()
        if len(content) != program.bytes:
            raise _UnfitError(program.file, f"{len(content)} bytes, wanted {program.bytes} (truncated?)")
        if digest != program.sha256:
            raise _UnfitError(program.file, f"SHA-256 {digest[:12]}.., wanted {program.sha256[:12]}.. (changed?)")
        try:
            if self.manifest.arch == "cpu":
                return _load_cpu(file, program.dynamic)
            return _load_cuda(file, any(name in content for name in _NEEDS_TILELANG))
        except (OSError, AttributeError, ImportError, RuntimeError) as e:
            raise _UnfitError(program.file, f"cannot be loaded: {e}") from None


def load_bundle(path: str | Path) -> Bundle:
    """Take programs from the bundle in the folder ``path`` from now on, in this process, instead of any other bundle.

    What was compiled before stays as it is: call this before the first operator. Raises :class:`BundleError` where ``path`` is no bundle;
    what does not fit this device is logged and compiled here.
    """
    bundle = Bundle(path)
    with _STATE.lock:
        _STATE.bundle, _STATE.looked = bundle, True
    _prepare(bundle)
    return bundle


def loaded() -> Bundle | None:
    """The bundle that programs are taken from."""
    return _STATE.bundle if _STATE.looked else _look()


def reset() -> None:
    """Forget the bundle; ``MHC_BUNDLE`` is read again."""
    with _STATE.lock:
        _STATE.bundle, _STATE.looked = None, False


class _State:
    def __init__(self) -> None:
        self.bundle: Bundle | None = None
        self.looked = False
        self.lock = threading.RLock()


_STATE = _State()


def _new_lock() -> None:
    _STATE.lock = threading.RLock()


# A child forked while another thread held the lock would wait for ever.
os.register_at_fork(after_in_child=_new_lock)


def _find(kernel: Kernel, p: Problem, cfg: Config, target: str) -> Run | None:
    bundle = loaded()
    return None if bundle is None else bundle.find(kernel, p, cfg, target)


def _look() -> Bundle | None:
    """The bundle that ``MHC_BUNDLE`` names, read once."""
    with _STATE.lock:
        wanted = os.environ.get(VARIABLE, "")
        if not _STATE.looked and wanted:
            try:
                _STATE.bundle = Bundle(wanted)
                _prepare(_STATE.bundle)
            except BundleError as e:
                log.warning("%s: %s; kernels are compiled here instead", VARIABLE, e)
        _STATE.looked = True
        return _STATE.bundle


def _prepare(bundle: Bundle) -> None:
    """What the first call of a kernel need not wait for."""
    deferred.defer()
    if bundle.manifest.arch != "cpu":
        with contextlib.suppress(ImportError, OSError):  # said of the first program
            _runtime(False)


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        text = read_text(path, MAX_MANIFEST_BYTES)
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise BundleError(path, f"cannot be read: {reason}, wanted a bundle that mhc-tune compile wrote") from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as e:
        raise BundleError(path, first_complaint(e)) from None


def _listed(values: Mapping[str, Any] | tuple[tuple[str, Any], ...]) -> str:
    return " ".join(f"{name}={value}" for name, value in dict(values).items()) or "no options"


def _load_cpu(file: Path, dynamic: list[tuple[int, int]]) -> Run:
    """A library of the CPU target takes pointers, then the sizes that are not fixed, as TileLang's own caller passes them."""
    library = ctypes.CDLL(str(file))
    call, last_error = library.call, library.get_last_error
    last_error.restype = ctypes.c_char_p
    if library.init() != 0:
        raise RuntimeError(last_error().decode(errors="replace"))

    def run(*tensors: Any) -> None:
        sizes = [ctypes.c_int64(tensors[i].shape[dimension]) for i, dimension in dynamic]
        if call(*[ctypes.c_void_p(t.data_ptr()) for t in tensors], *sizes, ctypes.c_void_p(None)) != 0:
            raise RuntimeError(f"{file}: {last_error().decode(errors='replace')}")

    return run


def _load_cuda(file: Path, needs_tilelang: bool) -> Run:
    _runtime(needs_tilelang)
    import tvm_ffi

    module = tvm_ffi.load_module(str(file))
    _KEPT.append(module)
    return module.main


#: Modules of which functions are in use.
_KEPT: list[Any] = []


@functools.cache
def _runtime(with_tilelang: bool) -> None:
    """Load TVM's runtime, and TileLang's library where it is needed, as importing TileLang would, without its Python and its compiler."""
    import tvm_ffi  # noqa: F401  (its library comes first)

    spec = importlib.util.find_spec("tilelang")
    if spec is None or spec.origin is None:
        raise ImportError("TileLang is not installed")
    folder = Path(spec.origin).parent / "lib"
    ctypes.CDLL(str(folder / "libtvm_runtime.so"), mode=ctypes.RTLD_GLOBAL | os.RTLD_LAZY)
    if with_tilelang:
        ctypes.CDLL(str(folder / "libtilelang.so"), mode=os.RTLD_LAZY)


launch.look_first(_find)
_look()
