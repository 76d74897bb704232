"""Lower bounds of decays that grow with depth, shared by the blocks of a backbone (HGRN)."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _init
from seqjax.layers._base import Param
from seqjax.layers.context import Context


def declare(width: int) -> Param:
    """Return the declaration of the block's share of the bounds, [width]."""
    return Param((width,), ("state",), "recurrence", _init.zeros)


def value_name(width: int) -> str:
    """Return the name of the shared value for layers with `width` channels."""
    return f"room_above_lower_bound_{width}"


def initial_values(width: int, dtype: Any) -> dict[str, jax.Array]:
    """Return 1 - bound before the first block, [1, 1, width], for `Layer.make_values`."""
    return {value_name(width): jnp.ones((1, 1, width), dtype)}


def room_above(share: jax.Array, dtype: Any, context: Context) -> jax.Array:
    """Return 1 - bound of this block, [1, 1, width], and store it for the next block.

    The first block's bound is 0. Every later block multiplies 1 - bound by
    1 - sigmoid(share - log(depth - block)), so that bounds grow and stay below 1. With all shares
    0, block l of L has the bound l / L.
    """
    name = value_name(share.shape[0])
    share = share.astype(dtype)[None, None]
    before = context.values.get(name, jnp.ones_like(share)).astype(dtype)
    later_blocks = jnp.asarray(context.depth - context.block, dtype)
    taken = jax.nn.sigmoid(share - jnp.log(later_blocks))
    room = before * jnp.where(jnp.asarray(context.block) == 0, jnp.ones_like(taken), 1 - taken)
    if name in context.values:
        context.values[name] = room
    return room
