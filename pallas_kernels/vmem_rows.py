"""Rows of a block in VMEM, one at a time, whatever their dtype.

A single row of [rows, lanes] float32 can be addressed at any index, and Mosaic packs it into full
registers. Rows of narrower numbers share their words: they are widened, and narrowed again, a
group at a time, a group being a tile of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.jax_compat import pl


def take(block: Any, wide: Any, base: Any, group: int) -> Callable[[Any], jax.Array]:
    """From r to row `base + r` of a block, as [1, lanes].

    `wide` is a scratch [group, lanes] of the wide dtype, or None if the block has it.
    """
    if wide is None:
        return lambda r: block[pl.ds(base + r, 1), :]
    wide[...] = block[pl.ds(base, group), :].astype(wide.dtype)
    return lambda r: wide[pl.ds(r, 1), :]


def put(block: Any, wide: Any, base: Any, r: Any, value: jax.Array) -> None:
    """Write row `base + r`; after the rows of a group, `close` it."""
    if wide is None:
        block[pl.ds(base + r, 1), :] = value
    else:
        wide[pl.ds(r, 1), :] = value


def close(block: Any, wide: Any, base: Any, group: int) -> None:
    """Write what `put` has gathered in `wide`."""
    if wide is not None:
        block[pl.ds(base, group), :] = wide[...].astype(block.dtype)


def each(
    group: int, row: Callable[[Any, Any], Any], carry: Any, *, reverse: bool, unroll: bool
) -> Any:
    """Fold `row(r, carry)` over the rows of a group.

    Unrolled the schedule overlaps them; interpreted nothing is gained by that but a long program.
    """
    if unroll:
        for r in range(group)[:: -1 if reverse else 1]:
            carry = row(r, carry)
        return carry
    return lax.fori_loop(0, group, lambda i, c: row(group - 1 - i if reverse else i, c), carry)


def groups(block: Any, rows: int, length: int, group: int) -> tuple[Any, Any]:
    """How many groups a block of time has, and how many rows are left from its first on."""
    left = length - block * rows
    if length % rows == 0:
        return rows // group, left
    return lax.div(jnp.minimum(left, rows) + group - 1, jnp.int32(group)), left


def scalars(reset: jax.Array, rows: int) -> jax.Array:
    """[B, T] bool as [B, blocks, 1, rows] numbers: blocks of any number of rows for SMEM."""
    batch, length = reset.shape
    blocks = -(-length // rows)
    padded = jnp.pad(reset.astype(jnp.int32), ((0, 0), (0, blocks * rows - length)))
    return padded.reshape(batch, blocks, 1, rows)
