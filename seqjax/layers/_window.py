"""Causal attention over the last few positions, in blocks of the window's length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _halo
from seqjax.layers._attention import Rotary, all_finite, masked_softmax
from seqjax.layers._base import State, state_dtype
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class Window:
    """Attention of position t to the positions s with t - window < s <= t.

    Attributes:
      window: number of positions that a query sees, including its own.
      rotary: the rotary embedding.
      scale: factor of the scores.
    """

    window: int
    rotary: Rotary
    scale: float

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        """Attend from q [B, T, G, R, K] to k, v [B, T, G, K]; return o [B, T, G, R, K]."""
        reset, sequence_axis = context.reset, context.sequence_axis
        batch, length = q.shape[:2]
        past = self.window - 1
        if sequence_axis is not None:
            here = {"k": k, "v": v, "valid": jnp.ones((batch, length), jnp.bool_)}
            state = _halo.entering(state, here, reset, sequence_axis)
        # Segment number of each key: cached keys are segment 0, invalid ones -1.
        if reset is None:
            reset = jnp.zeros((batch, length), jnp.bool_)
        segment = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
        key_segment = jnp.concatenate([jnp.where(state["valid"], 0, -1), segment], axis=1)
        k, v = (
            jnp.concatenate(
                [jnp.where(state["valid"][..., None, None], state[n], 0).astype(z.dtype), z], axis=1
            )
            for n, z in (("k", k), ("v", v))
        )
        new_state = self._cache(k, v, key_segment, segment[:, -1:], state["k"].dtype)
        if sequence_axis is not None:
            new_state = _halo.leaving(new_state, sequence_axis)

        bad = ~(all_finite(k) & all_finite(v))
        bad_q = ~all_finite(q)
        bad = bad.at[:, past:].set(bad[:, past:] | bad_q)
        # Zeros instead of non-finite values keep 0 * NaN out of the products. `_blocks` sets NaN in
        # the outputs that see them.
        q = jnp.where(bad_q[..., None, None, None], 0, q)
        k, v = (jnp.where(bad[..., None, None], 0, z) for z in (k, v))

        # Under `jax.export` T may be a symbol.
        block = min(self.window, length) if isinstance(length, int) else self.window
        count = -(-length // block)
        padding = ((0, 0), (0, count * block - length))
        rows = jnp.arange(count)[:, None] * block + np.arange(past + block)

        def queries(z: jax.Array) -> jax.Array:
            padded = jnp.pad(z, padding + ((0, 0),) * (z.ndim - 2))
            return padded.reshape(batch, count, block, *z.shape[2:])

        def keys(z: jax.Array) -> jax.Array:
            return jnp.pad(z, padding + ((0, 0),) * (z.ndim - 2))[:, rows]

        same_segment = queries(segment)[..., None] == keys(key_segment)[:, :, None, :]
        o = self._blocks(queries(q), keys(k), keys(v), same_segment, keys(bad))
        return o.reshape(batch, count * block, *o.shape[3:])[:, :length], new_state

    def _cache(
        self,
        k: jax.Array,
        v: jax.Array,
        key_segment: jax.Array,
        last: jax.Array,
        dtype: jnp.dtype,
    ) -> State:
        """Return the last `window - 1` keys and values, zero in earlier segments."""
        start = k.shape[1] - (self.window - 1)
        valid = key_segment[:, start:] == last
        return {
            "k": jnp.where(valid[..., None, None], k[:, start:], 0).astype(dtype),
            "v": jnp.where(valid[..., None, None], v[:, start:], 0).astype(dtype),
            "valid": valid,
        }

    def _blocks(
        self, q: jax.Array, k: jax.Array, v: jax.Array, same_segment: jax.Array, bad: jax.Array
    ) -> jax.Array:
        """Attend from q [B, n, C, G, R, K] to k, v [B, n, window - 1 + C, G, K], block by block."""
        block, span = q.shape[2], k.shape[2]
        past = span - block
        ahead = np.arange(span)[None, :] - np.arange(block)[:, None]
        seen = same_segment & ((ahead >= 0) & (ahead <= past))
        wide = state_dtype(q.dtype)
        # Scores depend on differences of positions, so positions are counted inside a block.
        angles = self.rotary.angles(np.arange(span))
        cos, sin = (jnp.asarray(function(angles), wide) for function in (np.cos, np.sin))
        scores = jnp.einsum(
            "bnqgrd,bnkgd->bngrqk",
            self.rotary.rotate(q, cos[past:, None, None], sin[past:, None, None]),
            self.rotary.rotate(k, cos[:, None], sin[:, None]),
            preferred_element_type=wide,
        )
        weights = masked_softmax(scores * self.scale, seen[:, :, None, None]).astype(v.dtype)
        o = jnp.einsum("bngrqk,bnkgd->bnqgrd", weights, v)
        poisoned = jnp.any(seen & bad[:, :, None, :], axis=-1)
        # A selection, whose derivative keeps non-finite cotangents of these outputs away from the
        # other positions.
        return jnp.where(poisoned[..., None, None, None], jnp.nan, o)
