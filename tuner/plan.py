"""From names on the command line to the list of tasks."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from mhc.yamlfile import first_complaint
from tl_kernels import KERNELS, NAMES
from tl_kernels.spec import STREAM_DTYPES, Problem
from tuner.errors import TuneError, unknown
from tuner.hardware import Hardware
from tuner.shape import parse_shape
from tuner.task import Task
from tuner.workloads import Workload


def split_names(text: str | None) -> list[str] | None:
    """``"a, b"`` -> ``["a", "b"]``; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def pick_kernels(wanted: Sequence[str] | None) -> list[str]:
    """Kernel names in boundary order. Raises :class:`TuneError` for one that does not exist."""
    for name in wanted or ():
        if name not in NAMES:
            raise unknown("kernel", name, NAMES)
    if wanted is not None and not wanted:
        raise TuneError("--kernels: got no name, wanted at least one")
    return [name for name in NAMES if wanted is None or name in wanted]


def pick_workloads(wanted: Sequence[str] | None, known: dict[str, Workload]) -> list[Workload]:
    """Workloads in the file's order. Raises :class:`TuneError` for one that does not exist."""
    for name in wanted or ():
        if name not in known:
            raise unknown("workload", name, known)
    if wanted is not None and not wanted:
        raise TuneError("--workloads: got no name, wanted at least one")
    return [workload for name, workload in known.items() if wanted is None or name in wanted]


def shape_workloads(text: str, dtype: str) -> list[Workload]:
    """``"8192x4x3072,64x4x3072"`` as workloads, one for each n and C. Raises :class:`TuneError`."""
    if dtype not in STREAM_DTYPES:
        raise unknown("dtype", dtype, STREAM_DTYPES)
    tokens: dict[tuple[int, int], set[int]] = {}
    for name in split_names(text) or ():
        shape = parse_shape(name, "--shapes")
        tokens.setdefault((shape.n, shape.C), set()).add(shape.T)
    if not tokens:
        raise TuneError("--shapes: got none, wanted at least one TxnxC such as 8192x4x2560")
    found = []
    for (n, C), counts in tokens.items():
        buckets = sorted(counts)
        try:
            found.append(Workload.model_validate({"n": n, "C": C, "dtype": dtype, "tokens": buckets, "cpu_tokens": buckets}))
        except ValidationError as e:
            raise TuneError(f"--shapes: n={n}, C={C}: {first_complaint(e)}") from None
    return found


def parse_tokens(text: str | None) -> list[int] | None:
    """``"2048,8192"`` -> ``[2048, 8192]``. Raises :class:`TuneError`."""
    names = split_names(text)
    if names is None:
        return None
    try:
        tokens = sorted({int(name) for name in names})
    except ValueError:
        raise TuneError(f"--tokens: got {text!r}, wanted counts such as 2048,8192") from None
    if not tokens or tokens[0] < 1:
        raise TuneError(f"--tokens: got {text!r}, wanted counts of at least 1")
    return tokens


def nothing_runs(kernels: Sequence[str], workloads: Sequence[Workload], hardware: Hardware) -> TuneError:
    """The error where :func:`make_tasks` gives none: why each of the kernels has nothing to tune."""
    specs = [KERNELS[name] for name in kernels]
    why = dict.fromkeys(spec.unserved_on(spec.problem(w.n, w.C, w.dtype), hardware.arch) for spec in specs for w in workloads)
    return TuneError(f"--kernels {','.join(kernels)}: got none that runs on {hardware.arch}: {'; '.join(filter(None, why))}")


def make_tasks(kernels: Sequence[str], workloads: Sequence[Workload], hardware: Hardware, tokens: Sequence[int] | None) -> list[Task]:
    """One task per program and token count; a program without C in it is tuned once for every C, one without T once for every T."""
    tasks: dict[tuple[str, Problem, int], Task] = {}
    covers: dict[tuple[int, str, int], list[int]] = {}
    for workload in workloads:
        for T in tokens or workload.buckets(hardware.arch):
            covers.setdefault((workload.n, workload.dtype, T), []).append(workload.C)
    for workload in workloads:
        for name in kernels:
            try:
                spec = KERNELS[name]
            except ImportError as e:
                raise TuneError(f"kernel {name}: {e}; is the installation complete? (pip install --force-reinstall)") from None
            buckets = tokens or workload.buckets(hardware.arch)
            for T in buckets if spec.has_tokens else buckets[-1:]:
                every = sorted(set(covers[workload.n, workload.dtype, T]))
                C = workload.C if spec.has_channels else every[0]
                p = spec.problem(workload.n, C, workload.dtype)
                if spec.unserved_on(p, hardware.arch):
                    continue
                task = Task(name, p, T, hardware.arch, hardware.profile, (C,) if spec.has_channels else tuple(every), hardware.name)
                tasks.setdefault((name, p, T), task)
    return list(tasks.values())
