"""What this machine is, and whether it is what ``--gpu`` asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import TuneError

CPU = "cpu"


@dataclass(frozen=True)
class Hardware:
    """The device to tune. ``arch`` is ``"cpu"`` or e.g. ``"sm_90a"``; ``profile`` is the file name without ``.yaml``."""

    profile: str
    name: str
    arch: str
    sm_count: int | None = None
    power_limit_w: float | None = None
    driver: str | None = None
    cuda: str | None = None

    @property
    def is_cpu(self) -> bool:
        return self.arch == CPU

    @property
    def device(self) -> str:
        return CPU if self.is_cpu else "cuda"


def cpu_model() -> str:
    """The processor's name, as a profile is matched with it at run time."""
    import torch

    from mhc.profile import device_name

    return device_name(torch.device("cpu"))


def _cpu() -> Hardware:
    return Hardware(profile=CPU, name=cpu_model(), arch=CPU)


def nvidia_smi(fields: str) -> list[str]:
    """One device's values for a comma-separated query, or [] where nvidia-smi cannot say."""
    if shutil.which("nvidia-smi") is None:
        return []
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", index]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _gpu() -> Hardware | None:
    """The current CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    from mhc.profile import profile_name
    from tl_kernels.launch import device_arch

    device = torch.device("cuda", torch.cuda.current_device())
    props = torch.cuda.get_device_properties(device)
    smi = nvidia_smi("driver_version,power.limit")
    return Hardware(
        profile=profile_name(props.name),
        name=props.name,
        arch=device_arch(device),
        sm_count=props.multi_processor_count,
        driver=smi[0] if smi else None,
        power_limit_w=_number(smi[1]) if len(smi) > 1 else None,
        cuda=torch.version.cuda,
    )


def _why_no_gpu() -> str:
    seen = nvidia_smi("name")
    if seen:
        import torch

        return f"nvidia-smi shows {seen[0]!r}, but this torch ({torch.__version__}) cannot use it"
    return f"found no CUDA device, only the CPU ({cpu_model()})"


def resolve(wanted: str) -> Hardware:
    """The device ``--gpu`` names. Raises :class:`TuneError` with what was found and what to run instead."""
    wanted = wanted.strip().lower()
    if wanted == CPU:
        return _cpu()
    gpu = _gpu()
    if wanted == "auto":
        return gpu or _cpu()
    if gpu is None:
        raise TuneError(f"--gpu {wanted}: {_why_no_gpu()}; use --gpu cpu here, or run this on a machine with that GPU")
    if gpu.profile != wanted:
        raise TuneError(f"--gpu {wanted}: found {gpu.name!r} ({gpu.profile}); use --gpu {gpu.profile} for this one")
    return gpu


def find_compiler(hardware: Hardware) -> str:
    """The compiler the target needs (g++ or nvcc). Raises :class:`TuneError` where it is missing."""
    if hardware.is_cpu:
        found = shutil.which("g++") or shutil.which("c++")
        if found is None:
            raise TuneError("no C++ compiler: the cpu target needs g++ on PATH (Debian/Ubuntu: apt-get install g++)")
        return found
    found = shutil.which("nvcc")
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")):
        candidate = Path(home) / "bin" / "nvcc"
        found = found or (str(candidate) if candidate.is_file() else None)
    if found is None:
        try:
            from tilelang.contrib.nvcc import get_nvcc_compiler

            candidate = Path(get_nvcc_compiler())
            found = str(candidate) if candidate.is_file() else None
        except RuntimeError:
            pass
    if found is None:
        raise TuneError(f"no nvcc: tuning {hardware.profile} compiles CUDA; install the CUDA toolkit or set CUDA_HOME to it")
    return found
