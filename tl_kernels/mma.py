"""Multiplying on tensor cores without losing fp32: what the programs with a ``T.gemm`` share.

A float32 operand is the sum of a high and a low part that the MMA takes exactly (bfloat16 streams: bf16 parts, 2^-17 relative; fp16 and
fp32 streams: tf32 parts, 2^-21); bfloat16 x feeds the MMA as it is.
"""

import tilelang.language as T

from tl_kernels.sizes import ceildiv, vector_width

ACC = "float32"


def mma_dtype(p):
    """Operand dtype: bf16 for bf16 streams, else tf32 (declared float32)."""
    return "bfloat16" if p.dtype == "bfloat16" else ACC


def x_parts(p):
    """How many parts x needs: 16-bit streams are exact in one."""
    return 2 if p.dtype == "float32" else 1


def padded(size, to):
    """The next multiple of ``to``."""
    return ceildiv(size, to) * to


def high(value, dtype):
    """The part of a float32 that an MMA of ``dtype`` takes exactly."""
    if dtype == "bfloat16":
        return T.cast(value, dtype)
    return T.reinterpret(T.bitwise_and(T.reinterpret(value, "uint32"), T.uint32(0xFFFFE000)), "float32")


def low(value, dtype):
    """What :func:`high` leaves of a float32, rounded to ``dtype``."""
    return T.cast(value - T.cast(high(value, dtype), ACC), dtype)


def can_stage(p):
    """Whether rows of x start on 16 bytes, which an asynchronous copy needs."""
    return p.C % vector_width(p) == 0
