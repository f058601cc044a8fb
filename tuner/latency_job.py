"""What a measuring process of ``mhc-tune check`` does: build one entry, hold its call ready, time a batch of it.

It also runs beside the kernels of another revision (tuner/against.py). Of theirs it takes no more than :func:`surface_job` asks for, and
what goes in and out is plain data: a class of theirs would be unpickled as one of ours.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.device_lock import hold, lock_name
from tuner.device_process import clock_of, device_of, end_if_beyond_use, synchronize
from tuner.latency_case import Case, label

_call: Callable[[], object] | None = None


def surface_job(profile: str, wanted: list[Case], root: str) -> dict[str, Any]:
    """Everything that a check needs of the kernels and profiles imported here, at once. ``wanted``: entries of today's profile;
    ``root``: the folder that they must come from.

    Returns ``profile``: whether there is one called so; ``cases``: one Case or a reason (str) for each of ``wanted``, the entry of that
    profile at the same key, else what it serves there; ``untuned``: how many are the latter; ``kernels``, ``entries``: names of all there
    are; ``hashes``: kernel -> source hash. Raises what a missing piece raises.
    """
    import mhc
    import tl_kernels
    from mhc.profile import choose_from, packaged_dir, packaged_names, read_profile
    from tl_kernels import KERNELS, NAMES
    from tl_kernels.launch import Launcher, compile_kernel

    for package in (mhc, tl_kernels):
        if not Path(str(package.__file__)).resolve().is_relative_to(Path(root).resolve()):
            raise RuntimeError(f"it has no package {package.__name__}")
    for piece in (Launcher.empty_outputs, Launcher.__call__, compile_kernel):
        assert callable(piece)
    found = read_profile(packaged_dir() / f"{profile}.yaml") if profile in packaged_names() else None
    entries = {} if found is None else {e.key: e for e in found.entries}
    cases: list[Case | str] = []
    untuned = 0
    for case in wanted:
        if case.kernel not in NAMES:
            cases.append(f"there is no kernel {case.kernel}")
            continue
        kernel = KERNELS[case.kernel]
        p = kernel.problem(case.n, case.C, case.dtype)
        why_not = kernel.unserved(p)
        entry = entries.get((case.kernel, case.n, case.C, case.dtype, case.tokens))
        if why_not is not None:
            cases.append(why_not)
        elif entry is not None:
            cases.append(Case(*entry.key, config=dict(entry.config), impl=entry.impl))
        else:
            untuned += 1
            choice = None if found is None else choose_from(found, case.kernel, p, case.tokens)[0]
            # PyTorch may serve where there is no entry, but it is the kernel that is checked
            config, impl = (dict(choice.config), str(choice.impl)) if choice and choice.tuned else (dict(kernel.default(p)), "tilelang")
            cases.append(Case(case.kernel, case.n, case.C, case.dtype, case.tokens, config, impl))
    return {
        "profile": found is not None,
        "cases": cases,
        "untuned": untuned,
        "kernels": list(NAMES),
        "entries": [label(*e.key) for e in entries.values()],
        "hashes": {case.kernel: KERNELS[case.kernel].source_hash for case in wanted if case.kernel in NAMES},
    }


def build_job(case: Case, target: str) -> dict[str, Any]:
    """Compile, for the disk cache. Returns ``seconds`` and ``program``, a hash of the generated text and how it is compiled (None for the
    reference). Raises what TileLang and the compiler raise.
    """
    from tl_kernels import KERNELS
    from tl_kernels.launch import compile_kernel

    start = time.perf_counter()
    if case.impl == "reference":
        return {"seconds": 0.0, "program": None}
    kernel = KERNELS[case.kernel]
    jit = compile_kernel(kernel, kernel.problem(case.n, case.C, case.dtype), case.config, target)
    # where blocks wait for each other the CPU target wraps it
    text = getattr(jit, "jit", jit).get_kernel_source()
    flags = sorted(kernel.pass_configs(case.config).items()) if target != "cpu" else []
    program = hashlib.sha256(f"{text}\n{flags}".encode()).hexdigest()[:16]
    return {"seconds": time.perf_counter() - start, "program": program}


def start_job() -> None:
    """What takes a process seconds before its first entry; touches no device."""
    import tilelang  # noqa: F401

    import tl_kernels.launch  # noqa: F401


def copy_job(target: str) -> float:
    """Copy bandwidth in GB/s. The caller holds the device's lock."""
    device = device_of(target)
    gbps: float = _on(device, lambda: clock_of(device).copy_gbps())
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()  # or the entries would lie in its gigabytes, and those of the other revision elsewhere
    return gbps


def prepare_job(case: Case, target: str, seed: int) -> None:
    """Load the program, make its inputs and call it once; :func:`batch_job` times that call until the next is prepared. Raises what the
    launch raises.
    """
    global _call
    from tl_kernels import KERNELS
    from tl_kernels.launch import Launcher
    from tuner.inputs import make_inputs

    _call = None  # its memory first
    device = device_of(target)
    kernel = KERNELS[case.kernel]
    p = kernel.problem(case.n, case.C, case.dtype)

    def prepare() -> Callable[[], object]:
        with hold(lock_name(device), shared=True):
            inputs = make_inputs(kernel, p, case.tokens, seed, device)
            if case.impl == "reference":
                from tuner.measure_job import run_reference

                call: Callable[[], object] = functools.partial(run_reference, case.kernel, p, inputs)
            else:
                launcher = Launcher(kernel, p, case.config, target)
                call = functools.partial(launcher, *inputs, out=launcher.empty_outputs(case.tokens, inputs[0].device))
            call()
            synchronize(device)
        return call

    _call = _on(device, prepare)


def batch_job(target: str, rounds: int) -> dict[str, Any]:
    """``samples``: ``rounds`` of the prepared call, in microseconds, and what the clocks were (:meth:`tuner.device_state.Watch.report`).
    The caller holds the device's lock. Raises RuntimeError where nothing is prepared, as in a process that follows one that died.
    """
    call, device = _call, device_of(target)
    if call is None:
        raise RuntimeError("nothing is prepared: the process that was to be timed died")
    clock = clock_of(device)

    def take() -> dict[str, Any]:
        clock.watch.start()
        clock.warm_up([call], 1)
        return {"samples": clock.sample(call, rounds), **clock.watch.report()}

    return _on(device, take)


def _on(device: str, body: Callable[[], Any]) -> Any:
    try:
        return body()
    except Exception as e:
        end_if_beyond_use(device, e)
        raise
