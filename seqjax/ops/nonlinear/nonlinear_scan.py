"""Nonlinear RNNs: h_t = f(h_{t-1}, x_t) for all t, by Newton's method or step by step."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core import backends, checks, explicit_mesh, jax_compat, sequence_parallel
from seqjax.ops.nonlinear import cell_checks, cell_kernel, jacobian_structure, memory_check, newton
from seqjax.ops.nonlinear.affine_scan import correction
from seqjax.ops.nonlinear.implicit_diff import derivatives
from seqjax.ops.nonlinear.newton import Newton, SolveInfo
from seqjax.types import Array, Float, PyTree, Reset

CellFunction = Callable[[PyTree, Array, PyTree], Array]
ON_FAILURE = ("sequential", "error", "warn")


def _specs(arguments: explicit_mesh.Arguments, out: Any) -> PyTree:
    """Return the specs of (states, final state, info), split as the arguments are."""
    h0 = explicit_mesh.spec_of(arguments["initial_state"])
    xs = [explicit_mesh.spec_of(x) for x in jax.tree.leaves(arguments["xs"])]
    batch = next((spec[0] for spec in (*xs, h0) if spec[0]), None)
    states = explicit_mesh.joined(batch, xs[0][1], *h0[1:])
    info = jax.tree.map(lambda _: explicit_mesh.joined(batch), out[2])
    return states, explicit_mesh.joined(*h0), info


@explicit_mesh.auto_inside(_specs)
def nonlinear_scan(
    cell: CellFunction,
    params: PyTree,
    xs: PyTree,
    initial_state: Float[Array, "B D"] | Float[Array, "B D k"],
    *,
    reset: Reset | None = None,
    jacobian: str = "auto",
    bounds: tuple[Any, Any] | None = None,
    guess: Array | None = None,
    solver: Newton | None = None,
    algorithm: str | None = None,
    implementation: str | None = None,
    on_failure: str = "sequential",
    interpret: bool = False,
    sequence_axis: str | None = None,
) -> tuple[Array, Array, SolveInfo]:
    """Compute a nonlinear recurrence over time.

        h_t = f(h_{t-1}, x_t)          h_0 = initial_state,   f = cell(params, h, x)

    Where `reset` is true, h_{t-1} is cleared to zero first. The states are computed step by step,
    or for all t at once by Newton's method, each step of which is a linear recurrence (DEER, arXiv
    2309.12252; ELK, 2407.19115; ParaRNN, 2510.21450). Gradients do not depend on the algorithm:
    they come from one linear recurrence backwards with the exact Jacobians at the solution. The
    states of the solution are the only residuals.

    Args:
      cell: f(params, h, x) -> h, one step of one sequence: h [D] or [D, k]. A `seqjax.cells` cell
        or any function. It must not close over arrays made inside `jit` or `grad`: pass these in
        `params`.
      params: pytree of arrays.
      xs: pytree of [B, T, ...] arrays.
      initial_state: [B, D], or [B, D, k] for D channels of k coupled numbers.
      reset: [B, T] bool.
      jacobian: the structure of df/dh: "diagonal" (channel by channel), "block" (k x k per
        channel) or "dense". "quasi" solves with the diagonal of a dense Jacobian, and gradients
        stay exact. "auto" uses the cell's declaration, or infers the structure from the function.
        A declared structure is checked.
      bounds: (lowest, highest) state, broadcastable to a state. A step of f from a state within
        the bounds must stay within them. By default the cell's own, if it has any. Wrong bounds
        cost iterations, but do not change the solution.
      guess: [B, T, ...] states from which Newton starts, such as those of an earlier call with
        similar parameters.
      solver: a `Newton`.
      algorithm: "newton" or "sequential". By default sequential on CPU, for dense cells (see
        `jacobian`) and for blocks of more than 8 numbers, Newton otherwise.
      implementation: "xla", the default, or "pallas": a sequential kernel for TPU, and for GPU from
        Hopper on. Those for TPU, and for matrices on GPU, are compiled and have not run yet. The
        cell must consist of elementwise operations and of products with matrices [D, D] of up to 16
        MiB on TPU, and 225 KiB with two steps of inputs on GPU. Leaves of `xs` end in D channels,
        in float32, bfloat16 or int32. On GPU, rows of elementwise cells are multiples of 16 bytes.
      on_failure: the action if Newton does not converge: "sequential" finishes step by step,
        "error" raises, "warn" warns and returns the unconverged states, flagged in `info`.
      interpret: run a kernel in interpret mode on any platform. This is slow. A cell with products
        with matrices uses the TPU kernel. Any other cell uses the GPU kernel, which requires jax
        0.11.2 or newer.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.

    Returns:
      (hs, final state, info): all states in the dtype of `xs`, the last one in float32, or float64
      if any argument is, and a `SolveInfo` with arrays [B].

    Raises:
      ValueError: if shapes or dtypes do not fit, the Jacobian does not have the declared structure,
        or Jacobians would take too much memory (see `Newton`).
      NotImplementedError: if the algorithm or implementation does not support the call or the
        platform.
      RuntimeError: if on_failure="error" and Newton does not converge (under `jit` as the error of
        a callback).

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> cell = lambda a, h, x: jnp.tanh(a * h + x)
      >>> xs, h0 = jnp.ones((1, 100, 4)), jnp.zeros((1, 4))
      >>> hs, last, info = seqjax.nonlinear_scan(cell, jnp.ones(4), xs, h0, algorithm="newton")
      >>> hs.shape, bool(info.converged[0]), int(info.iterations[0]) < 10
      ((1, 100, 4), True, True)
    """
    op = "nonlinear_scan"
    cell_checks.check_signature(op, cell, params, initial_state, xs)
    checks.check_sequence_axis(op, sequence_axis)
    if initial_state is None:
        raise ValueError(
            f"{op}: `initial_state` must have shape [B, D] or [B, D, k], got None; start from"
            " zeros, such as cell.initial_state(batch_size)."
        )
    params, xs, h0 = jax.tree.map(jnp.asarray, (params, xs, initial_state))
    batch, length, state = _check_arrays(op, params, xs, h0)
    cell_checks.check_arrays(op, cell, params, xs)
    reset = checks.check_reset(op, reset, batch, length)
    algorithm = backends.select_algorithm(
        op, algorithm, algorithms=("newton", "sequential"), length=length
    )
    if not isinstance(length, int):
        algorithm = "sequential"
    if on_failure not in ON_FAILURE:
        raise ValueError(
            f"{op}: `on_failure` must be one of {', '.join(ON_FAILURE)}, got {on_failure!r}."
        )
    try:
        hash(cell)
    except TypeError:
        raise ValueError(
            f"{op}: `cell` must be hashable, such as a function or a frozen dataclass,"
            f" got {type(cell).__name__}."
        ) from None
    structure = jacobian_structure.resolve(op, cell, params, xs, h0, jacobian)
    solver = solver or Newton()
    if algorithm == "newton":
        steps = length if solver.whole_iterations else min(solver.window, length)
        sizes = (batch, steps, *h0.shape[1:])
        memory_check.check_memory(op, structure[0], sizes, state.itemsize, solver.memory_fraction)
    own = getattr(cell, "bounds", None)
    if bounds is None and own is not None:
        bounds = own(params)
    backend = backends.select_backend(
        op,
        algorithm,
        implementation,
        interpret,
        length=length,
        unsupported=cell_kernel.unsupported(sequence_axis, params, xs, h0),
        refused=cell_kernel.refused(cell, structure[1], interpret),
    )
    wanted = (batch, length, *h0.shape[1:])
    guess = jnp.zeros(wanted, state) if guess is None else jnp.asarray(guess)
    if guess.shape != wanted:
        raise ValueError(f"{op}: `guess` must have shape {list(wanted)}, got {list(guess.shape)}.")
    return _scan(
        params,
        xs,
        h0.astype(state),
        jnp.zeros((batch, length), bool) if reset is None else reset,
        lax.stop_gradient(guess.astype(state)),
        bounds,
        cell=cell,
        structure=structure,
        solver=solver,
        algorithm=algorithm,
        on_failure=on_failure,
        sequence_axis=sequence_axis,
        has_resets=reset is not None,
        backend=backend,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "cell",
        "structure",
        "solver",
        "algorithm",
        "on_failure",
        "sequence_axis",
        "has_resets",
        "backend",
    ),
)
def _scan(
    params: PyTree,
    xs: PyTree,
    h0: Array,
    reset: Array,
    guess: Array,
    bounds: Any,
    *,
    cell: CellFunction,
    structure: tuple[str, str],
    solver: Newton,
    algorithm: str | None,
    on_failure: str,
    sequence_axis: str | None,
    has_resets: bool,
    backend: backends.Backend,
) -> tuple[Array, Array, SolveInfo]:
    out = jacobian_structure.float_leaves(xs)[0].dtype
    leaves, tree = jax.tree.flatten((params, xs, h0, reset, guess))
    params, xs, h0, reset, guess = jax.tree.unflatten(tree, jax_compat.match_varying(*leaves))
    # Without resets, skip the select in each step.
    step_reset = reset if has_resets else None
    params = jax.tree.map(lambda x: _widened(x, h0.dtype), params)
    bounds = lax.stop_gradient(bounds)
    if backend.mode is not backends.Mode.OFF:
        by_steps = functools.partial(
            _scan,
            solver=solver,
            algorithm="sequential",
            on_failure="sequential",
            sequence_axis=None,
            has_resets=has_resets,
            backend=backends.Backend(backend.op),
        )
        run = cell_kernel.by_kernel(backend, cell, structure, out, by_steps)
        hs, final = run(params, xs, h0, step_reset)
        finite = newton.over_state(jnp.isfinite(lax.stop_gradient(hs)), jnp.all).all(axis=1)
        info = _info_of_steps(lax.stop_gradient(hs).astype(h0.dtype), finite)
        if on_failure != "sequential":
            _report(info, on_failure)
        return hs, final, info
    xs = jax.tree.map(lambda x: _widened(x, h0.dtype), xs)

    # Stop gradients through the solver: derivatives come from the implicit function theorem below.
    fixed_params, fixed_xs, fixed_h0 = jax.tree.map(lax.stop_gradient, (params, xs, h0))
    problem = _problem(
        cell, fixed_params, structure[0], bounds, sequence_axis, (fixed_h0, fixed_xs, reset, guess)
    )

    def solve(algorithm: str, h0: Array) -> tuple[Array, SolveInfo]:
        here = problem._replace(h0=h0)
        steps = here._replace(reset=step_reset)
        if algorithm == "sequential":
            return _step_by_step(steps, sequence_axis)
        rescue = None
        if sequence_axis is not None:
            rescue = functools.partial(_device_by_device, steps, sequence_axis)
        finish = on_failure == "sequential"
        states, iterations, sequential_steps = newton.solve(
            here, solver, finish=finish, rescue=rescue
        )
        return states, _judge(here, solver, states, iterations, sequential_steps, sequence_axis)

    on_cpu = algorithm or "sequential"  # one Newton iteration costs more than all steps there
    # With a dense Jacobian an iteration multiplies D x D matrices at all t. On an H100 a GRU of
    # width 256 took 3,599 ms and 25 GB by Newton, and 15 ms step by step. A block of a head's
    # channels is a dense one in small.
    dense = "dense" in structure or ("block" in structure and h0.shape[-1] > 8)
    elsewhere = algorithm or ("sequential" if dense else "newton")
    # If the algorithms differ, both are traced here and again in the adjoint, because
    # `backends.by_platform` uses `lax.platform_dependent`.
    states, info = backends.by_platform(solve, on_cpu, elsewhere, problem.h0)
    if on_failure != "sequential":
        _report(info, on_failure)

    follow = derivatives(
        cell, structure[1], on_cpu, elsewhere, sequence_axis, solver, has_resets=has_resets
    )
    hs = follow(params, xs, h0, reset, lax.stop_gradient(states))
    final = hs[:, -1]
    if sequence_axis is not None:
        final = sequence_parallel.from_last(final, sequence_axis)
    return hs.astype(out), final, jax.tree.map(lax.stop_gradient, info)


def _problem(
    cell: CellFunction,
    params: PyTree,
    structure: str,
    bounds: Any,
    sequence_axis: str | None,
    arrays: tuple[Array, PyTree, Array, Array],
) -> newton.Problem:
    """Return the problem of a cell for the arrays (h0, xs, reset, guess)."""

    def over_steps(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(jax.vmap(function))

    def anywhere(mask: Array) -> Array:
        if sequence_axis is None:
            return mask
        return lax.psum(mask.astype(jnp.int32), sequence_axis) > 0

    return newton.Problem(
        *arrays,
        evaluate=over_steps(lambda h, x: cell(params, h, x)),
        step=lambda h, x: cell(params, h, x),
        linearise=over_steps(
            lambda h, x: jacobian_structure.jacobian(lambda h: cell(params, h, x), h, structure)
        ),
        correct=functools.partial(correction, sequence_axis=sequence_axis),
        previous=functools.partial(sequence_parallel.previous, axis_name=sequence_axis),
        anywhere=anywhere,
        bounds=bounds,
    )


def _device_by_device(problem: newton.Problem, sequence_axis: str) -> Array:
    """Compute all states step by step, one device after the other."""
    size = lax.axis_size(sequence_axis)
    entered, states = problem.h0, jnp.zeros(())
    for _ in range(size):
        states = newton.step_all(problem._replace(h0=entered))
        links = [(i, i + 1) for i in range(size - 1)]
        received = lax.ppermute(states[:, -1], sequence_axis, links)
        entered = jnp.where(sequence_parallel.is_first(sequence_axis), problem.h0, received)
    return states


def _step_by_step(problem: newton.Problem, sequence_axis: str | None) -> tuple[Array, SolveInfo]:
    """Compute all states step by step.

    The states are exact by construction, so `converged` only checks for non-finite values.
    """
    if sequence_axis is None:
        states = newton.step_all(problem)
    else:
        states = _device_by_device(problem, sequence_axis)
    finite = ~problem.anywhere(~newton.over_state(jnp.isfinite(states), jnp.all).all(axis=1))
    return states, _info_of_steps(states, finite, sequence_axis)


def _info_of_steps(states: Array, finite: Array, sequence_axis: str | None = None) -> SolveInfo:
    none = jnp.zeros_like(finite, jnp.int32)
    steps = none + states.shape[1] * (lax.axis_size(sequence_axis) if sequence_axis else 1)
    return SolveInfo(none, jnp.where(finite, 0.0, jnp.nan).astype(states.dtype), finite, steps)


def _judge(
    problem: newton.Problem,
    solver: Newton,
    states: Array,
    iterations: Array,
    steps: Array,
    sequence_axis: str | None,
) -> SolveInfo:
    """Return the residual and the convergence of the states that are returned."""
    gap = problem.evaluate(problem.before(states), problem.xs) - states
    off = newton.unconverged(gap, states, newton.tolerance(solver, states.dtype))
    worst = jnp.max(newton.over_state(jnp.abs(gap), jnp.max), axis=1)
    if sequence_axis is not None:
        # The counts are equal on all devices. The reduction removes the varying mesh axis.
        worst, iterations, steps = lax.pmax((worst, iterations, steps), sequence_axis)
    return SolveInfo(iterations, worst, ~problem.anywhere(off.any(axis=1)), steps)


def _report(info: SolveInfo, on_failure: str) -> None:
    """Raise or warn at run time if a sequence has not converged."""

    def tell(converged: Any, residual: Any) -> None:
        if converged.all():
            return
        text = (
            f"nonlinear_scan: {int((~converged).sum())} of {converged.size} sequences did not"
            f" converge (largest residual {residual.max():.1e}); increase `max_iterations`"
            " or decrease `window` in `solver`, or use on_failure='sequential'."
        )
        if on_failure == "error":
            raise RuntimeError(text)
        warnings.warn(text, stacklevel=2)

    jax.debug.callback(tell, info.converged, info.residual)


def _widened(x: Array, dtype: Any) -> Array:
    """Cast floating-point numbers to the state's dtype: residuals keep more than 8 bits."""
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _check_arrays(op: str, params: PyTree, xs: PyTree, h0: Array) -> tuple[int, int, Any]:
    if h0.ndim not in (2, 3) or 0 in h0.shape:
        raise ValueError(
            f"{op}: `initial_state` must have shape [B, D] or [B, D, k], got {list(h0.shape)}."
        )
    batch, length = checks.check_time_axes(op, "xs", xs)
    if batch != h0.shape[0]:
        raise ValueError(
            f"{op}: `initial_state` must have shape [B={batch}, ...], got {list(h0.shape)}."
        )
    floats = {"initial_state": h0} | {
        f"xs[{i}]": x for i, x in enumerate(jacobian_structure.float_leaves(xs))
    }
    floats |= {f"params[{i}]": x for i, x in enumerate(jacobian_structure.float_leaves(params))}
    checks.check_dtypes(op, floats, complex_ok=False)
    if not jacobian_structure.float_leaves(xs):
        raise ValueError(f"{op}: `xs` must hold at least one floating-point array.")
    return batch, length, checks.state_dtype(*floats.values())
