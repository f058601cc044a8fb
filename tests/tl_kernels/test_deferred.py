"""Specs come without TileLang where that is put off, and the programs are the same when it comes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tl_kernels import KERNELS

ROOT = Path(__file__).resolve().parents[2]

#: Kernels that between them use every helper of the package.
BUILT = ("coefficients", "post_res_project_pre", "streams_grad", "pre_streams_grad", "pre_grad", "pre")

CODE = """if True:
    import hashlib, sys
    from tl_kernels import KERNELS, deferred
    deferred.defer()
    hashes = {name: kernel.source_hash for name, kernel in KERNELS.items()}
    for kernel in KERNELS.values():
        p = kernel.problem(4, 512)
        assert kernel.unserved(p) or not kernel.invalid(p, kernel.default(p)), kernel.name
    assert not {"tilelang", "tvm"} & set(sys.modules), "TileLang was imported"
    for name, value in hashes.items():
        print(name, value)
    for name in sys.argv[1:]:
        p = KERNELS[name].problem(4, 512)
        print(name, hashlib.sha256(KERNELS[name].build(p, KERNELS[name].default(p)).script().encode()).hexdigest())
    assert "tilelang" in sys.modules
    left = [f"{m}.{n}" for m in list(sys.modules) if m.startswith("tl_kernels.") and m != "tl_kernels.deferred"
            for n, v in vars(sys.modules[m]).items() if v is deferred._STAND_IN or isinstance(v, deferred._Macro)]
    assert not left, left
"""


def test_specs_come_without_tilelang_and_programs_are_the_same():
    done = subprocess.run([sys.executable, "-c", CODE, *BUILT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [f"{name} {kernel.source_hash}" for name, kernel in KERNELS.items()]
    for name in BUILT:
        p = KERNELS[name].problem(4, 512)
        script = KERNELS[name].build(p, KERNELS[name].default(p)).script()
        expected.append(f"{name} {hashlib.sha256(script.encode()).hexdigest()}")
    assert done.stdout.splitlines() == expected
