"""``mhc-tune explain``: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from tuner.commands.options import Dtype, PackagedGPU

HELP = """Explain why a kernel runs with its configuration at a shape, how sure that is, how stale, and what other shapes get.

The choice is the one that `import mhc` makes, from the same profile; no GPU is needed. Exit code 1 where the entry that should serve was
tuned for another version of the kernel.
"""

EPILOG = """Examples:

  mhc-tune explain post_res 8192x4x2560  (with the profile of this machine)

  mhc-tune explain streams_grad 4096x4x7168 --gpu h100

  mhc-tune explain pre 1x8x4096 --profile out/h100.yaml --unseen 64x8x4096,8192x8x5120
"""


def explain(
    kernel: Annotated[str, typer.Argument(help="Kernel, as in --kernels.", metavar="KERNEL", show_default=False)],
    shape: Annotated[str, typer.Argument(help="Tokens, streams and channels.", metavar="TxnxC", show_default=False)],
    dtype: Dtype = "bfloat16",
    profile: Annotated[str | None, typer.Option(help="Profile, a path or a packaged name. Default: as `import mhc` here.")] = None,
    gpu: PackagedGPU = None,
    unseen: Annotated[str | None, typer.Option(help="Other shapes to show. Default: a few around.", metavar="TxnxC,..")] = None,
) -> None:
    from tuner.explain import ExplainRequest
    from tuner.explain import explain as run_explain

    raise typer.Exit(run_explain(ExplainRequest(kernel, shape, dtype, profile, gpu, unseen)))
