"""The TileLang programs of mHC, each with its spec. ``KERNELS`` maps a name to a :class:`~tl_kernels.spec.Kernel`.

Importing a program imports TileLang, unless that was put off (tl_kernels/deferred.py); importing this package does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tl_kernels import deferred
from tl_kernels.spec import Kernel

#: The steps of the paper, in the order a boundary runs them; a backward stands in its forward's file.
STEPS = tuple(name + suffix for name in ("project", "activate", "sinkhorn", "pre", "post_res") for suffix in ("", "_bwd"))
#: What the fused boundary runs beside ``pre`` and ``post_res``: forward, then backward. Each in the file of its name.
FUSED = (
    "project_parts",
    "post_res_project",
    "coefficients",
    "pre_grad",
    "coefficients_bwd",
    "streams_grad",
    "post_res_grads",
    "sum_parts",
)
#: Shortcuts of the fused boundary for problems they serve (``Kernel.unserved``), on Hopper and later; forward, then backward.
WHOLE = ("project_pre", "post_res_project_pre")
WHOLE_BWD = ("post_res_coefficients_bwd", "pre_streams_grad")
NAMES = STEPS + FUSED + WHOLE + WHOLE_BWD


class _Registry(Mapping[str, Kernel]):
    def __getitem__(self, name: str) -> Kernel:
        if name not in NAMES:
            raise KeyError(f"no kernel {name!r}; there are {', '.join(NAMES)}")
        return getattr(deferred.load(f"tl_kernels.{name.removesuffix('_bwd')}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


KERNELS: Mapping[str, Kernel] = _Registry()
