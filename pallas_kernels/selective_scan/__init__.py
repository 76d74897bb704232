"""Kernels of Mamba's selective scan."""

BORDER_STEPS = 64  # between stored states: the TPU's backward pass has two states per step in VMEM
GPU_STATES = 16  # N on GPU, at most: the backward pass has the states of 8 steps in registers


def border_shape(shape: tuple[int, ...], steps: int = BORDER_STEPS) -> tuple[int, ...]:
    """Return the shape of the residuals: the states before each block of `steps` steps.

    >>> border_shape((8, 4096, 2048, 16))  # B, T, D, N
    (8, 64, 16, 2048)
    """
    batch, length, width, states = shape
    return batch, -(-length // steps), states, width
