"""The rewrite for the CPU target: TVM's JSON of a function is internal to the pinned TileLang, so its effect is pinned here."""

import tilelang

from tl_kernels import KERNELS, NAMES
from tl_kernels.cpu import to_cpu


def test_tilelang_is_the_pinned_release():
    assert tilelang.__version__.startswith("0.1.15")


def test_no_gpu_scope_or_bfloat16_is_left():
    for name in NAMES:
        kernel = KERNELS[name]
        p = kernel.problem(4, 256)
        before = kernel.build(p, kernel.default(p))
        after = to_cpu(before).script()
        for word in ("local.fragment", "shared.dyn", "bfloat16", "T.parallel", "layout_map"):
            assert word not in after, (name, word)
        assert before.script() == kernel.build(p, kernel.default(p)).script(), "the rewrite changed its input"
