"""Limits of the GPU kernels, checked at trace time without importing Mosaic GPU."""

BLOCK_FEATURES = 128  # features of a thread block: one for each thread of a warpgroup
MULTIPROCESSORS = 132  # of an H100
COPY_BYTES = 16  # the copy engine requires rows whose size is a multiple of this


def whole_rows(width: int, itemsize: int) -> bool:
    """Return whether the copy engine supports rows of `width` numbers of `itemsize` bytes.

    >>> whole_rows(132, 4), whole_rows(132, 2)
    (True, False)
    """
    return width * itemsize % COPY_BYTES == 0
