"""Manifold-Constrained Hyper-Connections (arXiv 2512.24880): modules and operators over TileLang kernels tuned per GPU.

``HyperConnection`` wraps a layer, ``chain`` runs a list of them, ``expand`` and ``HyperHead`` (or ``reduce_mean``, ``reduce_sum``) stand at
the two ends of the model, ``load_profile`` picks a tuned profile by path or name, ``load_bundle`` a folder of compiled kernels,
``warm_up`` compiles a model's kernels side by side, ``use_backend`` picks an implementation; ``convert`` has converters of checkpoints,
``stability`` measures of H_res. The operators are in ``torch.ops.mhc``. Importing this package does not import TileLang; the first kernel
call does, unless a bundle has the kernel.
"""

from mhc import convert, ops, stability
from mhc.backend import use_backend
from mhc.bundle import BundleError, load_bundle
from mhc.chain import chain
from mhc.head import HyperHead, reduce_mean, reduce_sum
from mhc.module import Context, HyperConnection, expand
from mhc.profile import ProfileError, load_profile, read_profile
from mhc.warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "Context",
    "HyperConnection",
    "HyperHead",
    "ProfileError",
    "chain",
    "convert",
    "expand",
    "load_bundle",
    "load_profile",
    "ops",
    "read_profile",
    "reduce_mean",
    "reduce_sum",
    "stability",
    "use_backend",
    "warm_up",
]
