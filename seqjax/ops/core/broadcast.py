"""Broadcasts whose transpose is a product with ones.

Their transpose is a sum. XLA on CPU sums over a minor axis one number after another and over a
major axis hardly faster, ten times slower than a product with a vector of ones; on other backends
the two cost the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core.custom_adjoint import reverse_rule


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _apply(
    function: Callable[[jax.Array], jax.Array], total: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    def adjoint(args: tuple[Any, ...], ct: jax.Array) -> list[jax.Array]:
        del args
        return [total(ct)]

    return reverse_rule(function, adjoint)


def along_rows(x: jax.Array, size: int) -> jax.Array:
    """[..., K] -> [..., K, size]: every element along a row of its own."""
    shape, axes = (*x.shape, size), tuple(range(x.ndim))
    return _apply(
        functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=axes),
        lambda ct: _product(ct, jnp.ones((size,), ct.dtype)),
    )(x)


def down_columns(x: jax.Array, size: int) -> jax.Array:
    """[..., K] -> [..., size, K]: every element down a column of its own."""
    return _apply(
        lambda x: jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], size, x.shape[-1])),
        lambda ct: _product(jnp.ones((*ct.shape[:-2], 1, size), ct.dtype), ct)[..., 0, :],
    )(x)


def everywhere(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[...] -> [*shape, ...]: a copy for every element of an array of this shape."""
    leading = len(shape)

    def total(ct: jax.Array) -> jax.Array:
        rows = ct.reshape(-1, ct[(0,) * leading].size)
        count = rows.shape[0]
        if isinstance(count, int) and count <= 8:  # not symbolic: a few are added where they are
            return sum(rows[1:], start=rows[0]).reshape(ct.shape[leading:])
        return _product(jnp.ones((1, count), ct.dtype), rows).reshape(ct.shape[leading:])

    return _apply(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), total)(x)
