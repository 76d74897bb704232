"""Initializers: functions of (key, shape, dtype)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers._base import Initializer


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return zeros."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return ones."""
    del key
    return jnp.ones(shape, dtype)


def normal(std: float) -> Initializer:
    """Return an initializer that draws from a normal distribution with mean 0."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * std

    return init


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw weights [..., fan_in, fan_out] from a normal with variance 1 / fan_in (LeCun)."""
    return normal(shape[-2] ** -0.5)(key, shape, dtype)


def xavier_uniform(gain: float) -> Initializer:
    """Return an initializer of weights [I, O], uniform in +-gain * sqrt(6 / (I + O))."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        bound = gain * math.sqrt(6 / (shape[-2] + shape[-1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def uniform(low: float, high: float) -> Initializer:
    """Return an initializer that draws uniformly from [low, high)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, low, high)

    return init


def log_uniform_of(low: float, high: float) -> Initializer:
    """Return an initializer that draws log(u) with u uniform in [low, high)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def inverse_softplus_log_uniform(low: float, high: float) -> Initializer:
    """Return an initializer of b with softplus(b) log-uniform in [low, high): Mamba's dt bias."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


@functools.lru_cache(maxsize=32)
def hippo_eigen(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the spectrum of the normal part of HiPPO-LegS: imaginary parts and eigenvectors.

    The shapes are [size/2] and [size, size/2]. The matrix is -1/2 plus a skew-symmetric one, so all
    real parts are -1/2 and eigenvalues come in conjugate pairs. The half with negative imaginary
    part is returned.
    """
    root = np.sqrt(2 * np.arange(size) + 1)
    lower = np.tril(np.outer(root, root) / 2, -1)
    imag, vectors = np.linalg.eigh(-1j * (lower.T - lower))
    return imag[: size // 2], vectors[:, : size // 2]
