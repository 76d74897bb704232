"""Lower bounds of decays that grow with depth, shared by the blocks of a backbone (HGRN).

All L layers that have bounds together have the parameters p [L, N], in the order of their calls. A
block may have several such layers. The bound of layer l is the sum of softmax(p) over the layers 1
to l, with the softmax over depth. The first layer's bound is 0. With equal parameters layer l has
the bound l / L.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _init
from seqjax.layers._base import Param
from seqjax.layers.context import Context


def declare(width: int) -> Param:
    """Return the declaration of the layer's row of p, [width]."""
    return Param((width,), ("state",), "recurrence", _init.zeros)


def names(width: int) -> tuple[str, str]:
    """Return the names of two shared values: p, and the number of layers that have run."""
    return f"lower_bounds_{width}", f"lower_bound_blocks_{width}"


def initial_values(width: int) -> dict[str, jax.Array]:
    """Return the number of layers before the first one, for `Layer.make_values`."""
    return {names(width)[1]: jnp.zeros((), jnp.int32)}


def visible_params(row: jax.Array) -> dict[str, list[jax.Array]]:
    """Return the layer's row of p by the name of the value, for `Layer.visible_params`."""
    return {names(row.shape[-1])[0]: [row]}


def room_above(width: int, dtype: Any, context: Context) -> jax.Array:
    """Return 1 - bound of this layer, [1, 1, width], and count the layer.

    Outside a backbone the bound is 0.
    """
    rows, count = names(width)
    if rows not in context.values:
        return jnp.ones((1, 1, width), dtype)
    layer = context.values[count]
    context.values[count] = layer + 1
    shares = jax.nn.softmax(context.values[rows].astype(dtype), axis=0)
    # The sum of what is above the bound, because 1 - bound has no digits left for bounds near 1.
    index = jnp.arange(shares.shape[0])
    above = (index == 0) | (index > layer)
    room = jnp.sum(jnp.where(above[:, None], shares, 0), axis=0)
    return jnp.where(layer == 0, jnp.ones_like(room), room)[None, None]
