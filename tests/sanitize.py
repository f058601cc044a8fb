"""Launch the programs of a profile once each, for NVIDIA's compute-sanitizer, which pytest and a reference would keep busy for minutes:

    compute-sanitizer --tool memcheck  --kernel-name kernel_substring=_kernel python -m tests.sanitize streams_grad project_parts
    compute-sanitizer --tool racecheck --kernel-name kernel_substring=_kernel python -m tests.sanitize --C 2560 --n 4,8
    compute-sanitizer --tool memcheck  --kernel-name kernel_substring=_kernel python -m tests.sanitize --seeds project_pre

What is printed last is what ran. Inputs are made on the CPU: every kernel of PyTorch's that is loaded costs the sanitizer time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from mhc.profile import read_profile
from tl_kernels import KERNELS, NAMES
from tl_kernels.launch import device_arch, get_launcher
from tl_kernels.spec import Config, Kernel, Problem
from tuner.inputs import make_inputs


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def programs(options: argparse.Namespace) -> Iterator[tuple[Kernel, Problem, Config]]:
    """The profile's, or with ``--seeds`` what a search of the kernels begins with, whether or not the profile has it."""
    names = options.kernels or NAMES
    if options.seeds:
        for kernel in (KERNELS[name] for name in names):
            for p in (kernel.problem(n, C) for n in options.n for C in options.C):
                yield from ((kernel, p, cfg) for cfg in kernel.seeds if kernel.invalid(p, cfg) is None)
        return
    for entry in read_profile(options.profile).entries:
        if entry.n in options.n and entry.C in options.C and entry.kernel in names:
            kernel = KERNELS[entry.kernel]
            yield kernel, kernel.problem(entry.n, entry.C, entry.dtype), dict(entry.config)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kernels", nargs="*", help="kernels; default: all of the profile")
    parser.add_argument("--profile", default="h100", help="profile, a path or a packaged name")
    parser.add_argument("--seeds", action="store_true", help="launch what a search begins with instead of what the profile has")
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
    for kernel, p, cfg in programs(options):
        chosen = (kernel, p, tuple(sorted(cfg.items())))
        if chosen in seen:
            continue
        seen.add(chosen)
        run = get_launcher(kernel, p, cfg, device_arch(device))
        for T in options.tokens:
            run(*(t.to(device) for t in make_inputs(kernel, p, T, 0, "cpu")))
            launches += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"ran {launches} launches of {len(seen)} programs")
    return 0 if launches else 1


if __name__ == "__main__":
    raise SystemExit(main())
