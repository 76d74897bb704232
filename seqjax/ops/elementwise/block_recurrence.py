"""The recurrence h_t = A_t h_{t-1} + x_t with blocks A_t, in plain XLA, with a reverse rule.

Shapes: A [B|1, T|1, G, K, K], x [B, T, G, K, C], h0 [B, G, K, C], reset [B, T] or None. Where
`reset` is true, h_{t-1} is replaced by zero before the product (selected, not multiplied).

The cotangent of the states obeys the same recurrence, run the other way with transposed blocks:

    lambda_t = g_t + A_{t+1}^T lambda_{t+1}
    d x_t = lambda_t,    d A_t = lambda_t h_{t-1}^T,    d h_0 = A_1^T lambda_1

So the backward pass stores `A` and `h` only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core.checkpointed_scan import chunk_scan
from seqjax.ops.core.custom_adjoint import custom_adjoint
from seqjax.ops.core.linalg import matmul
from seqjax.types import Array

UNROLLED = 8  # the largest block whose product is a sum of elementwise products


def apply_blocks(A: Array, h: Array) -> Array:
    """Return A h for blocks [..., K, K] and states [..., K, C].

    XLA runs a product of many small matrices one by one on CPU. For small blocks a sum of K
    elementwise products is up to 6 times faster.
    """
    size = A.shape[-1]
    if size > UNROLLED:
        return matmul(A, h)
    total = A[..., :, 0, None] * h[..., 0, None, :]
    for j in range(1, size):
        total = total + A[..., :, j, None] * h[..., j, None, :]
    return total


def block_recurrence(
    A: Array,
    x: Array,
    h0: Array,
    reset: Array | None,
    *,
    algorithm: str,
    chunk_size: int,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Return the states h [B, T, G, K, C] and the final state, with the reverse rule above."""

    def forward(A: Array, x: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        h = states(A, x, h0, reset, algorithm=algorithm, chunk_size=chunk_size, reverse=reverse)
        return h, h[:, 0 if reverse else -1]

    def adjoint(args: Any, outputs: Any, _: Any, cotangents: Any) -> list[Array]:
        A, x, h0, reset = args
        dh, d_final = cotangents
        first, last = (slice(-1, None), slice(0, 1)) if reverse else (slice(0, 1), slice(-1, None))
        early, late = (slice(1, None), slice(0, -1)) if reverse else (slice(0, -1), slice(1, None))

        def in_order(early: Array, late: Array) -> Array:
            return jnp.concatenate([late, early] if reverse else [early, late], axis=1)

        def from_next(array: Array) -> Array:
            """Return the value of the next step; the last step, which has none, gets any."""
            return in_order(array[:, late], array[:, first])

        dx = states(
            (A if A.shape[1] == 1 else from_next(A)).mT,
            in_order(dh[:, early], dh[:, last] + d_final[:, None]),
            jnp.zeros_like(h0),
            # Before the last step the cotangent is zero. A reset there keeps it so.
            None if reset is None else in_order(reset[:, late], jnp.ones_like(reset[:, last])),
            algorithm=algorithm,
            chunk_size=chunk_size,
            reverse=not reverse,
        )
        before = unless_reset(reset, in_order(h0[:, None], outputs[0][:, early]))
        if A.shape[1] == 1:
            dA = jnp.einsum("btgic,btgjc->gij", dx, before, precision="highest")[None, None]
        elif A.shape[0] == 1:
            dA = jnp.einsum("btgic,btgjc->tgij", dx, before, precision="highest")[None]
        else:
            dA = jnp.einsum("btgic,btgjc->btgij", dx, before, precision="highest")
        begin = apply_blocks((A if A.shape[1] == 1 else A[:, first])[:, 0].mT, dx[:, first][:, 0])
        dh0 = unless_reset(None if reset is None else reset[:, first][:, 0], begin)
        return [_cast(ct, like) for ct, like in zip((dA, dx, dh0), (A, x, h0), strict=True)]

    run = custom_adjoint(forward, adjoint, with_residuals=lambda *args: (forward(*args), ()))
    return run(A, x, h0, reset)


def states(
    A: Array,
    x: Array,
    h0: Array,
    reset: Array | None,
    *,
    algorithm: str,
    chunk_size: int,
    reverse: bool = False,
) -> Array:
    """Return the states h [B, T, G, K, C] by an algorithm, with JAX's derivatives."""
    if algorithm == "sequential":
        return _sequential(A, x, h0, reset, reverse)
    constant = A.shape[1] == 1
    if reverse:
        x, A = jnp.flip(x, axis=1), A if constant else jnp.flip(A, axis=1)
        reset = None if reset is None else jnp.flip(reset, axis=1)
    length = x.shape[1]
    chunk_size = length if algorithm == "associative" else min(chunk_size, length)
    if constant:
        powers = [A[:, 0]]
        while 2 ** len(powers) < chunk_size:
            powers.append(matmul(powers[-1], powers[-1]))

        def advance(h: Array, block: Any) -> tuple[Array, Array]:
            return _doubled(powers, h, *block)

        xs: tuple[Any, ...] = (x, reset)
    else:

        def advance(h: Array, block: Any) -> tuple[Array, Array]:
            return _associative(h, *block)

        xs = (x, reset, A)
    if chunk_size == length:  # a single chunk
        _, h = advance(h0, jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), xs))
        h = jnp.moveaxis(h, 0, 1)
    else:
        h, _ = chunk_scan(advance, h0, xs, chunk_size)
    return jnp.flip(h, axis=1) if reverse else h


