"""Reductions of published recurrences to the matrix-state ops.

- `Rotation`: rotary position embeddings without a position in the state.
- `signs`: decays in [-1, 1], as signs of queries and keys.
- `place`: several updates for one token.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.layers._base import state_dtype
from seqjax.ops.core import sequence_parallel


class Rotation:
    """Rotation of queries and keys by position, counted from the start of each call.

    A product q_t . k_s of vectors that are rotated by their positions depends on t - s only, so
    positions may start anywhere. The keys in a state have the positions of the call that wrote
    them. `end` rotates the state back by the length of the call, and the state then carries no
    position.

    The angle t * frequency is computed modulo 2 pi in fixed-point arithmetic. In float32 it would
    lose digits at large t.
    """

    def __init__(
        self, frequencies: Iterable[float], x: jax.Array, sequence_axis: str | None
    ) -> None:
        """Compute the angles of one call.

        Args:
          frequencies: angle per step for each of the K / 2 pairs of features, in [0, 2 pi).
          x: [B, T, ...], for T and the dtype.
          sequence_axis: as in `Layer.apply`.
        """
        self._dtype = state_dtype(x.dtype)
        self._bits = 64 if self._dtype == jnp.float64 else 32
        unsigned = jnp.dtype(f"uint{self._bits}")
        turns = [round(f / (2 * math.pi) * 2**self._bits) for f in frequencies]
        fractions = jnp.asarray(turns, unsigned)
        steps = jnp.arange(x.shape[1], dtype=unsigned)
        length = steps[-1:] + jnp.asarray(1, unsigned)
        if sequence_axis is not None:
            steps = steps + length * lax.axis_index(sequence_axis).astype(unsigned)
            length = length * jnp.asarray(lax.axis_size(sequence_axis), unsigned)
        self._angles = self._radians(steps[:, None] * fractions)
        self._total = self._radians(length[:, None] * fractions)

    def _radians(self, fractions: jax.Array) -> jax.Array:
        """Convert fractions of a turn, integers modulo 2^bits, to angles in [-pi, pi)."""
        signed = lax.bitcast_convert_type(fractions, jnp.dtype(f"int{self._bits}"))
        return signed.astype(self._dtype) * (2 * math.pi / 2**self._bits)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rotate x [B, T, H, K]: feature i turns with feature i + K / 2."""
        return turn(x, self._angles[:, None, :])

    def end(self, memory: jax.Array) -> jax.Array:
        """Rotate the rows of a final state [B, H, K, V] back by the length of the call."""
        return turn(memory.mT, -self._total[0]).mT


def turn(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + K / 2) of x [..., K] by the angles [..., K / 2]."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def signs(negative: jax.Array, dtype: jnp.dtype, sequence_axis: str | None) -> jax.Array:
    """Return the product of the signs of all decays up to each step, +1 or -1.

    With a recurrence S_t = a_t S_{t-1} + k_t v_t^T and s_t the product of the signs of a_1 .. a_t,

        s_t S_t = |a_t| s_{t-1} S_{t-1} + (s_t k_t) v_t^T.

    So multiply q and k by s_t, decay by |a_t|, and multiply the final state by the last sign. The
    signs are counted exactly, and a reset needs nothing.

    Args:
      negative: [B, T, ...] bool, True where the decay is negative.
      dtype: dtype of the result.
      sequence_axis: as in `Layer.apply`.
    """
    counts = jnp.cumsum(negative, axis=1, dtype=jnp.int32)
    if sequence_axis is not None:
        before = sequence_parallel.combine_before(counts[:, -1:], jnp.add, sequence_axis)
        first = sequence_parallel.is_first(sequence_axis)
        counts = counts + jnp.where(first, jnp.zeros_like(before), before)
    return (1 - 2 * (counts & 1)).astype(dtype)


def last_step(x: jax.Array, sequence_axis: str | None) -> jax.Array:
    """Return x[:, -1] of the whole sequence, on every device."""
    last = x[:, -1]
    return last if sequence_axis is None else sequence_parallel.from_last(last, sequence_axis)


def at_substep(x: jax.Array, count: int, index: int) -> jax.Array:
    """Spread x [B, T, ...] to [B, T * count, ...]: sub-step `index` of each step, zeros elsewhere.

    A recurrence with `count` updates for one token runs on T * count steps, with

    - keys and values of all sub-steps;
    - the decay and the reset at the first sub-step;
    - the query at the last sub-step, after which the output is read.
    """
    spread = jnp.zeros((*x.shape[:2], count, *x.shape[2:]), x.dtype).at[:, :, index].set(x)
    return spread.reshape(x.shape[0], x.shape[1] * count, *x.shape[2:])
