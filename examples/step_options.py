"""The command line of step_time.py: options, their defaults and what can be wrong with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from step_model import VARIANTS, Shape

from tl_kernels.spec import MAX_N
from tuner.errors import one_line

TINY = {"layers": 2, "dim": 64, "heads": 4, "head_dim": 16, "ffn": 128, "batch": 2, "seq": 32}
SIZES = {
    "layers": "transformer blocks, each with two hyper-connections",
    "dim": "channels C",
    "heads": "attention heads",
    "head_dim": "channels of a head",
    "ffn": "width of the SwiGLU, which stands in for the active experts",
    "batch": "sequences a step",
    "seq": "tokens of a sequence",
}
ROUNDS = {"cuda": 40, "cpu": 7}


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Every option checked; sizes, rounds, variants (a list) and device (a torch.device) as they are to be used."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = {field.name: field.default for field in fields(Shape)}
    for name, text in SIZES.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, metavar="N", help=f"{text}; default {default[name]}, with --tiny {TINY[name]}")
    parser.add_argument("--n", type=int, default=default["n"], metavar="N", help="streams, default %(default)s")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; those given beside it count")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="what to time, plain among it, default %(default)s")
    parser.add_argument("--compile", action="store_true", help="time everything once more with every block under torch.compile")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"samples of each, default {ROUNDS['cuda']}, on a CPU {ROUNDS['cpu']}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs, default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu, default %(default)s")
    parser.add_argument("--profile", help="tuned profile: a YAML path or a packaged name; default: MHC_PROFILE, else the device's own")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default results/<profile's name of the device>/step_time")
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: got {args.device}: {one_line(error)}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {args.device}, wanted cpu or cuda, which the kernels run on")
    if args.device.type == "cuda" and (args.device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device: got {args.device}, but torch finds {torch.cuda.device_count()} CUDA GPUs")
    if args.device.type == "cpu" and not args.tiny and all(getattr(args, name) is None for name in SIZES):
        parser.error("--device: got cpu, but the default sizes are a GPU's; wanted --tiny, or sizes of your own")
    for name in SIZES:
        if getattr(args, name) is None:
            setattr(args, name, TINY[name] if args.tiny else default[name])
    if args.rounds is None:
        args.rounds = ROUNDS[args.device.type]
    for name in (*SIZES, "n", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, wanted 1 or more")
    if args.n > MAX_N:
        parser.error(f"--n: got {args.n}, wanted 1..{MAX_N} streams")
    named = [name.strip() for name in args.variants.split(",")]
    if "plain" not in named or not set(named) <= set(VARIANTS):
        parser.error(f"--variants: got {args.variants}, wanted plain and of mhc, formulas what to compare with it")
    args.variants = [name for name in VARIANTS if name in named]
    return args
