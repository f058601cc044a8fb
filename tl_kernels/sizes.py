"""Sizes that programs are built with, beside those of the problem."""

from tl_kernels.spec import Problem


def vector_width(p: Problem) -> int:
    """Stream elements in one 16-byte access."""
    return 16 // p.itemsize


def ceildiv(a: int, b: int) -> int:
    return -(-a // b)
