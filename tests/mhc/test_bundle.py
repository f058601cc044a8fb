"""Bundles: what fits is loaded and nothing is compiled; what does not is said once and compiled; many processes start at once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import mhc
from mhc import backend
from mhc import bundle as bundles
from tests.conftest import here
from tests.mhc.bundled import TOKENS, N, results, start, write_profile
from tl_kernels import KERNELS, deferred, launch, reference
from tl_kernels.cpu import available
from tl_kernels.launch import Launcher, device_arch
from tuner.bundle import CompileRequest, compile_bundle

C = 32
compiler = pytest.mark.skipif(not available(), reason="no C++ compiler")
pytestmark = compiler


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle of ``pre`` and ``pre_bwd`` for the CPU target, and its profile."""
    folder = tmp_path_factory.mktemp("bundles")
    profile = write_profile(folder / "cpu.yaml", ("pre", "pre_bwd"), C, "Test CPU", "cpu")
    assert compile_bundle(CompileRequest(None, folder / "made", str(profile), None, 2, "mhc-tune compile")) == 0
    return folder / "made", profile


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the bundle, to be spoilt."""
    return Path(shutil.copytree(made[0], tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def no_bundle(monkeypatch):
    monkeypatch.delenv(bundles.VARIABLE, raising=False)
    monkeypatch.setattr(deferred, "_deferring", False)
    bundles.reset()
    yield
    bundles.reset()


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that were compiled, which they only seem to be."""
    names = []

    def compile_kernel(kernel, p, cfg, target):
        names.append(kernel.name)
        return lambda *tensors: None

    monkeypatch.setattr(launch, "compile_kernel", here(compile_kernel, launch.compile_kernel))
    return names


def launcher(name="pre", C=C, dtype="bfloat16", **config):
    kernel = KERNELS[name]
    p = kernel.problem(N, C, dtype)
    return Launcher(kernel, p, {**kernel.default(p), **config}, "cpu")


def respell(folder, **changed):
    """Other values in the manifest; those that are names of a program's fields go into every program."""
    path = folder / bundles.MANIFEST
    manifest = json.loads(path.read_text())
    for name, value in changed.items():
        if name in manifest:
            manifest[name] = value
        else:
            for program in manifest["programs"]:
                program[name] = value
    path.write_text(json.dumps(manifest))


def library(folder, kernel="pre"):
    (name,) = {p["file"] for p in json.loads((folder / bundles.MANIFEST).read_text())["programs"] if p["kernel"] == kernel}
    return folder / name


def test_a_program_of_the_bundle_is_not_compiled(made, compiled, caplog):
    mhc.load_bundle(made[0])
    torch.manual_seed(0)
    for T in (1, 3, TOKENS):
        x, H_pre, du = torch.randn(T, N, C, dtype=torch.bfloat16), torch.rand(T, N), torch.randn(T, C, dtype=torch.bfloat16)
        (u,) = launcher()(x, H_pre)
        torch.testing.assert_close(u.double(), reference.pre(x.double(), H_pre.double()), rtol=1e-2, atol=1e-2)
        got = launcher("pre_bwd")(du, x, H_pre)
        for ours, true in zip(got, reference.vjp(reference.pre, (x.double(), H_pre.double()), du.double()), strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=2e-2, atol=2e-2)
    assert not compiled
    assert not caplog.records


def test_the_variable_names_a_bundle(made, compiled, monkeypatch, caplog):
    monkeypatch.setenv(bundles.VARIABLE, str(made[0]))
    launcher()
    assert not compiled
    assert not caplog.records


