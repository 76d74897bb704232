"""Reads and writes of single rows of a block [rows, lanes] in VMEM, for any dtype.

Mosaic can address a single float32 row at any index, and packs the row into full registers. Rows
of 16-bit numbers share 32-bit words. They are therefore widened and narrowed in groups: the rows of
one tile at once, by way of a scratch array [group length, lanes] in the wide dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import pl


def row_reader(block: Any, wide: Any, base: Any, group_length: int) -> Callable[[Any], jax.Array]:
    """Return a function of r that reads row `base + r` of a block, as [1, lanes].

    `wide` is the scratch array, or None if the block has the wide dtype.
    """
    if wide is None:
        return lambda r: block[pl.ds(base + r, 1), :]
    wide[...] = block[pl.ds(base, group_length), :].astype(wide.dtype)
    return lambda r: wide[pl.ds(r, 1), :]


def write_row(block: Any, wide: Any, base: Any, r: Any, value: jax.Array) -> None:
    """Write row `base + r` of a block; call `flush_group` after the last row of a group."""
    if wide is None:
        block[pl.ds(base + r, 1), :] = value
    else:
        wide[pl.ds(r, 1), :] = value


def flush_group(block: Any, wide: Any, base: Any, group_length: int) -> None:
    """Narrow the rows that `write_row` has collected in `wide`, and write them to the block."""
    if wide is not None:
        block[pl.ds(base, group_length), :] = wide[...].astype(block.dtype)


def fold_rows(
    group_length: int,
    row: Callable[[Any, Any], Any],
    carry: Any,
    *,
    reverse: bool,
    unroll: bool,
) -> Any:
    """Fold `row(r, carry)` over the rows of a group.

    An unrolled loop lets the compiler overlap the rows. In interpret mode
    unrolling only makes the program longer.
    """
    if unroll:
        for r in range(group_length)[:: -1 if reverse else 1]:
            carry = row(r, carry)
        return carry

    def body(i: Any, carry: Any) -> Any:
        return row(group_length - 1 - i if reverse else i, carry)

    return lax.fori_loop(0, group_length, body, carry)


def groups_in_block(
    block: Any, block_length: int, length: int, group_length: int
) -> tuple[Any, Any]:
    """Return the number of groups in a block of time, and the valid rows from its start to T."""
    valid_rows = length - block * block_length
    if length % block_length == 0:
        return block_length // group_length, valid_rows
    present = jnp.minimum(valid_rows, block_length)
    return lax.div(present + group_length - 1, jnp.int32(group_length)), valid_rows


def reset_blocks(reset: jax.Array, block_length: int) -> jax.Array:
    """Convert [B, T] bool to integers [B, blocks, 1, block length], for blocks in SMEM."""
    batch, length = reset.shape
    blocks = -(-length // block_length)
    padded = jnp.pad(reset.astype(jnp.int32), ((0, 0), (0, blocks * block_length - length)))
    return padded.reshape(batch, blocks, 1, block_length)
