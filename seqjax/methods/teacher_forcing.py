"""Generalized teacher forcing of nonlinear cells."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core.checks import state_dtype
from seqjax.ops.previous import previous
from seqjax.types import PyTree


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """A cell whose earlier state is pulled towards a target: generalized teacher forcing.

        h_t = f((1 - alpha) h_{t-1} + alpha target_{t-1}, x_t)

    Of arXiv 2306.04406. The Jacobian is (1 - alpha) J_t with the J_t of f. If no J_t has a singular
    value above s, gradients do not explode from alpha = `least_forcing(s)` on. Newton's method then
    also converges in fewer iterations, as the recurrence forgets its errors. With alpha = 1 all
    steps are independent; with 0 the cell is unchanged. Anneal alpha to 0 in training.

    Pass it to `nonlinear_scan` with `xs` = (the cell's inputs, the targets one step earlier). The
    targets are states, [B, T, D] or [B, T, D, k], for example from an encoder. Shift them with
    `seqjax.ops.previous(targets, None, reset)`, as below. Where a sequence starts, at t = 0 and at
    resets, the earlier target must equal the fresh state, which is zero. Any other value leaks
    into the new sequence, because the cell pulls the state towards it after the reset. To continue
    from a state, pass the last target of the earlier call instead of None.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> cell = seqjax.methods.TeacherForced(seqjax.cells.Elman(dim=2), alpha=0.5)
      >>> earlier, last = seqjax.ops.previous(jnp.ones((1, 6, 2)), None, reset=None)
      >>> xs = jnp.ones((1, 6, 1, 2)), earlier
      >>> hs, *_ = seqjax.nonlinear_scan(cell, {"W": 3 * jnp.eye(2)}, xs, jnp.zeros((1, 2)))
      >>> hs.shape
      (1, 6, 2)

    Attributes:
      cell: a function f(params, h, x), or a `seqjax.cells` cell.
      alpha: forcing, in [0, 1].
    """

    cell: Callable[[Any, jax.Array, Any], jax.Array]
    alpha: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"TeacherForced: `alpha` must be in [0, 1], got {self.alpha!r}.")

    def __call__(self, params: PyTree, h: jax.Array, x: tuple[PyTree, jax.Array]) -> jax.Array:
        """Return the next state, from the state and (the cell's input, the target)."""
        inputs, target = x
        return self.cell(params, (1 - self.alpha) * h + self.alpha * target, inputs)


def jacobian_norms(
    cell: Callable[[Any, jax.Array, Any], jax.Array],
    params: PyTree,
    xs: PyTree,
    states: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
) -> jax.Array:
    """Return the largest singular value of each Jacobian dh_t / dh_{t-1} along a trajectory.

    Pass the maximum of the result to `least_forcing`. All Jacobians of the trajectory are in memory
    at once, so pass only a part of a long trajectory.

    Args:
      cell: f(params, h, x) -> h, one step of one sequence.
      params: the cell's parameters.
      xs: pytree of [B, T, ...] arrays, the cell's inputs.
      states: h_1 .. h_T, [B, T, D] or [B, T, D, k], as `nonlinear_scan` returns them.
      initial_state: h_0; by default zeros.
      reset: [B, T] bool, true where h_{t-1} is zero.

    Returns:
      [B, T], in float32, or in float64 for float64 Jacobians.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> norms = seqjax.methods.jacobian_norms(
      ...     lambda w, h, x: w @ h + x, 3 * jnp.eye(2), jnp.ones((1, 5, 2)), jnp.ones((1, 5, 2))
      ... )
      >>> largest = float(norms.max())
      >>> print(round(largest, 3), round(seqjax.methods.least_forcing(largest), 3))
      3.0 0.667
    """
    earlier, _ = previous(states, initial_state, reset)

    def norm(h: jax.Array, x: PyTree) -> jax.Array:
        jacobian = jax.jacfwd(cell, argnums=1)(params, h, x).reshape(h.size, h.size)
        # There is no singular value decomposition of narrower numbers.
        return jnp.linalg.norm(jacobian.astype(state_dtype(jacobian)), ord=2)

    return jax.vmap(jax.vmap(norm))(earlier, xs)


def least_forcing(largest: float) -> float:
    """Return the smallest alpha that keeps gradients from exploding: max(0, 1 - 1 / largest).

    The product of T Jacobians of a `TeacherForced` cell has a norm of at most
    ((1 - alpha) largest)^T, which is 1 for this alpha (arXiv 2306.04406).

    Args:
      largest: the largest singular value of any Jacobian of the cell along a trajectory; see
        `jacobian_norms`.

    Example:
      >>> import seqjax
      >>> seqjax.methods.least_forcing(4.0), seqjax.methods.least_forcing(0.5)
      (0.75, 0.0)
    """
    if largest < 0:
        raise ValueError(f"least_forcing: `largest` must not be negative, got {largest!r}.")
    return max(0.0, 1 - 1 / largest) if largest else 0.0
