"""Small matrices and their products, with float32 accuracy on every backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import jax_compat
from seqjax.ops.core.broadcast import along_rows

SUB = 16  # the size up to which a block is inverted without cutting it apart


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product with float32 accuracy; on TPU the default would round the factors to bfloat16."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def matmul_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T."""
    return jnp.einsum("...tk,...jk->...tj", a, b, precision=lax.Precision.HIGHEST)


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T: [..., K] and [..., V] -> [..., K, V]."""
    return jnp.einsum("...k,...v->...kv", a, b)


def read(state: jax.Array, key: jax.Array) -> jax.Array:
    """S^T k, for a single step: [..., K, V] and [..., K] -> [..., V]."""
    return jnp.einsum("...kv,...k->...v", state, key, precision=lax.Precision.HIGHEST)


@jax.custom_jvp
def inverse_unit_lower(n: jax.Array) -> jax.Array:
    """(I + N)^-1 for strictly lower triangular N [..., C, C], by halves.

    inv [[A, 0], [N, B]] = [[A', 0], [-B' N A', B']] with A', B' the inverses of the halves. Unlike
    the series in powers of N, no intermediate exceeds the result and its factors.
    """
    size = n.shape[-1]
    if size > SUB and size % 2 == 0:
        half = size // 2
        halves = inverse_unit_lower(jnp.stack([n[..., :half, :half], n[..., half:, half:]]))
        corner = -matmul(matmul(halves[1], n[..., half:, :half]), halves[0])
        top = jnp.concatenate([halves[0], jnp.zeros_like(corner)], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([corner, halves[1]], axis=-1)], axis=-2)
    # The same from below, without cutting small blocks apart: X is the inverse of the diagonal
    # blocks of size `width`, `links` what joins them in pairs.
    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=n.dtype), n.shape)
    # With the varying mesh axes of its tangent, also where size 1 adds nothing to the identity.
    inverse, _ = jax_compat.match_varying(inverse, n)
    width = 1
    while width < size:
        joined = (rows // (2 * width) == columns // (2 * width)) & (
            rows // width > columns // width
        )
        links = jnp.where(joined, n, jnp.zeros_like(n))
        inverse = inverse - matmul(matmul(inverse, links), inverse)
        width *= 2
    return inverse


@inverse_unit_lower.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> Any:
    inverse = inverse_unit_lower(primals[0])
    return inverse, -matmul(matmul(inverse, jnp.tril(tangents[0], -1)), inverse)


def diagonal(rows: jax.Array) -> jax.Array:
    """diag(rows): [..., K] -> [..., K, K]."""
    size = rows.shape[-1]
    return along_rows(rows, size) * jnp.eye(size, dtype=rows.dtype)
