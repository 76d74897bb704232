"""Selection in tuples of arrays: the rows of a state, or real and imaginary parts."""

from typing import Any

import jax
import jax.numpy as jnp

Arrays = tuple[jax.Array, ...]


def zero_where(reset: Any, arrays: Arrays) -> Arrays:
    """Replace the arrays by zero where `reset` is true; nowhere if it is None.

    A selection and not a product, because the values that a reset discards may be NaN.
    """
    if reset is None:
        return arrays
    return tuple(jnp.where(reset, jnp.zeros_like(array), array) for array in arrays)


def select(condition: Any, new: Arrays, old: Arrays) -> Arrays:
    """Return `new` where the condition is true and `old` elsewhere; `new` if it is None."""
    if condition is None:
        return new
    return tuple(jnp.where(condition, a, b) for a, b in zip(new, old, strict=True))
