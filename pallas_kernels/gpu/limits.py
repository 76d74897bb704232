"""Limits of the GPU kernels, checked while tracing without importing Mosaic GPU."""

WIDTH = 128  # features of a thread block: the threads of a warpgroup
CORES = 132  # multiprocessors of an H100
ROW_BYTES = 16  # the copy engine takes rows of multiples of this


def whole_rows(width: int, itemsize: int) -> bool:
    """Return whether the copy engine takes rows of `width` numbers of `itemsize` bytes.

    >>> whole_rows(132, 4), whole_rows(132, 2)
    (True, False)
    """
    return width * itemsize % ROW_BYTES == 0
