"""Reparameterizations of the rates and decays of diagonal state spaces (arXiv 2311.14495)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Reparameterization = Literal["exp", "softplus", "best"]
KINDS = ("exp", "softplus", "best")
# Both constants are from the authors' code, radarFudan/StableSSM. That of the layer is in
# src/models/recurrent/stablessm.py, and that of discrete time in
# notebooks/stable_reparameterizations.ipynb.
_B, _B_DISCRETE = 0.1, 0.5
LARGEST_RATE = 1 / _B


def rate(weight: jax.Array, kind: Reparameterization) -> jax.Array:
    """Return a rate above 0: exp(w), softplus(w) or, for "best", 1 / (w^2 + 0.1)."""
    if kind == "best":
        return 1 / (weight * weight + _B)
    return jnp.exp(weight) if kind == "exp" else jax.nn.softplus(weight)


def weight_of_rate(value: Any, kind: Reparameterization) -> np.ndarray:
    """Return the weight w of a rate, in NumPy."""
    value = np.asarray(value, np.float64)
    if kind == "best":
        return np.sqrt(1 / value - _B)
    # The inverse of softplus, log(exp(value) - 1), without the exponential of a large value.
    return np.log(value) if kind == "exp" else value + np.log(-np.expm1(-value))


def one_minus_decay(weight: jax.Array) -> jax.Array:
    """Return 1 - f(w) for the "best" decay of discrete time, f(w) = 1 - 1 / (w^2 + 0.5).

    f(w) is in [-1, 1), and negative for w^2 < 0.5.
    """
    return 1 / (weight * weight + _B_DISCRETE)


def weight_of_decay(decay: jax.Array) -> jax.Array:
    """Return the weight w of a decay f(w) in [0, 1)."""
    return jnp.sqrt(1 / (1 - decay) - _B_DISCRETE)
