"""Derivatives of a solved nonlinear recurrence, independent of the solver."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import backends, sequence_parallel
from seqjax.ops.core.custom_adjoint import custom_adjoint, inexact, put
from seqjax.ops.nonlinear import jacobian_structure
from seqjax.ops.nonlinear.affine_scan import correction
from seqjax.ops.nonlinear.newton import as_state
from seqjax.types import Array, PyTree


def derivatives(
    cell: Callable[..., Array],
    structure: str,
    on_cpu: str,
    elsewhere: str,
    sequence_axis: str | None,
) -> Callable[..., Array]:
    """Return (params, xs, h0, reset, states) -> states, with the recurrence's derivatives.

    By the implicit function theorem, dh_t = J_t dh_{t-1} + df_t, where df_t is the change of f at
    fixed h_{t-1}. The adjoint is lambda_t = ct_t + J_{t+1}^T lambda_{t+1}. The cotangents of the
    arguments are then the derivative of f at all t in parallel. Jacobians are recomputed where
    they are needed, and are no residuals.
    """

    def evaluate(params: PyTree, xs: PyTree, found: Array) -> Array:
        return jax.vmap(jax.vmap(functools.partial(cell, params)))(found, xs)

    def jacobians(params: PyTree, xs: PyTree, found: Array) -> Array:
        def at(h: Array, x: PyTree) -> Array:
            return jacobian_structure.jacobian(lambda h: cell(params, h, x), h, structure)[1]

        return jax.vmap(jax.vmap(at))(found, xs)

    def found_by(h0: Array, states: Array, reset: Array) -> Array:
        return sequence_parallel.previous(h0, states, reset, sequence_axis)

    def moving(params: PyTree, xs: PyTree, reset: Array, hs: Array) -> Any:
        """Return the leaves to differentiate, their positions, and f at `hs` as their function."""
        leaves, tree = jax.tree.flatten((params, xs))
        which = inexact(leaves)

        def alone(changed: list[Array], h0: Array) -> Array:
            params, xs = jax.tree.unflatten(tree, put(leaves, which, changed))
            return evaluate(params, xs, found_by(h0, hs, reset))

        return [leaves[i] for i in which], which, alone

    @jax.custom_jvp
    def states_of(params: PyTree, xs: PyTree, h0: Array, reset: Array, states: Array) -> Array:
        del params, xs, h0, reset
        return states

    @states_of.defjvp
    def _states_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
        params, xs, h0, reset, _ = primals
        hs = states_of(*primals)
        changed, which, alone = moving(params, xs, reset, hs)
        d_changed = [jax.tree.leaves(tangents[:2])[i] for i in which]
        d_f = jax.jvp(alone, (changed, h0), (d_changed, tangents[2]))[1]
        J = jacobians(params, xs, found_by(h0, hs, reset))
        return hs, correction(J, d_f, reset, sequence_axis)

    def adjoint(args: tuple[PyTree, ...], ct: Array) -> list[Array]:
        params, xs, h0, reset, states = args
        hs = follow(*args)
        found = found_by(h0, hs, reset)

        def by(algorithm: str, ct: Array) -> Array:
            if algorithm == "sequential" and sequence_axis is None:
                return _step_back(functools.partial(evaluate, params), xs, found, reset, ct)
            J = jacobians(params, xs, found)
            forward = functools.partial(correction, J, reset=reset, sequence_axis=sequence_axis)
            return jax.vjp(forward, jnp.zeros_like(ct))[1](ct)[0]

        weights = backends.by_platform(by, on_cpu, elsewhere, ct)
        changed, _, alone = moving(params, xs, reset, hs)
        d_changed, d_h0 = jax.vjp(alone, changed, h0)[1](weights)
        return [*d_changed, d_h0, jnp.zeros_like(states)]

    follow = custom_adjoint(states_of, adjoint)
    return follow


def _step_back(
    evaluate: Callable[..., Array], xs: PyTree, found: Array, reset: Array, ct: Array
) -> Array:
    """Compute lambda_t = ct_t + J_{t+1}^T lambda_{t+1} step by step, without a Jacobian."""

    def step(carried: Array, inputs: Any) -> tuple[Array, Array]:
        x, h, cut, ct = jax.tree.map(lambda v: v[:, None], inputs)
        weight = ct + carried
        back = jax.vjp(lambda h: evaluate(x, h), h)[1](weight)[0]
        return jnp.where(as_state(cut, back), jnp.zeros_like(back), back), weight[:, 0]

    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (xs, found, reset, ct))
    _, weights = lax.scan(step, jnp.zeros_like(ct[:, :1]), inputs, reverse=True)
    return jnp.moveaxis(weights, 0, 1)
