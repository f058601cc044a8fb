"""Launch the programs of a profile once each, for NVIDIA's compute-sanitizer, which pytest and a reference would keep busy for minutes:

    compute-sanitizer --tool memcheck  --kernel-name kernel_substring=_kernel python -m tests.sanitize streams_grad project_parts
    compute-sanitizer --tool racecheck --kernel-name kernel_substring=_kernel python -m tests.sanitize --C 2560 --n 4,8

What is printed last is what ran. Inputs are made on the CPU: every kernel of PyTorch's that is loaded costs the sanitizer time.
"""

from __future__ import annotations

import argparse

import torch

from mhc.profile import read_profile
from tl_kernels import KERNELS, NAMES
from tl_kernels.launch import device_arch, get_launcher
from tuner.inputs import make_inputs


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kernels", nargs="*", help="kernels; default: all of the profile")
    parser.add_argument("--profile", default="h100", help="profile, a path or a packaged name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--C", type=numbers, default=[2560], help="channels, separated by commas")
    parser.add_argument("--n", type=numbers, default=[4], help="streams, separated by commas")
    parser.add_argument("--tokens", type=numbers, default=[1, 100, 203], help="token counts to launch with: few, and ragged")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels) - set(NAMES):
        parser.error(f"kernels: got {', '.join(sorted(unknown))}, wanted some of {', '.join(NAMES)}")
    device = torch.device(options.device)
    launches = 0
    seen = set()
    for entry in read_profile(options.profile).entries:
        kernel = KERNELS[entry.kernel]
        chosen = (entry.kernel, entry.n, entry.C, tuple(sorted(entry.config.items())))
        if entry.n not in options.n or entry.C not in options.C or chosen in seen or entry.kernel not in (options.kernels or NAMES):
            continue
        seen.add(chosen)
        p = kernel.problem(entry.n, entry.C, entry.dtype)
        run = get_launcher(kernel, p, dict(entry.config), device_arch(device))
        for T in options.tokens:
            run(*(t.to(device) for t in make_inputs(kernel, p, T, 0, "cpu")))
            launches += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"ran {launches} launches of {len(seen)} programs")
    return 0 if launches else 1


if __name__ == "__main__":
    raise SystemExit(main())
