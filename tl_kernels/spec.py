"""What a kernel is, as data: its tensors, its search space and constraints, its default, the bytes it must move.

Shape legend, used in every file of this package:
T tokens (dynamic), n streams, C channels, M = n*n + 2*n coefficients a token, Q = M + 1, K = n*C, S splits of a two-stage reduction.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

STREAM_DTYPES = ("bfloat16", "float16", "float32")
MAX_N = 8
Config = Mapping[str, Any]

#: Largest dynamic shared memory a block may ask for, per compute capability (CUDA C++ Programming Guide, table of limits).
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


def too_much_shared(need: int) -> str | None:
    """Why no block has that many bytes of shared memory, or None; of chips with less, the compiler says."""
    limit = SHARED_LIMIT[90] * 1024
    return f"{need} bytes of shared memory, wanted at most {limit}" if need > limit else None


@dataclass(frozen=True)
class Problem:
    """The static part of one kernel instance: everything but T.

    ``options`` are the scalars baked into the program (``norm_eps``, ``iters``, ...), as a sorted tuple so that a Problem is hashable.
    """

    n: int
    C: int
    dtype: str = "bfloat16"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_N:
            raise ValueError(f"n: got {self.n}, wanted 1..{MAX_N} streams")
        if self.C < 1:
            raise ValueError(f"C: got {self.C}, wanted at least 1 channel")
        if self.dtype not in STREAM_DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, wanted one of {', '.join(STREAM_DTYPES)}")

    @property
    def M(self) -> int:
        return self.n * self.n + 2 * self.n

    @property
    def K(self) -> int:
        return self.n * self.C

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def option(self, name: str) -> Any:
        return dict(self.options)[name]


@dataclass(frozen=True)
class Tensor:
    """One argument or result. ``dims`` name sizes (``"T n C"``); ``dtype`` is ``"stream"`` (the problem's) or a torch dtype name.

    ``partial`` marks a result the program writes once per token split, as ``[S, *dims]``; the launch sums dimension 0 afterwards, in a
    fixed order, so that it is bitwise repeatable.
    """

    name: str
    dims: str
    dtype: str = "float32"
    partial: bool = False
    #: Like ``partial``, with S written out in ``dims``, but nobody sums: another program takes the splits as they are, for any S.
    split: bool = False
    #: The program declares ``[T, K]`` for these ``[T, n, C]``; the launcher passes a view.
    flat: bool = False

    @property
    def token_dim(self) -> int | None:
        """Which dimension counts tokens, or None for a weight, its gradient and a second stage."""
        names = self.dims.split()
        return names.index("T") if "T" in names else None

    def shape(self, p: Problem, T: int, splits: int = 1) -> tuple[int, ...]:
        return self.resolve({"T": T, "n": p.n, "C": p.C, "M": p.M, "K": p.K, "Q": p.M + 1, "M+3": p.M + 3, "S": splits, "S2": splits})

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the dims that are names; the others are numbers."""
        return tuple(sizes[d] if d in sizes else int(d) for d in self.dims.split())

    def dtype_name(self, p: Problem) -> str:
        return p.dtype if self.dtype == "stream" else self.dtype

    def nbytes(self, p: Problem, T: int) -> int:
        size = p.itemsize if self.dtype == "stream" else 4
        for d in self.shape(p, T):
            size *= d
        return size


@dataclass(frozen=True, eq=False)  # one object a kernel: hashed and compared as such
class Kernel:
    """One TileLang program and all that the layers above need to know about it."""

    name: str
    build: Callable[[Problem, Config], Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    space: Callable[[Problem], dict[str, tuple[Any, ...]]]
    default: Callable[[Problem], dict[str, Any]]
    #: Why a configuration cannot work, or None. Cheap: no tracing.
    invalid: Callable[[Problem, Config], str | None]
    #: fp64 answer: ``reference(problem, *inputs) -> outputs``, in the order of ``outputs``.
    reference: Callable[..., tuple[Any, ...]]
    #: Configurations a search should try early: fast on a chip with more room than the default may count on.
    seeds: tuple[Config, ...] = ()
    #: Why no configuration serves a problem, or None. Most kernels serve all; the others are shortcuts of a path that does.
    unserved: Callable[[Problem], str | None] = lambda p: None
    #: Lowest compute capability, times ten, that the program's instructions ask for; 0: any, and worth tuning on the CPU.
    least_arch: int = 0
    #: The highest, where the instructions were not taken over; 0: any.
    last_arch: int = 0
    #: Whether it belongs to a design that is taken only where the profile has it.
    shortcut: bool = False
    #: 32-bit words of scratch that the program takes after its results: zero before the first launch, kept for the next by every launch.
    #: Blocks of such a program wait for each other (tl_kernels/meeting.py).
    scratch: Callable[[Problem, Config], int] | None = None
    #: Blocks that wait for each other and therefore need a multiprocessor each: more than a small GPU, or a slice of one, may have.
    resident: Callable[[Problem, Config], int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Outputs whose exact answer depends on how another output was rounded: ``(problem, inputs, results by name) -> answer``, in float64.
    from_results: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    pass_configs: Callable[[Config], dict[str, Any]] = lambda config: {}
    #: Knobs that mean nothing on the CPU target and stay at their default there.
    gpu_only: tuple[str, ...] = ("threads",)

    def problem(self, n: int, C: int, dtype: str = "bfloat16", **options: Any) -> Problem:
        """The Problem of this kernel, with its own options filled in and unknown ones refused."""
        unknown = set(options) - set(self.options)
        if unknown:
            raise TypeError(f"{self.name}: unknown option {', '.join(sorted(unknown))}; it has {', '.join(self.options) or 'none'}")
        return Problem(n, C, dtype, tuple(sorted({**self.options, **options}.items())))

    def unserved_on(self, p: Problem, arch: str) -> str | None:
        """Why there is nothing to tune or measure of this kernel on an architecture (``"cpu"``, ``"sm_90a"``), or None."""
        if self.least_arch and (arch == "cpu" or int(arch.removeprefix("sm_").rstrip("af")) < self.least_arch):
            return f"{self.name}: wanted compute capability {self.least_arch / 10} or later, not {arch}"
        if self.last_arch and int(arch.removeprefix("sm_").rstrip("af")) > self.last_arch:
            return f"{self.name}: wanted compute capability {self.last_arch / 10} or earlier, not {arch}"
        return self.unserved(p)

    def crowded(self, p: Problem, cfg: Config, multiprocessors: int) -> str | None:
        """Why a configuration would wait for ever on a GPU with that many multiprocessors, or None."""
        need = self.resident(p, cfg) if self.resident else 0
        return f"{self.name}: {need} blocks wait for each other, wanted at most {multiprocessors}" if need > multiprocessors else None

    @cached_property
    def has_channels(self) -> bool:
        """Whether any tensor has C in its shape; if not, one program serves every C."""
        return any({"C", "K"} & set(t.dims.split()) for t in (*self.inputs, *self.outputs))

    @cached_property
    def has_streams(self) -> bool:
        """Whether any tensor has the streams' dtype."""
        return any(t.dtype == "stream" for t in (*self.inputs, *self.outputs))

    @cached_property
    def has_tokens(self) -> bool:
        """Whether any tensor has T in its shape; a second stage has none, and takes the same time whatever T was."""
        return any(t.token_dim is not None for t in (*self.inputs, *self.outputs))

    def bytes_moved(self, p: Problem, T: int) -> int:
        """Floor in bytes: every input read once, every result written once; of what comes or leaves in splits, one split."""
        return sum(t.nbytes(p, T) for t in (*self.inputs, *self.outputs))

    @cached_property
    def source_hash(self) -> str:
        """Changes with the file that holds the program, those of this package that it imports, and those that they import. This file
        and the reference do not count, nor does what runs a program (launch.py, cpu.py), which none of them imports.
        """
        files: list[str] = []
        _collect(self.build.__module__, files)
        text = "".join(inspect.getsource(sys.modules[name]) for name in sorted(files))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


#: What decides no generated code: this file has only the sizes of a problem in it, which mean what its first lines say.
_NOT_CODE = ("tl_kernels.spec", "tl_kernels.reference")
#: An import from this package, found without parsing: that would take a third of a second of every start.
_IMPORT = re.compile(r"^ *from tl_kernels(?:\.(\w+))? import (.*)", re.MULTILINE)


def _collect(name: str, found: list[str]) -> None:
    """The modules of this package that a module imports, be it for a constant, and that those import, itself included."""
    if name in found or name in _NOT_CODE or not name.startswith("tl_kernels."):
        return
    found.append(name)
    for module, members in _IMPORT.findall(inspect.getsource(sys.modules[name])):
        for imported in [module] if module else members.split(", "):
            _collect(f"tl_kernels.{imported}", found)
