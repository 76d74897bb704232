"""SlidingWindowAttention: exact attention over the last few positions, in constant memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks, _halo, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads, split_heads
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class SlidingWindowAttention(Layer):
    """Causal softmax attention over a window (arXiv 2004.05150) with rotary positions (2104.09864).

        q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                              per head
        p_ts = softmax_s(<R_t q_t, R_s k_s> / sqrt(K)),   t - window < s <= t, no reset in (s, t]
        y_t = (sum_s p_ts v_s) W_o

    R_t rotates features j and j + K/2 by the angle t * rope_base^(-2j/K). Scores depend on t - s
    only. The state therefore holds keys before rotation, and positions are counted inside a block,
    which keeps angles small and exact for sequences of any length.

    Queries are processed in blocks of `window` against the keys that they can see, so memory grows
    as T * window. A position with a non-finite query, key or value turns every output that may
    attend to it into NaN. No other output or gradient changes.

    Departures: none of the dilated or global patterns of arXiv 2004.05150.

    Parameters: q_proj, k_proj, v_proj [dim, H * K], out_proj [H * K, dim].
    State: {"k", "v": [B, window - 1, H, K], "valid": [B, window - 1] bool}, oldest first.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = SlidingWindowAttention(dim=8, heads=2, window=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["k"].shape
      ((2, 5, 8), (2, 8), (2, 3, 2, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      window: number of positions that a query sees, including its own.
      head_dim: features per head K, even; by default dim / heads.
      rope_base: base of the rotary frequencies.
    """

    dim: int
    heads: int
    window: int
    head_dim: int | None = None
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        head_dim = _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.positive(self, window=self.window)
        _checks.require(
            self,
            head_dim % 2 == 0,
            f"`head_dim` must be even for rotary positions, got {head_dim}; pass head_dim.",
        )
        _checks.require(self, self.rope_base > 1, f"`rope_base` must be > 1, got {self.rope_base}.")

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        width = self.heads * self.key_dim
        inward = Param((self.dim, width), ("embed", "heads"), "weight", _init.fan_in_normal)
        return {
            "q_proj": inward,
            "k_proj": inward,
            "v_proj": inward,
            "out_proj": Param((width, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        shape = (batch_size, self.window - 1, self.heads, self.key_dim)
        return {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "valid": jnp.zeros(shape[:2], jnp.bool_),
        }

    def state_flops(self) -> int:
        return 4 * self.window * self.heads * self.key_dim  # scores and the weighted sum

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        batch, length, _ = x.shape
        past = self.window - 1
        q, k, v = (
            split_heads(dense(x, params[name]), self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
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
        new_state = self._cache(k, v, key_segment, segment[:, -1:])
        if sequence_axis is not None:
            new_state = _halo.leaving(new_state, sequence_axis)

        bad = ~(_finite(k) & _finite(v))
        bad_q = ~_finite(q)
        bad = bad.at[:, past:].set(bad[:, past:] | bad_q)
        # Zeros instead of non-finite values keep 0 * NaN out of the products. `_attend` sets NaN in
        # the outputs that see them.
        q = jnp.where(bad_q[..., None, None], 0, q)
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
        o = self._attend(queries(q), keys(k), keys(v), same_segment, keys(bad))
        o = o.reshape(batch, count * block, self.heads, self.key_dim)[:, :length]
        return dense(merge_heads(o), params["out_proj"]), new_state

    def _cache(self, k: jax.Array, v: jax.Array, key_segment: jax.Array, last: jax.Array) -> State:
        """Return the last `window - 1` keys and values, zero in earlier segments."""
        start = k.shape[1] - (self.window - 1)
        valid = key_segment[:, start:] == last
        wide = state_dtype(k.dtype)
        return {
            "k": jnp.where(valid[..., None, None], k[:, start:], 0).astype(wide),
            "v": jnp.where(valid[..., None, None], v[:, start:], 0).astype(wide),
            "valid": valid,
        }

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, same_segment: jax.Array, bad: jax.Array
    ) -> jax.Array:
        """Attend from q [B, n, C, H, K] to k, v [B, n, window - 1 + C, H, K], block by block."""
        block, span = q.shape[2], k.shape[2]
        past = span - block
        ahead = np.arange(span)[None, :] - np.arange(block)[:, None]
        seen = same_segment & ((ahead >= 0) & (ahead <= past))
        wide = state_dtype(q.dtype)
        scores = jnp.einsum(
            "bnqhd,bnkhd->bnhqk",
            self._rotate(q, np.arange(past, span)),
            self._rotate(k, np.arange(span)),
            preferred_element_type=wide,
        )
        scores = jnp.where(seen[:, :, None], scores * self.key_dim**-0.5, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        o = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, v)
        poisoned = jnp.any(seen & bad[:, :, None, :], axis=-1)
        return o + jnp.where(poisoned, jnp.nan, 0).astype(o.dtype)[..., None, None]

    def _rotate(self, x: jax.Array, positions: np.ndarray) -> jax.Array:
        """Apply the rotary embedding to x [B, n, L, H, K] at the positions [L]."""
        wide = state_dtype(x.dtype)
        half = self.key_dim // 2
        angles = positions[:, None] * self.rope_base ** (-np.arange(half) / half)
        cos = jnp.asarray(np.cos(angles), wide)[:, None, :]
        sin = jnp.asarray(np.sin(angles), wide)[:, None, :]
        first, second = jnp.split(x.astype(wide), 2, axis=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _finite(x: jax.Array) -> jax.Array:
    """Return whether all numbers at a position are finite: [B, L, H, K] -> [B, L]."""
    return jnp.all(jnp.isfinite(x), axis=(2, 3))
