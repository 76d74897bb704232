"""Newton's method for all steps of h_t = f(h_{t-1}, x_t) at once, with safeguards.

A step starts from a guess g of all states. With the Jacobians J_t at g it solves the recurrence

    d_t = J_t d_{t-1} + (f(g_{t-1}, x_t) - g_t),        g <- g + d

After i steps the first i states are exact for any Jacobians, so the method always terminates. On
strongly nonlinear cells it may need as many steps as there are states, and diverge in between. The
safeguards, from cheapest to most expensive:

1. Each iterate is clipped to the cell's bounds and then passed through the cell once more. This
   never makes a contracting cell worse, and replaces values that overflowed.
2. Sequences that have not converged over the whole of T after a few steps are solved in windows,
   starting at the first window with an unconverged state. A window starts from an exact state, and
   errors grow over its length at most.
3. If a window does not converge either, its remaining states are computed step by step.

The reported residual and convergence come from a final evaluation of the cell at all returned
states, not from the iterations.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.nonlinear.hoisted_scan import hoisted_scan
from seqjax.ops.nonlinear.state_columns import join_state, on_columns, split_state
from seqjax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Newton:
    """Configuration of the Newton solver of `nonlinear_scan`.

    Attributes:
      tol: a state has converged when |h_t - f(h_{t-1}, x_t)| <= tol * max(1, |h_t|) in all its
        numbers; by default 128 times the resolution of the state's dtype.
      whole_iterations: Newton steps on all of T before the solver switches to windows. A sequence
        continues beyond this limit while each step brings at least a window's length to
        convergence. With 0, a solve needs the memory of one window only, and its derivatives
        that of all steps.
      max_iterations: Newton steps in a window.
      window: steps in a window. Smaller windows need fewer iterations each and less memory.
      projection: clip iterates to the cell's bounds, and pass them through the cell once more.
      damping: Jacobians are multiplied by 1 - damping: 0 is Newton, 1 fixed-point iteration.
      jacobian_clip: largest magnitude of an entry of a Jacobian; by default unlimited. Like
        damping it changes the iterations and not the solution.
      scan_dtype: dtype of the linear recurrence of a step, by default that of the state. The
        convergence check always uses the dtype of the state.
      memory_fraction: the largest part of the devices' memory that Jacobians may take, such as
        dense ones, [B, T, n, n] for n numbers in a state. A call or its gradient that needs more
        raises. Inside `jax.shard_map` the memory is that of one device.

    Raises:
      ValueError: if a field is out of range, at construction.

    Example:
      >>> import jax.numpy as jnp
      >>> import seqjax
      >>> def cell(w, h, x):
      ...     return jnp.tanh(w * h + x)
      >>> solver = seqjax.Newton(window=32, max_iterations=8)
      >>> w, xs, h0 = jnp.full(3, 0.9), jnp.ones((2, 100, 3)), jnp.zeros((2, 3))
      >>> _, _, info = seqjax.nonlinear_scan(cell, w, xs, h0, solver=solver, algorithm="newton")
      >>> print(info.converged)
      [ True  True]
    """

    tol: float | None = None
    whole_iterations: int = 12
    max_iterations: int = 32
    window: int = 64
    projection: bool = True
    damping: float = 0.0
    jacobian_clip: float | None = None
    scan_dtype: Any = None
    memory_fraction: float = 0.5

    def __post_init__(self) -> None:
        for name in ("whole_iterations", "max_iterations", "window"):
            value, least = getattr(self, name), 0 if name == "whole_iterations" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Newton: `{name}` must be an integer >= {least}, got {value!r}.")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"Newton: `tol` must be positive or None, got {self.tol!r}.")
        if not self.memory_fraction > 0:
            raise ValueError(
                f"Newton: `memory_fraction` must be positive, got {self.memory_fraction!r}."
            )
        if not 0 <= self.damping <= 1:
            raise ValueError(f"Newton: `damping` must be in [0, 1], got {self.damping!r}.")
        if self.jacobian_clip is not None and not self.jacobian_clip > 0:
            raise ValueError(
                f"Newton: `jacobian_clip` must be positive or None, got {self.jacobian_clip!r}."
            )


class SolveInfo(NamedTuple):
    """Report of a solve: arrays [B], one entry for each sequence.

    Attributes:
      iterations: Newton steps, summed over windows; zero for the sequential algorithm.
      residual: the largest |h_t - f(h_{t-1}, x_t)| of the returned states. It is NaN if any state
        is NaN, and zero by construction for the sequential algorithm.
      converged: whether every returned state meets the tolerance.
      sequential_steps: number of states that were computed one after the other.

    Example:
      >>> import jax.numpy as jnp
      >>> import seqjax
      >>> def cell(w, h, x):
      ...     return jnp.tanh(w * h + x)
      >>> w, xs, h0 = jnp.full(3, 0.9), jnp.ones((2, 100, 3)), jnp.zeros((2, 3))
      >>> _, _, info = seqjax.nonlinear_scan(cell, w, xs, h0, algorithm="sequential")
      >>> print(info.iterations.max(), info.residual.max(), info.sequential_steps.max())
      0 0.0 100
    """

    iterations: jax.Array
    residual: jax.Array
    converged: jax.Array
    sequential_steps: jax.Array


class Problem(NamedTuple):
    """A range of W steps of a batched recurrence. States are [B, W, ...].

    Attributes:
      h0: the state before the range [B, ...].
      xs: the inputs, a pytree of [B, W, ...] arrays.
      reset: [B, W] bool. Only `step_all` accepts None.
      guess: the states from which Newton's method starts.
      evaluate: (states before, x) -> next states.
      step: (state, x) -> next state, of one step of one sequence.
      linearise: (states before, x) -> (next states, Jacobians).
      correct: (Jacobians, gaps, reset) -> the d of a Newton step.
      previous: (state before the range, states, reset) -> states before each step.
      anywhere: [B] bool -> whether it is true on any device that holds a shard of the sequence.
      bounds: lowest and highest state, or None.
    """

    h0: jax.Array
    xs: PyTree
    reset: Any
    guess: jax.Array
    evaluate: Callable[[jax.Array, PyTree], jax.Array]
    step: Callable[[jax.Array, PyTree], jax.Array]
    linearise: Callable[[jax.Array, PyTree], tuple[jax.Array, jax.Array]]
    correct: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    previous: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    anywhere: Callable[[jax.Array], jax.Array]
    bounds: tuple[Any, Any] | None

    def before(self, states: jax.Array) -> jax.Array:
        """Return the states before each step."""
        return self.previous(self.h0, states, self.reset)


def tolerance(solver: Newton, dtype: Any) -> float:
    """Return the solver's tolerance, or the default for a dtype.

    A state is a function of sums, whose rounding errors are a multiple of the dtype's resolution.
    """
    return 128 * float(jnp.finfo(dtype).eps) if solver.tol is None else solver.tol


def over_state(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Reduce [B, T, ...] to [B, T] over the axes of the state."""
    return reduce(x, axis=tuple(range(2, x.ndim)))


