"""Derivatives of a solved nonlinear recurrence, independent of the solver."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, sequence_parallel
from seqjax.ops.core.custom_adjoint import custom_adjoint, inexact, put
from seqjax.ops.nonlinear import jacobian_structure, memory_check
from seqjax.ops.nonlinear.affine_scan import correction
from seqjax.ops.nonlinear.hoisted_scan import hoisted_scan, state_parts
from seqjax.ops.nonlinear.newton import Newton
from seqjax.types import Array, PyTree


def derivatives(
    cell: Callable[..., Array],
    structure: str,
    on_cpu: str,
    elsewhere: str,
    sequence_axis: str | None,
    solver: Newton,
    *,
    has_resets: bool,
) -> Callable[..., Array]:
    """Return (params, xs, h0, reset, states) -> states, with the recurrence's derivatives.

    By the implicit function theorem, dh_t = J_t dh_{t-1} + df_t, where df_t is the change of f at
    fixed h_{t-1}. The adjoint is lambda_t = ct_t + J_{t+1}^T lambda_{t+1}. The cotangents of the
    arguments are then the derivative of f at all t in parallel. Jacobians are recomputed where
    they are needed, and are no residuals.
    """

    def evaluate(params: PyTree, xs: PyTree, found: Array) -> Array:
        # One axis B * T: gradients of products over two axes transpose their operands on CPU.
        lead = found.shape[:2]
        rows = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), (found, xs))
        out = jax.vmap(functools.partial(cell, params))(*rows)
        return out.reshape(*lead, *out.shape[1:])

    def jacobians(params: PyTree, xs: PyTree, found: Array) -> Array:
        # Windows bound the memory of the solver only. If the platform decides on the algorithm, the
        # branch of Newton is traced and may not run.
        if on_cpu == elsewhere == "newton":
            fraction, itemsize = solver.memory_fraction, found.dtype.itemsize
            memory_check.check_memory("nonlinear_scan", structure, found.shape, itemsize, fraction)

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
        changed, _, alone = moving(params, xs, reset, hs)

        def by(algorithm: str, ct: Array) -> list[Array]:
            """Return the cotangents of the leaves that are differentiated and of h0."""
            if algorithm == "sequential" and sequence_axis is None:
                cut = reset if has_resets else None
                weights, d_h0 = _step_back(functools.partial(cell, params), xs, found, cut, ct)
                # d_h0 is known, so skip the product with dh_t / dh_{t-1} at all t.
                [d_changed] = jax.vjp(lambda changed: alone(changed, h0), changed)[1](weights)
                return [*d_changed, d_h0]
            J = jacobians(params, xs, found)
            forward = functools.partial(correction, J, reset=reset, sequence_axis=sequence_axis)
            weights = jax.vjp(forward, jnp.zeros_like(ct))[1](ct)[0]
            d_changed, d_h0 = jax.vjp(alone, changed, h0)[1](weights)
            return [*d_changed, d_h0]

        return [*backends.by_platform(by, on_cpu, elsewhere, ct), jnp.zeros_like(states)]

    follow = custom_adjoint(states_of, adjoint)
    return follow


def _step_back(
    cell: Callable[[Array, PyTree], Array],
    xs: PyTree,
    found: Array,
    reset: Array | None,
    ct: Array,
) -> tuple[Array, Array]:
    """Compute lambda_t = ct_t + J_{t+1}^T lambda_{t+1} step by step, without a Jacobian.

    Returns:
      lambda, and the cotangent J_1^T lambda_1 of the state before the first step.
    """
    split, join = state_parts(found.shape[2:])

    def step(carried: Any, inputs: Any) -> Any:
        x, h, cut, ct = inputs
        weight = [c + d for c, d in zip(split(ct), carried, strict=True)]
        parts = split(jax.vjp(lambda h: cell(h, x), h)[1](join(weight))[0])
        if cut is not None:
            parts = [jnp.where(cut, jnp.zeros_like(part), part) for part in parts]
        return parts, weight

    start = split(jnp.zeros_like(ct[:, 0]))
    last, weights = hoisted_scan(step, start, (xs, found, reset, ct), reverse=True)
    return join(weights), join(last)
