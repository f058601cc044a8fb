"""What the tests of bundles share: a profile of default configurations, and a process that runs from a bundle and says how that went.

As a program, ``python -m tests.mhc.bundled cpu|cuda steps|boundary C PROCESSES`` takes MHC_BUNDLE and MHC_PROFILE, and prints JSON. Several
processes are forked when torch and mhc are imported, which takes longest, and take their bundle at one moment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
N = 4
#: Entries name these token counts.
TOKENS = 64


def write_profile(path: Path, kernels: Iterable[str], C: int, gpu: str, arch: str, **changed: Any) -> Path:
    """A profile whose entries hold each kernel's default; ``changed``: fields of every entry."""
    from mhc.profile import save_profile
    from mhc.schema import Profile
    from tests.mhc.test_schema import ENTRY, PROFILE
    from tl_kernels import KERNELS

    def entry(name: str) -> dict[str, Any]:
        p = KERNELS[name].problem(N, C)
        own = {"kernel": name, "C": C, "tokens": TOKENS, "config": KERNELS[name].default(p), "source_hash": KERNELS[name].source_hash}
        return {**ENTRY, **own, **changed}

    where = {**PROFILE["provenance"], "gpu": gpu, "arch": arch}
    save_profile(Profile.model_validate({**PROFILE, "provenance": where, "entries": [entry(name) for name in kernels]}), path)
    return path


def start(
    bundle: Path, profile: Path, device: str, what: str, C: int, cache: Path, path: str, processes: int = 1, backend: str = "tilelang"
) -> subprocess.Popen[str]:
    """A process that runs from ``bundle``, or forks some that do, with PATH ``path`` and TileLang's cache at ``cache``."""
    from tests.conftest import python_path  # not for the process that is started: it imports little

    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "NVCC", "CXX", "CC")}
    env |= {"PATH": path, "PYTHONPATH": python_path(ROOT), "TILELANG_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    env |= {"MHC_BUNDLE": str(bundle), "MHC_PROFILE": str(profile), "MHC_BACKEND": backend}
    command = [sys.executable, "-m", "tests.mhc.bundled", device, what, str(C), str(processes)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(child: subprocess.Popen[str], timeout: float = 120) -> tuple[list[dict[str, Any]], str]:
    """What each process said, and stderr; fails where it did."""
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        child.kill()
    assert child.returncode == 0, err
    return json.loads(out), err


def _main(device: str, what: str, C: int) -> dict[str, Any]:
    import torch

    import mhc

    torch.manual_seed(0)
    gpu = torch.device(device)
    x = torch.randn(3, N, C, dtype=torch.bfloat16, device=gpu)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def steps() -> list[torch.Tensor]:
        return [torch.ops.mhc.pre(x, torch.ones(3, N, device=gpu))]

    def boundary() -> list[torch.Tensor]:
        torch.manual_seed(1)
        hc, streams = mhc.HyperConnection(C, N, device=gpu), x.clone().requires_grad_()
        u, ctx = hc.pre(streams)
        out = hc.post(u, ctx)
        out.float().square().sum().backward()
        return [out.detach(), *(p.grad for p in (streams, hc.fn, hc.base, hc.scale))]

    run = {"steps": steps, "boundary": boundary}[what]
    wait()
    begin = time.perf_counter()
    results = run()
    wait()
    first_ms = (time.perf_counter() - begin) * 1e3
    imported = sorted({"tilelang", "tvm"} & set(sys.modules))
    with mhc.use_backend("reference"):
        expected = run()
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(results, expected, strict=True)]
    return {"first_ms": first_ms, "error": max(errors), "imported": imported}


def _together(gate: Any, answers: Any, *args: Any) -> None:
    gate.wait()
    try:
        answers.put(_main(*args))
    except BaseException as e:
        answers.put({"failed": repr(e)})
        raise


def _fork(count: int, *args: Any) -> list[dict[str, Any]]:
    import mhc  # noqa: F401  (and torch)

    fork = multiprocessing.get_context("fork")
    gate, answers = fork.Barrier(count), fork.SimpleQueue()
    processes = [fork.Process(target=_together, args=(gate, answers, *args), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    return [answers.get() for _ in processes]


if __name__ == "__main__":
    arguments = sys.argv[1], sys.argv[2], int(sys.argv[3])
    many = int(sys.argv[4])
    print(json.dumps([_main(*arguments)] if many == 1 else _fork(many, *arguments)))
