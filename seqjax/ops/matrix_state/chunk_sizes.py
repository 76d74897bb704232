"""Sizes of chunks and of blocks of chunks, by platform."""

from typing import NamedTuple


class PlatformSizes(NamedTuple):
    """Sizes of the chunked algorithm for a kind of platform.

    Attributes:
      products: number of matmuls of a kind that run at once.
      steps: the default number of steps in a chunk.
      factored: whether the loop over chunks uses the factors of their maps, and matmuls have
        factors in bfloat16 if all inputs do.
    """

    products: int
    steps: int
    factored: bool


# Enough matmuls for two cores, and few enough for their caches.
CPU = PlatformSizes(products=16, steps=64, factored=False)
# Enough matmuls for the 132 multiprocessors of an H100; more take more memory for little speed.
ACCELERATOR = PlatformSizes(products=1024, steps=64, factored=True)


class Division(NamedTuple):
    """Division of T steps into blocks of chunks.

    Attributes:
      size: C, the steps in a chunk.
      blocks: number of blocks, one after the other.
      at_once: chunks in a block.
      log_depth: whether the chunks are combined in log depth.
      factored: whether the loop over chunks uses the factors of their maps.
      mixed: whether the factors of matmuls stay in bfloat16.
    """

    size: int
    blocks: int
    at_once: int
    log_depth: bool
    factored: bool
    mixed: bool


def divide(
    algorithm: str,
    platform: PlatformSizes,
    shape: tuple[int, ...],
    chunk_size: int | None,
    narrow: bool,
) -> Division | None:
    """Return the division for inputs [B, T, H, ...], or None for the sequential algorithm.

    "associative" computes all chunks at once. Otherwise `platform.products` bounds the number of
    chunks that are computed at once, and so the memory. `narrow` is true for bfloat16 inputs.
    """
    if algorithm == "sequential":
        return None
    batch, length, heads = shape[:3]
    # Treat symbolic sizes, under `jax.export`, as large ones.
    known, log_depth = isinstance(length, int), algorithm == "associative"
    steps = chunk_size or platform.steps
    size = 1 << ((min(steps, length) if known else steps) - 1).bit_length()
    count = -(-length // size)
    products = batch * heads if isinstance(batch, int) else platform.products
    # A single chunk has no loop: the forms are equal, and are traced once.
    factored = platform.factored and not log_depth and not (known and count == 1)
    mixed = platform.factored and narrow
    if log_depth or (known and products * count <= 2 * platform.products):
        return Division(size, 1, count, log_depth, factored, mixed)
    at_once = max(1, platform.products // products)
    blocks = -(-count // at_once)
    return Division(
        size, blocks, -(-count // blocks) if known else at_once, log_depth, factored, mixed
    )