def unconverged(gap: jax.Array, state: jax.Array, tol: float) -> jax.Array:
    """Return the steps [B, T] with an error above the tolerance or a NaN."""
    return over_state(~(jnp.abs(gap) <= tol * jnp.maximum(1, jnp.abs(state))), jnp.any)


def iterate(
    problem: Problem,
    solver: Newton,
    limit: int,
    done: jax.Array,
    *,
    split: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Take Newton steps on all states of a problem.

    A state does not change once it and all states before it have converged. So neither later states
    nor another sequence of the batch can change its last digit.

    Returns:
      The states, the Newton steps of each sequence, and which states have converged.
    """
    guess, xs = problem.guess, problem.xs
    # A quarter of the tolerance, because the final check rounds differently.
    aim = tolerance(solver, guess.dtype) / 4

    def clip(h: jax.Array) -> jax.Array:
        return h if problem.bounds is None else jnp.clip(h, *problem.bounds)

    def newton_step(gap: jax.Array, J: jax.Array) -> jax.Array:
        if solver.damping:
            J = (1 - solver.damping) * J
        if solver.jacobian_clip is not None:
            J = jnp.clip(J, -solver.jacobian_clip, solver.jacobian_clip)
        narrow = solver.scan_dtype or gap.dtype
        return problem.correct(J.astype(narrow), gap.astype(narrow), problem.reset).astype(
            gap.dtype
        )

    def better(g: jax.Array, f: jax.Array, d: jax.Array, ready: jax.Array) -> jax.Array:
        new = g + d
        if solver.projection:
            # Replace an iterate that overflowed by the value of the cell.
            new = clip(jnp.where(jnp.isfinite(new), new, f))
            new = problem.evaluate(problem.before(new), xs)
        if split:  # the state that enters this shard may not be exact
            return new
        # The first unconverged state follows an exact one, so f is exact there.
        first = ready if ready.shape[1] == 1 else jnp.pad(ready[:, :-1], [(0, 0), (1, 0)])
        return jnp.where(as_state(first.at[:, 0].set(True), g), f, new)

    # All False, with the same varying mesh axes as the states, because loop carries must match.
    varies = jnp.isnan(over_state(jnp.zeros_like(guess), jnp.sum))

    def body(carry: Any) -> Any:
        i, g, taken, near, done, given_up = carry
        f, J = problem.linearise(problem.before(g), xs)
        gap = jnp.where(as_state(done, g), jnp.zeros_like(g), f - g)
        d = newton_step(gap, J)
        # Close to the solution a small step squares the error. A large step means that errors grow
        # along the sequence, so a small gap is no proof of convergence.
        small = jnp.abs(d) <= aim**0.5 / 64 * jnp.maximum(1, jnp.abs(g))
        off = (unconverged(gap, f, aim) | ~over_state(small, jnp.all)) & ~done
        if split:
            ready = jnp.broadcast_to(~problem.anywhere(off.any(axis=1))[:, None], off.shape)
        else:
            ready = jnp.cumsum(off, axis=1) == 0
        # A converged state takes up to three more small steps for the last digits. It is final
        # after the third, or as soon as its gap is below an eighth of `aim`.
        settled = ready & (near > 0) & ((near >= 3) | ~unconverged(gap, f, aim / 8))
        final = jnp.cumsum(~(settled | done), axis=1) == 0
        if split:
            final = jnp.broadcast_to(~problem.anywhere(~final.all(axis=1))[:, None], off.shape)
        new = jnp.where(as_state(ready, g), g + d, better(g, f, d, ready))
        # Past the limit a sequence continues while a step settles at least one window of states.
        moved = jnp.sum(final, axis=1) - jnp.sum(done, axis=1)
        slow = jnp.ones_like(given_up) if split else moved < solver.window
        given_up = given_up | ((i >= limit) & slow)
        active = problem.anywhere(~final.all(axis=1)) & ~given_up
        stay = done | final | given_up[:, None]
        g = jnp.where(as_state(stay, g), g, new)
        near = jnp.where(ready | varies, near + 1, 0)
        return i + 1, g, taken + active.astype(taken.dtype), near, done | final, given_up

    def go_on(carry: Any) -> jax.Array:
        *_, done, given_up = carry
        return jnp.any(problem.anywhere(~done.all(axis=1)) & ~given_up)

    start = jnp.where(as_state(done, guess), guess, clip(guess) if solver.projection else guess)
    done, near = done & ~varies, varies.astype(jnp.int32)
    taken, given_up = jnp.zeros_like(done[:, 0], jnp.int32), jnp.zeros_like(done[:, 0])
    carry = (0, start, taken, near, done, problem.anywhere(given_up))
    _, g, taken, _, done, _ = lax.while_loop(go_on, body, carry)
    return g, taken, done


def as_state(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Reshape a mask [B, T], [B, 1] or [B] so that it broadcasts against states."""
    return mask.reshape(*mask.shape, *(1 for _ in range(like.ndim - mask.ndim)))


def in_windows(
    problem: Problem,
    solver: Newton,
    done: jax.Array,
    finish: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve window by window, from the first window with an unconverged state.

    Returns:
      The states, and the Newton steps and sequential steps of each sequence.
    """
    length = problem.guess.shape[1]
    size = min(solver.window, length)
    count = -(-length // size)

    def padded(x: jax.Array, value: Any = 0) -> jax.Array:
        after = [(0, 0), (0, count * size - length), *((0, 0) for _ in x.shape[2:])]
        return jnp.pad(x, after, constant_values=value)

    def window(x: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, size, axis=1)

    first = jnp.min(jnp.sum(jnp.cumsum(~done, axis=1) == 0, axis=1)) // size
    xs, reset, states = jax.tree.map(padded, (problem.xs, problem.reset, problem.guess))
    done = padded(done, value=True)

    def body(carry: Any) -> Any:
        w, h, states, taken, stepped = carry
        start = w * size
        inputs = jax.tree.map(lambda x: window(x, start), (xs, reset, states))
        part = problem._replace(h0=h, **dict(zip(("xs", "reset", "guess"), inputs, strict=True)))
        g, more, known = iterate(part, solver, solver.max_iterations, window(done, start))
        if finish:
            g = lax.cond(jnp.all(known), lambda g: g, lambda g: step_through(part, g, ~known), g)
            stepped = stepped + jnp.sum(~known, axis=1, dtype=stepped.dtype)
        states = lax.dynamic_update_slice_in_dim(states, g, start, axis=1)
        return w + 1, g[:, -1], states, taken + more, stepped

    before = lax.dynamic_index_in_dim(states, jnp.maximum(first * size - 1, 0), 1, keepdims=False)
    h = jnp.where(first == 0, problem.h0, before)
    zeros = jnp.zeros_like(done[:, 0], jnp.int32)
    _, _, states, taken, stepped = lax.while_loop(
        lambda carry: carry[0] < count, body, (first, h, states, zeros, zeros)
    )
    return states[:, :length], taken, stepped


def step_all(problem: Problem) -> jax.Array:
    """Compute all states one after the other."""
    shape = problem.h0.shape[1:]
    next_columns = on_columns(problem.step, shape)

    def step(columns: Any, inputs: Any) -> Any:
        x, reset = inputs
        if reset is not None:
            columns = [jnp.where(reset, jnp.zeros_like(c), c) for c in columns]
        columns = next_columns(columns, x)
        return columns, columns

    start = split_state(problem.h0, shape)
    _, columns = hoisted_scan(step, start, (problem.xs, problem.reset))
    return join_state(columns, shape)


def step_through(problem: Problem, states: jax.Array, todo: jax.Array) -> jax.Array:
    """Return the states, with those marked by `todo` computed one after the other."""

    def step(h: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        x, reset, known, todo = jax.tree.map(lambda v: v[:, None], inputs)
        new = problem.evaluate(problem.previous(h, known, reset), x)
        h = jnp.where(as_state(todo, known), new, known)[:, 0]
        return h, h

    inputs = (problem.xs, problem.reset, states, todo)
    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), inputs)
    return jnp.moveaxis(lax.scan(step, problem.h0, inputs)[1], 0, 1)


def solve(
    problem: Problem,
    solver: Newton,
    *,
    finish: bool,
    rescue: Callable[[], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve for all states.

    Args:
      problem: the recurrence over the whole sequence.
      solver: the configuration.
      finish: whether to compute states that do not converge step by step.
      rescue: function that computes all states instead of windows, when T is split over devices.

    Returns:
      The states, and the Newton steps and sequential steps of each sequence.
    """
    guess = problem.guess
    done = jnp.zeros(guess.shape[:2], bool)
    g, taken = guess, jnp.zeros(guess.shape[0], jnp.int32)
    if solver.whole_iterations or rescue is not None:
        limit = solver.whole_iterations or solver.max_iterations
        split = rescue is not None
        g, taken, done = iterate(problem, solver, limit, done, split=split)
    lost = problem.anywhere(~done.all(axis=1))
    zeros = jnp.zeros_like(taken)
    if rescue is None:
        states, more, stepped = lax.cond(
            jnp.any(lost),
            lambda: in_windows(problem._replace(guess=g), solver, done, finish),
            lambda: (g, zeros, zeros),
        )
        return states, taken + more, stepped
    if not finish:
        return g, taken, zeros
    saved = lax.cond(
        jnp.any(lost), lambda: jnp.where(as_state(lost[:, None], g), rescue(), g), lambda: g
    )
    return saved, taken, jnp.where(lost, guess.shape[1], 0).astype(taken.dtype)
