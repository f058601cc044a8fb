"""The packaged CPU profile, so that tuning this machine does not change what a test runs."""

from mhc.profile import read_profile, save_profile


def without(kernels, target):
    """The CPU profile at ``target``, less the entries of ``kernels``: these run with their defaults there."""
    profile = read_profile("cpu")
    kept = type(profile.entries)(e for e in profile.entries if e.kernel not in kernels)
    save_profile(profile.model_copy(update={"entries": kept}), target)
    return target
