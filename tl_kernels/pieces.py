"""How the threads of a block share a tile of phi that passes through their registers."""

from tl_kernels.mma import padded
from tl_kernels.spec import Problem


def pieces(p: Problem, columns: int, threads: int) -> tuple[int, int]:
    """Rows of the tile, M or a few more, and the floats of one access, so that every thread loads equally many."""
    sizes = ((rows, wide) for rows in (p.M, padded(p.M, 16)) for wide in (4, 2, 1))
    return next((rows, wide) for rows, wide in sizes if rows * columns % (threads * wide) == 0)
