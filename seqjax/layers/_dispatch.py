"""Sorting of the positions of a sequence into blocks, each for one expert."""

import jax
import jax.numpy as jnp

_ROUND = 8  # multiple of the rows of larger blocks
_ROWS = 16  # rows of a block if the number of positions is unknown


def plan(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Assign the choices of a sequence to rows of blocks, so that a block has one expert.

    The blocks of an expert follow each other, and its last block is filled up with rows that are
    not valid. As many blocks as needed in the worst case exist for every choice.

    Args:
      chosen: [T, k] indices of experts.
      experts: the number of experts E.

    Returns:
      `(position, valid, owner, slot)`: for each row of n blocks its position, [n, C] integers, and
      whether it is valid, [n, C] bool; the expert of each block, [n]; and the row of each choice,
      [T, k], counted over all blocks.
    """
    length, top_k = chosen.shape
    count = length * top_k
    flat = chosen.reshape(count)
    known = isinstance(count, int)
    if known and count <= experts:  # a block for each choice
        slot = jnp.arange(count, dtype=jnp.int32)
        return (
            (slot // top_k)[:, None],
            jnp.ones((count, 1), jnp.bool_),
            flat,
            slot.reshape(length, top_k),
        )
    size = -(-count // experts) if known else _ROWS
    size = size if size <= _ROUND else -(-size // _ROUND) * _ROUND
    blocks = (count + experts * (size - 1)) // size

    def indices(stop: int) -> jax.Array:
        return jnp.arange(stop, dtype=jnp.int32)

    order = jnp.argsort(flat).astype(jnp.int32)
    rank = jnp.argsort(order).astype(jnp.int32)
    held = jnp.sum(flat[:, None] == indices(experts), axis=0, dtype=jnp.int32)
    start = jnp.cumsum(held) - held
    filled = -(-held // size)  # blocks of each expert
    ends = jnp.cumsum(filled)
    first = ends - filled
    block = indices(blocks)
    # Blocks after the last one that is needed belong to the last expert, and have no valid row.
    owner = jnp.sum(ends <= block[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, experts - 1)
    inside = ((block - first[owner]) * size)[:, None] + indices(size)
    valid = inside < held[owner][:, None]
    row = jnp.where(valid, start[owner][:, None] + inside, 0)
    slot = first[flat] * size + rank - start[flat]
    return order[row] // top_k, valid, owner, slot.reshape(length, top_k)
