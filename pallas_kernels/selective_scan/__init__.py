"""The selective scan of Mamba."""

ROWS = 64  # of time in a block: the backward pass holds two states of each of them in VMEM
GPU_STATES = 16  # N on GPU, at most: the backward pass has those of 8 steps in registers


def border_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the states before each block of time, which the forward pass leaves to the backward one.

    >>> border_shape((8, 4096, 2048, 16))  # B, T, D, N
    (8, 64, 16, 2048)
    """
    batch, length, width, states = shape
    return batch, -(-length // ROWS), states, width
