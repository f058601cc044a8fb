"""One call that has every kernel of a model compiled, side by side, instead of one after the other during its first step."""

from __future__ import annotations

import logging
import math
import operator
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from mhc import bundle, plan
from mhc.head import HyperHead
from mhc.module import HyperConnection
from mhc.plan import Program
from mhc.signatures import COMPOSITES, PAIRS, STREAM_DTYPES, Signature
from tl_kernels import NAMES, precompile
from tl_kernels.child_python import cores, module_arguments
from tl_kernels.precompile import mark, told

log = logging.getLogger("mhc")


def warm_up(
    module: nn.Module,
    tokens: int | Iterable[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    backward: bool = True,
    jobs: int | None = None,
) -> int:
    """Compile what the connections and heads in ``module`` run, several programs at a time, and load it; return how many.

        model = Model().cuda()
        mhc.warm_up(model, tokens=batch * sequence)  # in every rank; what one rank compiles another one loads

    Nothing runs on the device, and nothing is compiled that a bundle or an earlier process compiled. Without this call each program is
    compiled when the first step comes to it.

    Args:
        module: with its parameters where it will run.
        tokens: T, or several where the model sees several (training and decode): products of the streams' leading dimensions.
        dtype: of the streams.
        backward: whether gradients are wanted.
        jobs: processes that compile, this one among them; by default this rank's share of the processors (``LOCAL_WORLD_SIZE``).

    Raises:
        ValueError: no connection or head in ``module``, parameters on a device no kernel runs on, fewer than one token or job.
        TypeError: what is no module, a dtype that streams cannot have, token counts that are no whole numbers.
        Whatever the compiler raises.
    """
    if dtype not in STREAM_DTYPES:
        raise TypeError(f"dtype: got {dtype}, wanted {' or '.join(map(str, STREAM_DTYPES))}, that of the streams")
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise ValueError(f"jobs: got {jobs!r}, wanted a whole number, at least 1")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, wanted a torch.nn.Module with connections in it")
    counts = _counts(tokens)
    users = [m for m in module.modules() if isinstance(m, (HyperConnection, HyperHead))]
    if not users:
        raise ValueError(f"module: got {type(module).__name__} without an mhc.HyperConnection or mhc.HyperHead in it")
    found = {told(*program): program for user in users for T in counts for program in _programs(user, T, dtype, backward)}
    # the last of NAMES, which do most in one launch, take longest
    heaviest_first = sorted(found.values(), key=lambda program: -NAMES.index(program[0].name))
    return _make_ready(heaviest_first, jobs)


def _counts(tokens: int | Iterable[int]) -> list[int]:
    try:
        counts = sorted({operator.index(T) for T in (tokens if isinstance(tokens, Iterable) else [tokens])})
    except TypeError:
        raise TypeError(f"tokens: got {tokens!r}, wanted a whole number of tokens, or several") from None
    if not counts or counts[0] < 1:
        raise ValueError(f"tokens: got {tokens!r}, wanted at least 1")
    return counts


def _programs(user: HyperConnection | HyperHead, T: int, dtype: torch.dtype, backward: bool) -> Iterator[Program]:
    parameter = next(user.parameters(), None)  # its own come first, if they are not taken together elsewhere
    device = "no device" if parameter is None else parameter.device
    if parameter is None or parameter.device.type not in ("cpu", "cuda"):
        raise ValueError(f"module: got a {type(user).__name__} with parameters on {device}, wanted them where they run, on cpu or cuda")
    M = user.n * user.n + 2 * user.n
    size = {"T": T, "n": user.n, "C": user.dim, "M": M, "Q": M + 1, "K": user.n * user.dim}

    def stand_ins(signature: Signature) -> tuple[torch.Tensor, ...]:
        """One element that looks like the whole tensor."""
        dtypes = [dtype if t.dtype == "stream" else torch.float32 for t in signature.inputs]
        found = [torch.empty((), dtype=d, device=parameter.device) for d in dtypes]
        return tuple(one.expand(t.resolve(size)) for one, t in zip(found, signature.inputs, strict=True))

    for name, given in user.operators():
        forward, back = (PAIRS | COMPOSITES)[name]
        options = forward.options | dict(zip(forward.options, given, strict=False))
        yield from plan.programs(forward.name, stand_ins(forward), options)
        if backward:
            yield from plan.programs(back.name, stand_ins(back), {k: options[k] for k in back.options})


def _share(programs: int) -> int:
    """Processes of this rank: its share of the node's processors, and no more than all ranks have programs for."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = max(1, int(given) if given.isdecimal() else 1)
    return math.ceil(min(cores(), programs) / ranks)


def _make_ready(programs: Sequence[Program], jobs: int | None) -> int:
    from tl_kernels.launch import get_launcher, is_loaded

    held = bundle.loaded()
    missing = [program for program in programs if not is_loaded(*program) and not (held and held.holds(*program))]
    begun = time.monotonic()
    if missing:
        _compile(missing, jobs)
    for program in programs:
        get_launcher(*program)
    if missing:
        log.info("%d programs compiled or loaded in %.0f s", len(missing), time.monotonic() - begun)
    return len(missing)


def _compile(programs: Sequence[Program], jobs: int | None) -> None:
    """Into TileLang's cache, in this process and ``jobs`` - 1 others. What one of those cannot compile is left to this one."""
    from tilelang import env
    from tqdm import tqdm

    release = bundle.tilelang_release()
    marks = {told(*program): mark(release, *program) for program in programs}
    shared = env.is_cache_enabled() and precompile.is_writable()
    waiting = [text for text, left in marks.items() if not precompile.is_compiled(left)] if shared else []
    if not waiting:
        return
    # what this process imports from, and no device
    path = os.pathsep.join(folder for folder in sys.path if isinstance(folder, str) and folder)
    variables = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *module_arguments("tl_kernels.precompile", release, *waiting)]
    children: list[subprocess.Popen[bytes]] = []
    silent = subprocess.DEVNULL
    with tqdm(total=len(waiting), desc="mhc: compiling", disable=None, leave=False) as bar:

        def tick() -> None:
            bar.update(sum(precompile.is_compiled(marks[text]) for text in waiting) - bar.n)

        try:
            for _ in range(min(jobs or _share(len(waiting)), len(waiting)) - 1):  # one after the other, for an interrupt may come between
                children.append(subprocess.Popen(command, env=variables, stdin=silent, stdout=silent, stderr=silent))  # noqa: PERF401
            precompile.main(release, *waiting, tick=tick)
        finally:
            for child in children:
                child.kill()
                child.wait()
