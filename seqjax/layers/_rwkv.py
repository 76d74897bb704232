"""Initial values, checks and mixtures of inputs that the layers of RWKV share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks
from seqjax.layers._base import Initializer, Param, state_dtype


def check_layer_index(layer: Any) -> None:
    """Raise unless the fields of a layer satisfy 0 <= layer < depth."""
    _checks.positive(layer, depth=layer.depth)
    _checks.require(
        layer,
        isinstance(layer.layer, int) and 0 <= layer.layer < layer.depth,
        f"`layer` must satisfy 0 <= layer < depth, got layer={layer.layer}, depth={layer.depth}.",
    )


def depth_ratios(layer: Any) -> tuple[float, float]:
    """Return l / (L - 1) and 1 - l / L for block l = `layer` of L = `depth` blocks."""
    return layer.layer / max(layer.depth - 1, 1), 1 - layer.layer / layer.depth


def per_channel(values: Callable[[jax.Array], jax.Array]) -> Initializer:
    """Return an initializer that computes the values from the channels' indices 0 .. D - 1."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        return jnp.broadcast_to(values(jnp.arange(shape[-1], dtype=dtype)), shape)

    return init


def declare_share(dim: int, power: float, offset: float = 0.0, present: bool = False) -> Param:
    """Declare the share [D] of the previous or the present input.

    The share of the present input starts at (i / D)^power + offset for channel i.
    """

    def start_of(i: jax.Array) -> jax.Array:
        share = (i / dim) ** power + offset
        return share if present else 1 - share

    start = per_channel(start_of)
    return Param((dim,), ("embed",), "bias", start)


def mix(x: jax.Array, previous: jax.Array, share: jax.Array, present: bool = False) -> jax.Array:
    """Return x_t + share * (x_{t-1} - x_t), rounded once to the dtype of `x`.

    With `present`, `share` is that of x_t instead.
    """
    if present:
        x, previous = previous, x
    now, before = (z.astype(state_dtype(x.dtype)) for z in (x, previous))
    return (now + (before - now) * share.astype(now.dtype)).astype(x.dtype)


def low_rank_start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw an orthogonal matrix [in, out] times 0.1, and times sqrt(in / out) if in > out."""
    gain = 0.1 * max(shape[0] / shape[1], 1.0) ** 0.5
    return jax.nn.initializers.orthogonal(gain)(key, shape, dtype)
