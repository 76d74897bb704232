"""Largest Lyapunov exponent: the rate at which neighboring trajectories converge or diverge."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import checks, explicit_mesh, sequence_parallel
from seqjax.types import Array, Float, PyTree, Reset


@explicit_mesh.auto_inside(
    lambda arguments, _: explicit_mesh.joined(explicit_mesh.spec_of(arguments["hs"])[0])
)
def lyapunov(
    cell: Callable[[PyTree, Array, PyTree], Array],
    params: PyTree,
    xs: PyTree,
    hs: Float[Array, "B T D"] | Float[Array, "B T D k"],
    *,
    reset: Reset | None = None,
) -> Float[Array, "B"]:
    """Compute the largest Lyapunov exponent along trajectories, to predict Newton's convergence.

        v_t = J_t v_{t-1}          J_t = df/dh at (h_{t-1}, x_t)
        exponent = mean_t log |v_t| / |v_{t-1}|

    Below zero, neighboring trajectories converge and `nonlinear_scan` can solve in parallel, in
    fewer iterations the lower the exponent is. Near or above zero, Newton needs about as many
    iterations as there are steps, and gradients explode (Gonzalez et al., Predictability enables
    parallelization, 2508.16817). A model trained to remember has exponents slightly below zero
    except where it forgets.

    Args:
      cell: as for `nonlinear_scan`.
      params: as for `nonlinear_scan`.
      xs: as for `nonlinear_scan`.
      hs: [B, T, D] or [B, T, D, k], the states that `nonlinear_scan` returned.
      reset: [B, T] bool. The mean excludes the steps where it is true.

    Returns:
      [B], per step, in nats; -inf if a step without a reset forgets everything.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> hs = jnp.zeros((1, 50, 2))
      >>> halve = lambda a, h, x: a * h + x
      >>> round(float(seqjax.lyapunov(halve, jnp.array([0.5, 0.25]), hs, hs)[0]), 1)
      -0.7
    """
    op = "lyapunov"
    params, xs, hs = jax.tree.map(jnp.asarray, (params, xs, hs))
    if hs.ndim not in (3, 4) or hs.shape[1] < 1:
        raise ValueError(
            f"{op}: `hs` must have shape [B, T, D] or [B, T, D, k], got {list(hs.shape)}."
        )
    for leaf in jax.tree.leaves(xs):
        if leaf.shape[:2] != hs.shape[:2]:
            raise ValueError(
                f"{op}: every leaf of `xs` must have shape [B={hs.shape[0]}, T={hs.shape[1]}, ...],"
                f" got {list(leaf.shape)}."
            )
    reset = checks.check_reset(op, reset, *hs.shape[:2])
    cuts = jnp.zeros(hs.shape[:2], bool) if reset is None else reset
    # Exclude the first step from the mean, because the state before it is not an argument.
    cuts = cuts.at[:, 0].set(True)
    found = sequence_parallel.previous(jnp.zeros_like(hs[:, 0]), hs, cuts)
    start = jax.random.normal(jax.random.key(0), hs[:, 0].shape, hs.dtype)
    evaluate = jax.vmap(functools.partial(cell, params))

    def size(v: Array) -> Array:  # [B, 1, ...]
        return jnp.sqrt(jnp.sum(v * v, axis=tuple(range(1, v.ndim)), keepdims=True))

    unit = start / size(start)

    def step(v: Array, inputs: Any) -> tuple[Array, Array]:
        h, x, cut = inputs
        pushed = jax.jvp(lambda h: evaluate(h, x), (h,), (v,))[1]
        growth = size(pushed)
        lost = (growth == 0) | cut.reshape(growth.shape)
        v = jnp.where(lost, unit, pushed / jnp.where(lost, jnp.ones_like(growth), growth))
        return v, jnp.where(cut, 0.0, jnp.log(growth.reshape(cut.shape)))

    inputs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (found, xs, cuts))
    _, logs = lax.scan(step, unit, inputs)
    return jnp.sum(logs, axis=0) / jnp.maximum(jnp.sum(~cuts, axis=1), 1)
