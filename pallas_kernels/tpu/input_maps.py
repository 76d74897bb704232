"""Maps of the inputs of a chunk, for one head: the L2 norm of q and k, and the gate of the decays.

    normalized(x) = x / sqrt(|x|^2 + 1e-6)
    gate(x)       = rate * softplus(x + bias)         rate = -exp(A_log)

A kernel that applies them reads and writes the arrays before the maps, which may be half as wide,
and the program has no passes over them. Arrays are [C, K], or [C, heads] for one decay per head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.numerics import Numerics

EPS = 1e-6


def _inverse_norm(x: jax.Array) -> jax.Array:
    return lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + EPS)


def normalized(x: jax.Array) -> jax.Array:
    """Divide the rows of x by their lengths."""
    return x * _inverse_norm(x)


def normalized_back(x: jax.Array, ct: jax.Array, num: Numerics) -> jax.Array:
    """Compute the cotangent of x in `normalized`."""
    x = x.astype(num.dtype)
    factor = _inverse_norm(x)
    unit = x * factor
    return factor * (ct - unit * jnp.sum(unit * ct, axis=1, keepdims=True))


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def gate(x: jax.Array, rate: jax.Array, bias: jax.Array) -> jax.Array:
    """Compute the logarithms of the decays; rate and bias are rows [1, K]."""
    return rate * _softplus(x + bias)


class GateCotangents(NamedTuple):
    """Cotangents of the input of the gate, and of its rows rate and bias [1, K]."""

    x: jax.Array
    rate: jax.Array
    bias: jax.Array


def gate_back(x: jax.Array, rate: jax.Array, bias: jax.Array, ct: jax.Array) -> GateCotangents:
    """Compute the cotangents in `gate`.

    Steps whose cotangent is zero may have inputs that are not finite: they are out of bounds, or
    their results are NaN already.
    """
    x = jnp.where(ct == 0.0, 0.0, x) + bias
    d_x = ct * rate / (1.0 + jnp.exp(-x))
    d_rate = ct * _softplus(x)
    return GateCotangents(d_x, *(jnp.sum(d, axis=0, keepdims=True) for d in (d_rate, d_x)))
