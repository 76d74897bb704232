"""Real-time recurrent learning of cells with independent channels."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import checks, explicit_mesh
from seqjax.ops.nonlinear.jacobian_structure import float_leaves, keeps_channels_apart
from seqjax.types import Array, Float, PyTree, Reset

Cell = Callable[[PyTree, Array, PyTree], Array]
Loss = Callable[[PyTree, Array, PyTree], Array]


def _specs(arguments: explicit_mesh.Arguments, out: Any) -> PyTree:
    """Return the specs of the results, split as `xs`, the parameters and the state are."""
    del out

    def like(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: explicit_mesh.joined(*explicit_mesh.spec_of(x)), tree)

    batch, time, *_ = explicit_mesh.spec_of(jax.tree.leaves(arguments["xs"])[0])
    params, head, h0 = (arguments[name] for name in ("params", "head", "initial_state"))
    sensitivity = jax.tree.map(
        lambda p: explicit_mesh.joined(batch, None, *explicit_mesh.spec_of(p)), params
    )
    if arguments.get("sensitivity") is not None:
        sensitivity = like(arguments["sensitivity"])
    return explicit_mesh.joined(batch, time), like((params, head)), (like(h0), sensitivity)


@explicit_mesh.auto_inside(_specs)
def rtrl(
    cell: Cell,
    loss: Loss,
    params: PyTree,
    head: PyTree,
    xs: PyTree,
    targets: PyTree,
    initial_state: Float[Array, "B D"] | Float[Array, "B D k"],
    sensitivity: PyTree | None = None,
    *,
    reset: Reset | None = None,
) -> tuple[Float[Array, "B T"], tuple[PyTree, PyTree], tuple[Array, PyTree]]:
    """Compute exact gradients forward in time, in memory that does not grow with T.

        h_t = f(params, h_{t-1}, x_t)
        S_t = df/dh S_{t-1} + df/dparams                  S_t = dh_t / dparams
        gradient = sum_t dloss_t/dh_t S_t

    Real-time recurrent learning (Williams and Zipser, 1989) for columnar networks and elementwise
    recurrences (arXiv 2302.05326, 2305.19044). Channel d of the state depends on channel d of the
    earlier state and on entries [..., d] of the parameters only. So S has k numbers per parameter
    and sequence, and a step takes O(k) evaluations of the cell.

    The gradients equal those of backpropagation through time over all steps since `initial_state`.
    To learn online, call it with a few steps at a time, and pass the state and the sensitivity on.
    After an update of the parameters S is that of the earlier ones, the usual approximation.

    Args:
      cell: f(params, h, x) -> h, one step of one sequence: h [D] or [D, k].
      loss: loss(head, h, target) -> a number, for one step of one sequence.
      params: pytree of arrays [..., D].
      head: pytree of the parameters of `loss`.
      xs: pytree of [B, T, ...] arrays.
      targets: pytree of [B, T, ...] arrays.
      initial_state: [B, D] or [B, D, k].
      sensitivity: the sensitivity that an earlier call returned; by default zeros.
      reset: [B, T] bool. Where true, state and sensitivity are cleared before the step.

    Returns:
      (losses, (gradients of params, gradients of head), (final state, sensitivity)): gradients of
      the sum of all losses. Sensitivities have shape [B, k, ..., D], k = 1 for states [B, D].
      Everything is computed in float32, or float64 if `params`, `xs` or `initial_state` is.
      Gradients have the dtypes of the parameters.

    Raises:
      ValueError: if shapes or dtypes do not fit, channels of the cell depend on each other, or on
        parameters of other channels.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> cell = lambda w, h, x: jnp.tanh(w * h + x)
      >>> loss = lambda head, h, y: jnp.sum((head * h - y) ** 2)
      >>> xs = jnp.ones((1, 9, 2))
      >>> losses, (d_w, d_head), (state, S) = seqjax.methods.rtrl(
      ...     cell, loss, jnp.ones(2), jnp.ones(2), xs, xs, jnp.zeros((1, 2))
      ... )
      >>> losses.shape, d_w.shape, S.shape
      ((1, 9), (2,), (1, 1, 2))
    """
    op = "rtrl"
    arrays = jax.tree.map(jnp.asarray, (params, head, xs, targets, initial_state))
    _, _, xs, targets, h0 = arrays
    batch, length = checks.check_time_axes(op, "xs", xs)
    times = checks.check_time_axes(op, "targets", targets)
    if times != (batch, length):
        raise ValueError(
            f"{op}: `targets` must have shape [B={batch}, T={length}, ...], got"
            f" [{times[0]}, {times[1]}, ...]."
        )
    if h0.ndim not in (2, 3) or h0.shape[0] != batch:
        raise ValueError(
            f"{op}: `initial_state` must have shape [B={batch}, D] or [B={batch}, D, k], got"
            f" {list(h0.shape)}."
        )
    reset = checks.check_reset(op, reset, batch, length)
    cut = jnp.zeros((batch, length), bool) if reset is None else reset
    floats = {"initial_state": h0}
    floats |= {f"params[{i}]": p for i, p in enumerate(jax.tree.leaves(arrays[0]))}
    floats |= {f"xs[{i}]": x for i, x in enumerate(float_leaves(xs))}
    checks.check_dtypes(op, floats, complex_ok=False)
    # Sums over steps lose the digits of narrower numbers.
    wide = checks.state_dtype(*floats.values())
    params, head, xs, targets, h0 = jax.tree.map(functools.partial(_widened, dtype=wide), arrays)
    _check_columns(op, cell, params, _rows(h0, 1), _rows(xs, 2))
    width = 1 if h0.ndim == 2 else h0.shape[2]
    if sensitivity is None:
        sensitivity = jax.tree.map(lambda p: jnp.zeros((batch, width, *p.shape), wide), params)
    sensitivity = jax.tree.map(lambda s: jnp.asarray(s).astype(wide), sensitivity)

    def step(h: Array, S: PyTree, x: PyTree, target: PyTree, cut: Array) -> Any:
        """Return (state, sensitivity) and (loss, gradients) of one step of one sequence."""
        h = jnp.where(cut, jnp.zeros_like(h), h)
        S = jax.tree.map(lambda s: jnp.where(cut, jnp.zeros_like(s), s), S)
        new, pull = jax.vjp(lambda params, h: cell(params, h, x).astype(wide), params, h)
        rows = []
        for i in range(width):
            # Channels are independent, so one pull returns row i of the Jacobians of them all.
            unit = jnp.ones_like(new) if new.ndim == 1 else jnp.zeros_like(new).at[:, i].set(1)
            d_params, d_h = pull(unit)
            rows.append(jax.tree.map(functools.partial(_advance, _columns(d_h)), d_params, S))
        S = jax.tree.map(lambda *s: jnp.stack(s), *rows)
        value, (d_head, d_new) = jax.value_and_grad(loss, (0, 1))(head, new, target)
        d_params = jax.tree.map(lambda s: jnp.einsum("k...d,kd->...d", s, _columns(d_new)), S)
        return (new, S), (value, d_params, d_head)

    def all_sequences(carry: Any, inputs: Any) -> Any:
        (h, S), grads = carry
        (h, S), (value, *found) = jax.vmap(step)(h, S, *inputs)
        grads = jax.tree.map(lambda g, f: g + f.sum(axis=0), grads, tuple(found))
        return ((h, S), grads), value

    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (xs, targets, cut))
    start = ((h0, sensitivity), jax.tree.map(jnp.zeros_like, (params, head)))
    (state, grads), losses = lax.scan(all_sequences, start, inputs)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, arrays[:2])
    return losses.T, grads, state


def _widened(x: Array, dtype: Any) -> Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _rows(tree: PyTree, axes: int) -> PyTree:
    """Return the shapes and dtypes of arrays without their first axes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), tree)


