"""How many instructions turn a pair of bfloat16 into two float32, the knob ``widen``.

CUDA's ``__bfloat1622float2``, which TileLang writes for it, takes the halves apart and shifts each: three. A shift of both for the lower
half and a mask for the upper one are two, with the same bits. nvcc makes them only of a word of 32 bits, which a TileLang program cannot
ask for, so the program brings a function along. The CPU target leaves that out (tl_kernels/cpu.py).
"""

from tl_kernels.spec import Config, Problem

_TWO = """
#include <cuda_bf16.h>
static __device__ __forceinline__ float2 widen_pair(__nv_bfloat162 pair) {
  const unsigned word = reinterpret_cast<const unsigned&>(pair);
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
#define __bfloat1622float2 widen_pair
"""


def widths(p: Problem) -> tuple[int, ...]:
    """What the knob may be."""
    return (3, 2) if p.dtype == "bfloat16" else (3,)


def widen(cfg: Config) -> str | None:
    """For ``T.import_source``."""
    return _TWO if cfg["widen"] == 2 else None
