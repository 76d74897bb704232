"""Queries and keys that groups of heads share: an axis of 1 in place of repeated arrays.

With G heads of queries and keys, and H = n G heads of values, head h uses group h // n. An array of
H heads becomes [..., G, n, F] and an array of G heads [..., G, 1, F]. Broadcasting then shares the
scores of a group, and nothing is repeated in memory.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Ungroup = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def group(
    arrays: Mapping[str, jax.Array], log_decay: jax.Array | None, state: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array | None, jax.Array, Ungroup]:
    """Split the axis of heads into groups; "q" has fewer heads than the state.

    Args:
      arrays: [B, T, G or H, F] by name.
      log_decay: [B, T, H, 1 or K] or None.
      state: [B, H, K, V].

    Returns:
      The arrays with their heads in groups, and a function that joins the heads of the outputs
      [B, T, G, n, V] and of the final state.
    """
    heads, groups = state.shape[1], arrays["q"].shape[2]

    def split(x: jax.Array, axis: int) -> jax.Array:
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        return x.reshape(*before, groups, x.shape[axis] // groups, *after)

    def ungroup(out: jax.Array, final: jax.Array) -> tuple[jax.Array, jax.Array]:
        return out.reshape(*out.shape[:2], heads, out.shape[-1]), final.reshape(state.shape)

    grouped = {name: split(x, 2) for name, x in arrays.items()}
    decay = None if log_decay is None else split(log_decay, 2)
    return grouped, decay, split(state, 1), ungroup


def repeat(x: jax.Array, heads: int) -> jax.Array:
    """Repeat the heads of x [B, T, G, ...]: head h of the result is head h // (H / G) of x."""
    groups = x.shape[2]
    return x if groups == heads else jnp.repeat(x, heads // groups, axis=2)
