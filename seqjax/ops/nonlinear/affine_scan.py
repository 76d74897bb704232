"""Solver for the linear recurrence of a Newton step, h_t = J_t h_{t-1} + r_t over [B, T].

J may have any structure. A diagonal J is the elementwise recurrence. Blocks of k coupled numbers
are [..., G, k, k]; a dense Jacobian is a single block.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, jax_compat, sequence_parallel
from seqjax.ops.elementwise.block_recurrence import apply_blocks, states
from seqjax.ops.elementwise.linear_recurrence import recurrence
from seqjax.ops.elementwise.xla_algorithms import ScanOptions


def affine_scan(
    J: jax.Array, r: jax.Array, reset: jax.Array | None, sequence_axis: str | None
) -> jax.Array:
    """Compute the states h_1 .. h_T from h_0 = 0.

    Args:
      J: [B, T, n] for a diagonal, else [B, T, G, k, k].
      r: [B, T, n], or [B, T, G, k].
      reset: [B, T] or None. J_t is ignored where `reset` is true.
      sequence_axis: the mesh axis over which T is split, or None.
    """
    if J.ndim == 3:
        zero = jnp.zeros_like(r[:, 0])

        def diagonal(h0: jax.Array, r: jax.Array = r) -> tuple[jax.Array, jax.Array]:
            return recurrence(J, r, h0, reset, ScanOptions(r.dtype))

        if sequence_axis is None:
            return diagonal(zero)[0]
        _, transition = diagonal(jnp.ones_like(zero), jnp.zeros_like(r))
        return sequence_parallel.run_split(diagonal, transition, zero, reset, sequence_axis)[0]

    r = r[..., None]
    J, r, reset = jax_compat.match_varying(J, r, reset)
    cuts = () if reset is None else (reset,)

    def by(algorithm: str, J: jax.Array, r: jax.Array, h0: jax.Array, *cuts: jax.Array) -> Any:
        cut = cuts[0] if cuts else None
        return states(J, r, h0, cut, algorithm=algorithm, chunk_size=r.shape[1])

    def blocks(h0: jax.Array, r: jax.Array = r) -> tuple[jax.Array, jax.Array]:
        # On CPU T sequential steps are faster than log2(T) sweeps over all blocks.
        operands = jax_compat.match_varying(J, r, h0)
        h = backends.by_platform(by, "sequential", "associative", *operands, *cuts)
        return h, h[:, -1]

    zero = jnp.zeros_like(r[:, 0])
    if sequence_axis is None:
        return blocks(zero)[0][..., 0]
    identity = jnp.broadcast_to(jnp.eye(J.shape[-1], dtype=J.dtype), J[:, 0].shape)
    _, transition = blocks(identity, jnp.zeros_like(J))
    h, _ = sequence_parallel.run_split(
        blocks, transition, zero, reset, sequence_axis, apply=apply_blocks
    )
    return h[..., 0]


def correction(
    J: jax.Array, gap: jax.Array, reset: jax.Array, sequence_axis: str | None
) -> jax.Array:
    """Compute d_t = J_t d_{t-1} + gap_t for states of any shape."""
    if J.ndim == gap.ndim == 3:  # diagonal
        return affine_scan(J, gap, reset, sequence_axis)
    if J.shape == gap.shape:  # the diagonal of a dense Jacobian
        flat = (*gap.shape[:2], -1)
        return affine_scan(J.reshape(flat), gap.reshape(flat), reset, sequence_axis).reshape(
            gap.shape
        )
    blocks = (*gap.shape[:2], *J.shape[2:4])
    return affine_scan(J, gap.reshape(blocks), reset, sequence_axis).reshape(gap.shape)
