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
from seqjax.ops.nonlinear.hoisted_scan import hoisted_scan
from seqjax.ops.nonlinear.newton import Newton
from seqjax.ops.nonlinear.state_columns import join_state, on_columns, split_state
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
        return _over_rows(functools.partial(cell, params), found, xs)

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
                return _sequential(cell, (params, xs, h0), reset if has_resets else None, hs, ct)
            J = jacobians(params, xs, found)
            forward = functools.partial(correction, J, reset=reset, sequence_axis=sequence_axis)
            weights = jax.vjp(forward, jnp.zeros_like(ct))[1](ct)[0]
            d_changed, d_h0 = jax.vjp(alone, changed, h0)[1](weights)
            return [*d_changed, d_h0]

        return [*backends.by_platform(by, on_cpu, elsewhere, ct), jnp.zeros_like(states)]

    follow = custom_adjoint(states_of, adjoint)
    return follow


def _sequential(
    cell: Callable[..., Array],
    args: tuple[PyTree, PyTree, Array],
    reset: Array | None,
    hs: Array,
    ct: Array,
) -> list[Array]:
    """Return the cotangents of the floating-point leaves of (params, xs) and of h0."""
    params, xs, h0 = args
    shape = hs.shape[2:]
    leaves, tree = jax.tree.flatten((params, xs))
    which = inexact(leaves)
    # Use columns from here on: XLA removes a slice of a stack only if no operation is between them.
    states, start, cts = (split_state(value, shape) for value in (hs, h0, ct))
    found = [sequence_parallel.previous(*pair, reset) for pair in zip(start, states, strict=True)]
    step = on_columns(functools.partial(cell, params), shape)
    weights, d_h0 = _step_back(step, xs, found, reset, cts)

    def evaluate(changed: list[Array]) -> list[Array]:
        params, xs = jax.tree.unflatten(tree, put(leaves, which, changed))
        return _over_rows(on_columns(functools.partial(cell, params), shape), found, xs)

    # d_h0 is known, so skip the product with dh_t / dh_{t-1} at all t.
    [d_changed] = jax.vjp(evaluate, [leaves[i] for i in which])[1](weights)
    return [*d_changed, join_state(d_h0, shape)]


def _over_rows(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Map a function of one step over the leading axes B and T of all arguments.

    They become one axis: gradients of products over two axes transpose their operands on CPU.
    """
    lead = jax.tree.leaves(args)[0].shape[:2]
    rows = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), args)
    return jax.tree.map(lambda v: v.reshape(*lead, *v.shape[1:]), jax.vmap(function)(*rows))


def _step_back(
    step: Callable[[list[Array], PyTree], list[Array]],
    xs: PyTree,
    found: list[Array],
    reset: Array | None,
    ct: list[Array],
) -> tuple[list[Array], list[Array]]:
    """Compute lambda_t = ct_t + J_{t+1}^T lambda_{t+1} step by step, without a Jacobian.

    States, cotangents and results are columns; see `state_columns`.

    Returns:
      lambda, and the cotangent J_1^T lambda_1 of the state before the first step.
    """

    def back(carried: list[Array], inputs: Any) -> Any:
        x, columns, cut, ct = inputs
        weight = [c + d for c, d in zip(ct, carried, strict=True)]
        [passed] = jax.vjp(lambda columns: step(columns, x), columns)[1](weight)
        if cut is not None:
            passed = [jnp.where(cut, jnp.zeros_like(p), p) for p in passed]
        return passed, weight

    start = [jnp.zeros_like(c[:, 0]) for c in ct]
    last, weights = hoisted_scan(back, start, (xs, found, reset, ct), reverse=True)
    return weights, last
