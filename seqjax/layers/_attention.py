"""Functions that windowed and full attention share: rotary positions and a masked softmax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers._base import state_dtype

_FINE = 512  # positions of the fine table


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotation of the features j and j + dim/2 of the first `dim` features (arXiv 2104.09864).

    The angle at position t is t * base^(-2j/dim). Other features are unchanged.

    Attributes:
      dim: number of rotated features, even; 0 for no rotation.
      base: base of the frequencies.
    """

    dim: int
    base: float

    def angles(self, positions: np.ndarray) -> np.ndarray:
        """Return the angles [..., dim/2] in float64."""
        half = self.dim // 2
        return positions[..., None] * self.base ** (-np.arange(half) / max(half, 1))

    def rotate(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Rotate x [..., K] by angles with the cosines and sines [..., dim/2]."""
        if self.dim == 0:
            return x
        wide = x[..., : self.dim].astype(state_dtype(x.dtype))
        first, second = jnp.split(wide, 2, axis=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        rotated = [part.astype(x.dtype) for part in rotated]
        return jnp.concatenate([*rotated, x[..., self.dim :]], axis=-1)

    def at(self, positions: jax.Array, count: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines [..., dim/2] at positions from 0 to count - 1.

        A product of a position and a frequency in float32 loses bits of the angle at large
        positions. Here the angle is the sum of two, whose cosines and sines come from float64
        tables: one of the positions modulo 512 and one of the multiples of 512.
        """

        def table(positions: np.ndarray, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            angles = self.angles(positions)
            cos, sin = (jnp.asarray(f(angles), dtype) for f in (np.cos, np.sin))
            return tuple(jnp.take(t, index, axis=0, mode="clip") for t in (cos, sin))  # type: ignore[return-value]

        coarse = np.arange(-(-count // _FINE)) * _FINE
        cos_a, sin_a = table(coarse, positions // _FINE)
        cos_b, sin_b = table(np.arange(_FINE), positions % _FINE)
        return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


def all_finite(x: jax.Array) -> jax.Array:
    """Return whether all numbers at a position are finite: [B, L, ...] -> [B, L]."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim)))


def masked_softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Return the softmax over the last axis with weight 0 where `seen` is False."""
    return jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
