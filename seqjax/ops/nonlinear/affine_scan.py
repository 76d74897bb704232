"""Solver for the linear recurrence of a Newton step, h_t = J_t h_{t-1} + r_t over [B, T].

J may have any structure. A diagonal J is the elementwise recurrence. Blocks of k coupled numbers
are [..., G, k, k]; a dense Jacobian is a single block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import backends, jax_compat, sequence_parallel
from seqjax.ops.core.linalg import matmul
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
    cut = jnp.zeros(r.shape[:2], bool) if reset is None else reset
    J, r, cut = jax_compat.match_varying(J, r, cut)

    def blocks(h0: jax.Array, r: jax.Array = r) -> tuple[jax.Array, jax.Array]:
        # On CPU T sequential steps are faster than log2(T) sweeps over all blocks.
        h = backends.by_platform(_blocks, "sequential", "associative", J, r, cut, h0)
        return h, h[:, -1]

    zero = jnp.zeros_like(r[:, 0])
    if sequence_axis is None:
        return blocks(zero)[0][..., 0]
    identity = jnp.broadcast_to(jnp.eye(J.shape[-1], dtype=J.dtype), J[:, 0].shape)
    _, transition = blocks(identity, jnp.zeros_like(J))
    h, _ = sequence_parallel.run_split(blocks, transition, zero, reset, sequence_axis, apply=matmul)
    return h[..., 0]


def _blocks(algorithm: str, J: jax.Array, r: jax.Array, cut: jax.Array, h0: jax.Array) -> jax.Array:
    """Solve for J [B, T, G, k, k], r [B, T, G, k, c], cut [B, T] and h0 [B, G, k, c].

    Return h [B, T, G, k, c].
    """
    J, r, cut = (jnp.moveaxis(x, 1, 0) for x in (J, r, cut))
    cut = cut[..., None, None, None]
    J = jnp.where(cut, jnp.zeros_like(J), J)

    def onward(J: jax.Array, h: jax.Array, cut: jax.Array) -> jax.Array:
        return matmul(J, jnp.where(cut, jnp.zeros_like(h), h))  # selected: h may not be finite

    if algorithm == "sequential":

        def step(h: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
            J, r, cut = inputs
            h = onward(J, h, cut) + r
            return h, h

        _, h0, _ = jax_compat.match_varying(r[0], h0, J[0])
        h = lax.scan(step, h0, (J, r, cut))[1]
    else:

        def combine(early: Any, late: Any) -> Any:
            J, r, cut = late
            return onward(J, early[0], cut), onward(J, early[1], cut) + r, early[2] | cut

        product, own, any_cut = lax.associative_scan(combine, (J, r, cut))
        h = onward(product, h0[None], any_cut) + own
    return jnp.moveaxis(h, 0, 1)


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