def test_a_relative_path_is_of_the_folder_it_was_named_in(copied, compiled, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(copied)
    mhc.load_bundle(".")
    monkeypatch.chdir(tmp_path)  # as launchers of jobs do
    launcher()
    assert not compiled
    assert not caplog.records


def _truncate(folder):
    path = library(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path.name, f"{path.stat().st_size} bytes, wanted {path.stat().st_size + 100}"


def _tamper(folder):
    path = library(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name, "SHA-256 "


def _remove(folder):
    library(folder).unlink()
    return library(folder).name, "No such file"


def _no_library(folder):
    content = b"not an ELF file"
    library(folder).write_bytes(content)
    digest = bundles.hashlib.sha256(content).hexdigest()
    manifest = json.loads((folder / bundles.MANIFEST).read_text())
    for program in manifest["programs"]:
        if program["kernel"] == "pre":
            program |= {"bytes": len(content), "sha256": digest}
    (folder / bundles.MANIFEST).write_text(json.dumps(manifest))
    return library(folder).name, "cannot be loaded"


def _changed(wanted, **values):
    def change(folder):
        respell(folder, **values)
        return bundles.MANIFEST, wanted

    return change


SPOILT = {
    "truncated": _truncate,
    "tampered": _tamper,
    "missing": _remove,
    "no library": _no_library,
    "another architecture": _changed("compiled for sm_80, wanted cpu", arch="sm_80"),
    "another platform": _changed("compiled for linux-vax, wanted linux-", platform="linux-vax"),
    "another TileLang": _changed("compiled by TileLang 0.0.1, wanted 0.1", toolchain={"tilelang": "0.0.1"}),
    "stale": _changed("pre has source_hash 0123, wanted ", source_hash="0123"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_does_not_fit_is_said_once_and_compiled(spoil, copied, compiled, caplog):
    file, wanted = spoil(copied)
    mhc.load_bundle(copied)
    for _ in range(3):
        launcher()
    assert compiled == ["pre"] * 3
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("mhc", logging.WARNING)
    message = record.getMessage()
    assert message.startswith(f"{copied / file}: "), message
    assert wanted in message
    assert message.endswith("; compiled here instead")
    assert "\n" not in message


def test_one_bad_file_costs_one_kernel(copied, compiled, caplog):
    _tamper(copied)
    mhc.load_bundle(copied)
    launcher()
    launcher("pre_bwd")
    assert compiled == ["pre"]


@pytest.mark.parametrize("other", [{"C": 64}, {"dtype": "float32"}, {"threads": 7}], ids=str)
def test_a_program_that_is_not_in_the_bundle_is_named_and_compiled(other, made, compiled, caplog):
    mhc.load_bundle(made[0])
    launcher(**other)
    assert compiled == ["pre"]
    (record,) = caplog.records
    name, value = next(iter(other.items()))
    assert f"{name}={value}" in record.getMessage() or f", {value}, " in record.getMessage()


def _empty(folder):
    folder.mkdir()


def _malformed(text):
    def make(folder):
        folder.mkdir()
        (folder / bundles.MANIFEST).write_text(text)

    return make


NO_BUNDLES = {
    "nowhere": lambda folder: None,
    "a file": lambda folder: folder.write_text("x"),
    "an empty folder": _empty,
    "no JSON": _malformed("{"),
    "another schema": _malformed('{"schema_version": 2}'),
    "a list": _malformed("[]"),
}


@pytest.mark.parametrize("make", NO_BUNDLES.values(), ids=NO_BUNDLES)
def test_what_is_no_bundle_raises_or_where_the_variable_names_it_is_said(make, tmp_path, compiled, monkeypatch, caplog):
    folder = tmp_path / "bundle"
    make(folder)
    with pytest.raises(mhc.BundleError) as error:
        mhc.load_bundle(folder)
    assert str(error.value).startswith(f"{folder / bundles.MANIFEST}: ")
    assert "\n" not in str(error.value)
    assert "wanted" in str(error.value) or "JSON" in str(error.value)
    monkeypatch.setenv(bundles.VARIABLE, str(folder))
    for _ in range(2):
        launcher()
    (record,) = caplog.records
    assert record.getMessage() == f"MHC_BUNDLE: {error.value}; kernels are compiled here instead"
    assert compiled == ["pre", "pre"]


def test_a_file_outside_of_the_folder_is_refused(copied):
    respell(copied, file="../made/evil.so")
    with pytest.raises(mhc.BundleError, match=r"programs\[0\]\.file: got '\.\./made/evil\.so'"):
        mhc.load_bundle(copied)


def test_threads_load_a_library_once(made, monkeypatch):
    mhc.load_bundle(made[0])
    loads, load = [], bundles._load_cpu
    monkeypatch.setattr(bundles, "_load_cpu", lambda *args: loads.append(args) or load(*args))
    threads = [threading.Thread(target=launcher) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_eight_processes_without_a_compiler(made, tmp_path):
    folder, profile = made
    before = contents(folder)
    cache = tmp_path / "cache"
    said, err = results(start(folder, profile, "cpu", "steps", C, cache, path="", processes=8))
    assert len(said) == 8
    for one in said:
        assert one["error"] < 1e-2
        assert one["imported"] == []  # nor was there any time for it: TileLang takes half a second to import
    assert str(folder) not in err
    assert contents(folder) == before
    assert not cache.exists()


def test_a_tampered_file_is_compiled_in_a_process_with_a_compiler(copied, made, tmp_path):
    file, _ = _tamper(copied)
    (said,), err = results(start(copied, made[1], "cpu", "steps", C, tmp_path / "cache", path=os.environ["PATH"]))
    assert said["error"] < 1e-2
    assert said["imported"] == ["tilelang", "tvm"]
    assert err.count(f"{copied / file}: SHA-256") == 1


#: What a boundary of the fused path launches, forward and backward.
BOUNDARY = (
    "pre",
    "project_parts",
    "post_res_project",
    "coefficients",
    "pre_grad",
    "coefficients_bwd",
    "streams_grad",
    "post_res_grads",
    "sum_parts",
    "post_res",
)


@pytest.mark.parametrize("beside", [False, True], ids=["what the bundle has", "and more"])
def test_on_a_cpu_without_a_compiler_pytorch_serves_what_the_bundle_has_not(made, tmp_path, beside):
    """As a user has it, with no backend named: the bundle serves, and TileLang is not even imported where nothing else was tuned."""
    kernels = ("pre", "pre_bwd", "post_res") if beside else ("pre", "pre_bwd")
    profile = write_profile(tmp_path / "cpu.yaml", kernels, C, "Test CPU", "cpu")
    ((said,), err) = results(start(made[0], profile, "cpu", "boundary", C, tmp_path / "cache", path="", backend="auto"))
    assert said["error"] < 3e-2
    assert ("no C++ compiler on PATH: the PyTorch reference serves what the bundle has not" in err) == beside
    assert err.count("no program for post_res ") == beside
    assert (said["imported"] == []) != beside


def test_a_bundle_that_does_not_fit_where_no_compiler_is_leaves_pytorch_and_is_said_once(copied, caplog, monkeypatch):
    respell(copied, toolchain={"tilelang": "0.0.1"})
    mhc.load_bundle(copied)
    monkeypatch.setattr(backend, "_cpu_target", lambda: False)
    pre = KERNELS["pre"]
    p = pre.problem(N, C)
    for _ in range(2):
        assert not backend.program_serves("auto", torch.device("cpu"), pre, p, "tilelang", pre.default(p))
    (record,) = caplog.records
    assert "compiled by TileLang 0.0.1, wanted 0.1" in record.getMessage()
    assert record.getMessage().endswith("; PyTorch serves")
    assert bundles.loaded().used == 0


def test_a_bundle_is_asked_quietly_before_a_compiler(made, caplog):
    mhc.load_bundle(made[0])
    pre, post_res = KERNELS["pre"], KERNELS["post_res"]
    p, q = pre.problem(N, C), post_res.problem(N, C)
    assert backend.program_serves("auto", torch.device("cpu"), pre, p, "tilelang", pre.default(p))
    found = bundles.loaded()
    assert found.used == 1
    assert not found.holds(post_res, q, post_res.default(q), "cpu")
    assert not found.holds(pre, p, pre.default(p), "sm_90a")
    assert not caplog.records


@pytest.mark.gpu
def test_on_a_gpu_without_nvcc(tmp_path):
    """Built on this machine's CPU; then one process, and eight at once, with nvcc and g++ hidden."""
    device = torch.device("cuda", 0)
    gpu, arch, C = torch.cuda.get_device_name(device), device_arch(device), 2560
    profile = write_profile(tmp_path / "gpu.yaml", BOUNDARY, C, gpu, arch)
    folder = tmp_path / "bundle"
    assert compile_bundle(CompileRequest(None, folder, str(profile), None, None, "mhc-tune compile")) == 0
    before, cache = contents(folder), tmp_path / "cache"
    for processes in (1, 8):
        children = [start(folder, profile, "cuda", "boundary", C, cache, path="") for _ in range(processes)]
        for child in children:
            (said,), err = results(child, timeout=300)
            assert said["error"] < 3e-2
            assert said["imported"] == []
            assert str(folder) not in err
    ((one,), _) = results(start(folder, profile, "cuda", "steps", C, cache, path=""))
    assert one["first_ms"] < 50
    assert contents(folder) == before
    assert not cache.exists()
