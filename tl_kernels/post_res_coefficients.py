"""``coefficients_bwd`` but for H_pre, whose gradient is made later (tl_kernels/pre_streams_grad.py)."""

from tl_kernels import reference
from tl_kernels.coefficients import build_bwd, coefficients_bwd
from tl_kernels.spec import Kernel


def build(p, cfg):
    return build_bwd(p, cfg, pre=False)


post_res_coefficients_bwd = Kernel(
    name="post_res_coefficients_bwd",
    build=build,
    inputs=coefficients_bwd.inputs[1:],
    outputs=coefficients_bwd.outputs,
    space=coefficients_bwd.space,
    default=coefficients_bwd.default,
    invalid=coefficients_bwd.invalid,
    least_arch=90,
    last_arch=90,
    shortcut=True,
    reference=reference.post_res_coefficients_bwd,
    options=coefficients_bwd.options,
    pass_configs=coefficients_bwd.pass_configs,
)