def unless_reset(reset: Array | None, h: Array) -> Array:
    """Replace states [..., G, K, C] by zero where `reset` is true. A product would keep NaN."""
    return h if reset is None else jnp.where(reset[..., None, None, None], jnp.zeros_like(h), h)


def _sequential(A: Array, x: Array, h0: Array, reset: Array | None, reverse: bool) -> Array:
    constant = A.shape[1] == 1

    def step(h: Array, inputs: Any) -> tuple[Array, Array]:
        A_t, x_t, cut = inputs
        A_t = A[:, 0] if constant else unless_reset(cut, A_t)
        h = apply_blocks(A_t, unless_reset(cut, h)) + x_t
        return h, h

    xs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (None if constant else A, x, reset))
    return jnp.moveaxis(lax.scan(step, h0, xs, reverse=reverse)[1], 0, 1)


def _associative(h0: Array, x: Array, reset: Array | None, A: Array) -> tuple[Array, Array]:
    """Run `lax.associative_scan` on a chunk, time first: A [t, B|1, G, K, K], x [t, B, G, K, C]."""
    A = unless_reset(reset, jnp.broadcast_to(A, (*x.shape[:2], *A.shape[2:])))

    def onward(A: Array, h: Array, reset: Array | None) -> Array:
        return apply_blocks(A, unless_reset(reset, h))

    def combine(early: Any, late: Any) -> Any:
        A, x, reset = late
        both = None if reset is None else early[2] | reset
        return onward(A, early[0], reset), onward(A, early[1], reset) + x, both

    product, own, any_reset = lax.associative_scan(combine, (A, x, reset))
    h = onward(product, h0[None], any_reset) + own
    return h[-1], h


def _doubled(powers: list[Array], h0: Array, x: Array, reset: Array | None) -> tuple[Array, Array]:
    """Run a chunk of a constant A, time first, with its powers A^1, A^2, A^4, ...

    After the pass with distance d, every step holds the sum over the last 2 d steps.
    """
    first = apply_blocks(powers[0], unless_reset(None if reset is None else reset[0], h0))
    h = x.at[0].add(first)
    blocked = reset  # whether a reset lies in the last `distance` steps
    for i, power in enumerate(powers):
        distance = 2**i
        if distance >= x.shape[0]:
            break
        later = None if blocked is None else blocked[distance:]
        h = h.at[distance:].add(apply_blocks(power, unless_reset(later, h[:-distance])))
        if blocked is not None:
            blocked = blocked.at[distance:].set(blocked[distance:] | blocked[:-distance])
    return h[-1], h


def _cast(cotangent: Array, like: Array) -> Array:
    """Cast a cotangent to the dtype of its argument; a real argument gets the real part."""
    if jnp.iscomplexobj(cotangent) and not jnp.iscomplexobj(like):
        cotangent = jnp.real(cotangent)
    return cotangent.astype(like.dtype)
