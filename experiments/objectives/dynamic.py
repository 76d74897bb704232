"""Dynamic evaluation: the parameters follow the text while it is evaluated."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.heldout import Total, window_nats


def make_total(model: Any, rate: float, decay: float) -> Total:
    """Return `total(params, streams, length)`, the log-loss in nats with a step per window.

        p_i = p_{i-1} - rate * grad L_i(p_{i-1}) + decay * (p_0 - p_{i-1})

    p_0 are the given parameters, and L_i is the mean log-loss of window i. The loss of a window is
    counted before its step, so that every token is predicted from earlier tokens only. Gradients
    do not reach earlier windows. This is the method with plain gradients of Krause et al.,
    Dynamic Evaluation of Neural Sequence Models (arXiv 1709.07432).

    Args:
      model: the model.

      rate: size of a step.

      decay: part of the way back to the given parameters in each step, from 0 to 1.
    """

    def loss(params: Any, state: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        state, sums = window_nats(model, params, state, part, None)
        total = jnp.sum(sums)
        return total / jnp.maximum(jnp.sum(part["counted"]), 1), (state, total)

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def window(params: Any, first: Any, state: Any, part: dict[str, jax.Array]) -> Any:
        (_, (state, total)), slopes = jax.value_and_grad(loss, has_aux=True)(params, state, part)

        def step(p: jax.Array, slope: jax.Array, start: jax.Array) -> jax.Array:
            return (p - rate * slope + decay * (start - p)).astype(p.dtype)

        return jax.tree.map(step, params, slopes, first), state, total

    def total(params: Any, streams: dict[str, Any], length: int) -> float:
        current = jax.tree.map(jnp.array, params)  # a copy, because each step donates its input
        state = model.initial_state(streams["inputs"].shape[0])
        sums = []
        for start in range(0, streams["inputs"].shape[1], length):
            part = {name: stream[:, start : start + length] for name, stream in streams.items()}
            current, state, nats = window(current, params, state, part)
            sums.append(nats)
        return sum(map(float, jax.device_get(sums)))

    return total
