"""Causal attention over all positions, with a cache of fixed capacity."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.layers import _halo
from seqjax.layers._attention import Rotary, all_finite, masked_softmax
from seqjax.layers._base import State, state_dtype
from seqjax.layers.context import Context

_BLOCK = 1024  # queries whose scores are in memory at the same time


@dataclasses.dataclass(frozen=True)
class Cache:
    """Attention of position t to all positions s <= t of its document.

    The cache holds arrays [B, capacity, G, K] by name, and `valid` [B, capacity] in addition. The
    first `rotary.dim` features of "k" are rotated before they enter the cache.

    Attributes:
      capacity: number of positions of the cache.
      rotary: the rotary embedding.
      scale: factor of the scores.
    """

    capacity: int
    rotary: Rotary
    scale: float

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        """Attend from q [B, T, G, R, K] to k, v [B, T, G, K]; return o [B, T, G, R, K]."""
        return self.attend_cached(q, {"k": k, "v": v}, state, context, lambda z: (z["k"], z["v"]))

    def attend_cached(
        self,
        q: jax.Array,
        entries: dict[str, jax.Array],
        state: State,
        context: Context,
        read: Callable[[dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
    ) -> tuple[jax.Array, State]:
        """Attend from q [B, T, G, R, K] to keys and values that `read` makes of cached arrays.

        Args:
          q: the queries.
          entries: the arrays [B, T, ...] of this call that enter the cache, by name.
          state: the cache.
          context: the context of the call.
          read: function of the cached arrays and those of this call, [B, S, ...] with
            S = capacity + T, T for an empty cache, or capacity for one step, that returns
            k [B, S, G, K] and v [B, S, G, V].

        Returns:
          o [B, T, G, R, V] and the new cache.
        """
        batch, length = q.shape[:2]
        reset, axis = context.reset, context.sequence_axis
        if reset is None:
            reset = jnp.zeros((batch, length), jnp.bool_)
        first = jnp.zeros((), jnp.int32)  # time of this device's first query
        if axis is not None:
            first = lax.axis_index(axis) * length
            *gathered, reset = (
                lax.all_gather(z, axis, axis=1, tiled=True) for z in (*entries.values(), reset)
            )
            entries = dict(zip(entries, gathered, strict=True))
        total = reset.shape[1]
        time = jnp.arange(total, dtype=jnp.int32)
        # Time of the last reset up to each step; -1 where there is none in this call.
        last_reset = lax.cummax(jnp.where(reset, time, -1), axis=1)
        carried = jnp.sum(state["valid"], axis=1, dtype=jnp.int32)[:, None]
        position = time - last_reset + jnp.where(last_reset < 0, carried - 1, 0)
        wide = state_dtype(q.dtype)
        cos, sin = self.rotary.at(position, self.capacity, wide)
        keys = self.rotary.rotate(entries["k"], cos[:, :, None], sin[:, :, None])
        entries = entries | {"k": keys}

        def here(z: jax.Array) -> jax.Array:
            return z if axis is None else lax.dynamic_slice_in_dim(z, first, length, axis=1)

        q = self.rotary.rotate(q, here(cos)[:, :, None, None], here(sin)[:, :, None, None])
        cleared = None if context.reset is None else last_reset[:, -1:] >= 0
        new_state = self._write(
            entries, state, carried, cleared, last_reset[:, -1:], position[:, -1:]
        )
        if axis is not None:
            new_state = _halo.leaving(new_state, axis)
        elif isinstance(length, int) and length == 1:
            k, v = read({name: new_state[name].astype(z.dtype) for name, z in entries.items()})
            full = position >= self.capacity
            return self._attend_one(q, k, v, new_state["valid"], full), new_state

        # Keys: the cache, then this call. A cached key has the time -1 and belongs to the document
        # that no reset of this call has ended.
        if context.fresh:  # the cache is empty: without it, the work does not depend on its size
            everything, key_time, document = entries, time, last_reset
        else:
            cached = state["valid"]
            everything = {
                name: jnp.concatenate(
                    [jnp.where(cached[..., None, None], state[name], 0).astype(z.dtype), z], axis=1
                )
                for name, z in entries.items()
            }
            key_time = jnp.concatenate([jnp.full((self.capacity,), -1, jnp.int32), time])
            document = jnp.concatenate([jnp.where(cached, -1, -2), last_reset], axis=1)
        k, v = read(everything)
        bad_q = ~all_finite(q)
        bad = ~(all_finite(k) & all_finite(v))
        # Zeros instead of non-finite values keep 0 * NaN out of the products. `poisoned` sets NaN
        # in the outputs that see them.
        q = jnp.where(bad_q[..., None, None, None], 0, q)
        k, v = (jnp.where(bad[..., None, None], 0, z) for z in (k, v))
        poisoned = bad_q | (here(position) >= self.capacity)

        def block(args: tuple[jax.Array, ...]) -> jax.Array:
            q, own, time, poisoned = args
            seen = (document[:, None] == own[:, :, None]) & (key_time <= time[:, None])
            scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k, preferred_element_type=wide)
            weights = masked_softmax(scores * self.scale, seen[:, None, None]).astype(v.dtype)
            o = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v)
            poisoned = poisoned | jnp.any(seen & bad[:, None], axis=-1)
            # A selection, whose derivative keeps non-finite cotangents of these outputs away from
            # the other positions.
            return jnp.where(poisoned[..., None, None, None], jnp.nan, o)

        queries = (q, here(last_reset), first + jnp.arange(length, dtype=jnp.int32), poisoned)
        return _in_blocks(block, queries, length), new_state

    def _attend_one(
        self, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, full: jax.Array
    ) -> jax.Array:
        """Attend from one query to a cache that already has its key, without a copy of the cache.

        `full` [B, 1] tells where the cache had no room for the key.
        """
        seen = valid[:, None, None, None]
        wide = state_dtype(q.dtype)
        scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k, preferred_element_type=wide)
        weights = masked_softmax(scores * self.scale, seen).astype(v.dtype)
        o = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v)
        # A value that is not finite gives a sum that is not, even with a weight of 0.
        bad = jnp.any(seen & ~jnp.isfinite(scores), axis=(1, 2, 4)) | ~all_finite(o)
        return jnp.where((bad | full)[..., None, None, None], jnp.nan, o)

    def _write(
        self,
        entries: dict[str, jax.Array],
        state: State,
        carried: jax.Array,
        cleared: jax.Array | None,
        last_reset: jax.Array,
        position: jax.Array,
    ) -> State:
        """Write the last document's arrays behind those of the cache.

        The arrays [B, 1] are the number of cached positions, whether a reset clears them (None for
        no resets), the time of the last reset, and the last position.
        """
        first = carried if cleared is None else jnp.where(cleared, -last_reset, carried)
        slots = first + jnp.arange(entries["k"].shape[1], dtype=jnp.int32)
        slots = jnp.where(slots < 0, self.capacity, slots)  # out of bounds: not written

        def write(cache: jax.Array, new: jax.Array) -> jax.Array:
            if cleared is not None:
                cache = jnp.where(cleared[(..., *(None,) * (cache.ndim - 2))], 0, cache)
            put = jax.vmap(lambda cache, slots, new: cache.at[slots].set(new, mode="drop"))
            return put(cache, slots, new.astype(cache.dtype))

        return {
            **{name: write(state[name], new) for name, new in entries.items()},
            "valid": jnp.arange(self.capacity, dtype=jnp.int32) <= position,
        }


def _in_blocks(
    block: Callable[[tuple[jax.Array, ...]], jax.Array], queries: tuple[jax.Array, ...], length: int
) -> jax.Array:
    """Run `block` on arrays [B, T, ...] and a vector [T], a block of T at a time if T is large."""
    if not isinstance(length, int) or length <= _BLOCK:
        return block(queries)
    count = -(-length // _BLOCK)

    def cut(z: jax.Array) -> jax.Array:
        time = 0 if z.ndim == 1 else 1
        pad = [(0, 0)] * z.ndim
        pad[time] = (0, count * _BLOCK - length)
        z = jnp.pad(z, pad)
        z = z.reshape(*z.shape[:time], count, _BLOCK, *z.shape[time + 1 :])
        return jnp.moveaxis(z, time, 0)

    o = jnp.moveaxis(lax.map(jax.checkpoint(block), tuple(map(cut, queries))), 0, 1)
    return o.reshape(o.shape[0], count * _BLOCK, *o.shape[3:])[:, :length]
