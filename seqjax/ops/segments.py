"""Resets for packed sequences."""

import jax
import jax.numpy as jnp

from seqjax.ops.core import explicit_mesh


@explicit_mesh.auto_inside(
    lambda arguments, _: explicit_mesh.joined(*explicit_mesh.spec_of(arguments["segment_ids"]))
)
def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """Mark the first step of every segment: a `reset` for packed sequences.

    reset[b, t] = (t == 0) or (segment_ids[b, t] != segment_ids[b, t - 1])

    A change of id starts a segment. Ids need not be sorted or consecutive, and padding (usually
    id 0) is a segment like any other. To continue the first segment from an earlier call, pass
    ``reset.at[:, 0].set(False)`` together with that call's final state.

    Args:
      segment_ids: [B, T] integers.

    Returns:
      [B, T] bool.

    Raises:
      ValueError: if `segment_ids` is not a [B, T] array of integers.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> seqjax.segment_starts(jnp.array([[1, 1, 2, 2, 0]])).astype(int).tolist()
      [[1, 0, 1, 0, 1]]
    """
    ids = jnp.asarray(segment_ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_starts: `segment_ids` must be integers of shape [B, T], "
            f"got {ids.dtype} of shape {list(ids.shape)}."
        )
    first = jnp.ones_like(ids[:, :1], dtype=bool)
    return jnp.concatenate([first, ids[:, 1:] != ids[:, :-1]], axis=1)