def _columns(d_h: Array) -> Array:
    """Return [k, D] from [D] or [D, k]."""
    return d_h[None] if d_h.ndim == 1 else d_h.T


def _advance(d_h: Array, d_param: Array, S: Array) -> Array:
    """Return a row of the new sensitivity [..., D], from a row of the Jacobian [k, D]."""
    return d_param + jnp.einsum("kd,k...d->...d", d_h, S)


def _check_columns(op: str, cell: Cell, params: PyTree, h: Any, x: PyTree) -> None:
    """Raise unless channel d depends on channel d of the state and of all parameters alone."""
    program = jax.make_jaxpr(cell)(_rows(params, 0), h, x)
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if leaf.ndim < 1 or leaf.shape[-1] != h.shape[0]:
            raise ValueError(
                f"{op}: `params` must be arrays [..., D={h.shape[0]}], got one of shape"
                f" {list(leaf.shape)}."
            )
    places = [(i, leaf.ndim - 1) for i, leaf in enumerate(leaves)] + [(len(leaves), 0)]
    if not all(keeps_channels_apart(program, *place) for place in places):
        raise ValueError(
            f"{op}: `cell` must keep its channels apart, in the state and in the parameters, got"
            " channels that depend on each other; train it with jax.grad through nonlinear_scan."
        )
