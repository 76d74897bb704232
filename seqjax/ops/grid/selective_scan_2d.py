"""The selective scan over a grid: a two-dimensional diagonal state space."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import checks, explicit_mesh, jax_compat
from seqjax.ops.core.linalg import along_rows, down_columns, everywhere, matmul
from seqjax.ops.grid import grid_scan
from seqjax.ops.grid.grid_scan import Algorithm
from seqjax.types import Array, Float

OP = "selective_scan_2d"
PATTERNS = {
    "x": "B X Y D",
    "dt": "B X Y axes D",
    "A": "axes axes D N",
    "B": "B X Y axes N",
    "C": "B X Y axes N",
    "D": "D",
}


@explicit_mesh.auto_inside(grid_scan.like("x"))
def selective_scan_2d(
    x: Float[Array, "B X Y D"],
    dt: Float[Array, "B X Y 2 D"],
    A: Float[Array, "2 2 D N"],
    B: Float[Array, "B X Y 2 N"],
    C: Float[Array, "B X Y 2 N"],
    D: Float[Array, "D"] | None = None,
    *,
    algorithm: Algorithm | None = None,
) -> Float[Array, "B X Y D"]:
    """Compute a selective state space over a grid: the recurrence of Chimera (arXiv 2406.04320).

        h_0(i, j) = a_00 h_0(i-1, j) + a_01 h_1(i-1, j) + b_0 x(i, j)         h [D, N]
        h_1(i, j) = a_10 h_0(i, j-1) + a_11 h_1(i, j-1) + b_1 x(i, j)
        y(i, j) = h_0 C_0 + h_1 C_1 + D * x

        a_pp = exp(dt_p A_pp),   a_pq = f_p A_pq for p != q,   b_p = f_p B_p^T
        f_p = (exp(dt_p A_pp) - 1) / A_pp, which is dt_p where A_pp = 0

    h_0 is carried along the axis X and h_1 along the axis Y. The products are elementwise. dt, B
    and C are those of the node (i, j). This is the zero-order hold of a continuous model of
    Roesser's form. With A_01 = A_10 = 0, it is the sum of two one-dimensional state spaces. The
    2-D SSM of arXiv 2306.06635 has this recurrence with constant a and b, without step sizes, and
    with separate B and C for each channel.

    An output depends on the nodes (i', j') with i' <= i and j' <= j only. Flip the arrays for other
    orientations. The op has no initial state and no resets. Both algorithms are exact for every A.

    Args:
      x: [B, X, Y, D].
      dt: [B, X, Y, 2, D], the step sizes along X and along Y (after softplus).
      A: [2, 2, D, N], real; A[0, 0] and A[1, 1] negative for decaying states.
      B: [B, X, Y, 2, N].
      C: [B, X, Y, 2, N].
      D: [D], the skip connection; by default there is none.
      algorithm: "diagonals" (X + Y - 1 steps, each for an anti-diagonal) or "rows" (one step for
        each row along the shorter axis, with a scan of log depth inside). By default "diagonals".
        It is the faster one on CPU. Accelerators have not been benchmarked yet.

    Returns:
      y [B, X, Y, D] in the dtype of `x`. States are float32, or float64 for float64 input. The
      states [B, X, Y, 2, D, N] are never all in memory.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the algorithm is unknown.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> x, pair = jnp.ones((1, 2, 2, 1)), jnp.ones((1, 2, 2, 2, 1))
      >>> seqjax.selective_scan_2d(x, pair, jnp.zeros((2, 2, 1, 1)), pair, pair).ravel().tolist()
      [2.0, 3.0, 3.0, 4.0]
    """
    given = checks.as_arrays({"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D})
    sizes = checks.check_shapes(OP, PATTERNS, given)
    if sizes["axes"] != 2:
        raise ValueError(
            f"{OP}: `dt` must have shape [B, X, Y, 2, D], got {list(given['dt'].shape)}."
        )
    checks.check_dtypes(OP, given, complex_ok=False)
    grid_scan.check_algorithm(OP, algorithm)
    return _scan(*given.values(), algorithm=algorithm or "diagonals")


@functools.partial(jax.jit, static_argnames=("algorithm",))
def _scan(*arrays: Array | None, algorithm: Algorithm) -> Array:
    x, dt, A, B, C, D = jax_compat.match_varying(*arrays)
    out, wide = x.dtype, checks.state_dtype(*arrays)
    x, dt, A, B, C = (z.astype(wide) for z in (x, dt, A, B, C))
    rows, columns = x.shape[1:3]
    # Fewer lanes or fewer rows: the states change places with the axes.
    turned = columns > rows if algorithm == "diagonals" else rows > columns
    order = (1, 0) if turned else (0, 1)
    inputs = {"x": x} | {
        name: tuple(z[:, :, :, p] for p in order) for name, z in (("dt", dt), ("B", B), ("C", C))
    }
    shared = tuple(A[p, q] for p in order for q in order)
    if turned:
        inputs = jax.tree.map(lambda z: jnp.swapaxes(z, 1, 2), inputs)
    zero = jnp.zeros_like(inputs["x"][:, 0, :, :, None] * A[0, 0])
    if algorithm == "diagonals":
        y = grid_scan.by_diagonals(_node, (zero, zero), inputs, shared)
    else:
        y = grid_scan.by_rows(_row, (zero, zero), inputs, shared)
    y = jnp.swapaxes(y, 1, 2) if turned else y
    return (y if D is None else y + D.astype(wide) * x).astype(out)


def _node(left: Any, up: Any, now: Any, *A: Array) -> tuple[Any, Array]:
    """Return both states of the nodes [B, L], and the outputs."""
    (a00, a01, b0), (a10, a11, b1) = _discrete(now, *A)
    h0 = a00 * left[0] + a01 * left[1] + b0
    h1 = a10 * up[0] + a11 * up[1] + b1
    return (h0, h1), _read(h0, h1, now)


def _row(left: Any, now: Any, *A: Array) -> tuple[Any, Array]:
    """Return both states of a row [B, Y], and the outputs."""
    (a00, a01, b0), (a10, a11, b1) = _discrete(now, *A)
    h0 = a00 * left[0] + a01 * left[1] + b0
    h1 = grid_scan.scan_row(a11, a10 * grid_scan.shifted(h0) + b1)
    return (h0, h1), _read(h0, h1, now)


def _discrete(now: Any, *A: Array) -> Any:
    """Return (a_p0, a_p1, b_p x) of both axes p, [B, L, D, N]."""
    lead, states = now["x"].shape[:-1], A[0].shape[-1]
    x = along_rows(now["x"], states)
    found = []
    for p in (0, 1):
        own, cross = everywhere(A[3 * p], lead), everywhere(A[1 + p], lead)
        step = along_rows(now["dt"][p], states)
        z = step * own
        held = step * _hold(z)
        written = held * down_columns(now["B"][p], x.shape[-2]) * x
        pair = (jnp.exp(z), held * cross)
        found.append((*(pair if p == 0 else pair[::-1]), written))
    return found


def _read(h0: Array, h1: Array, now: Any) -> Array:
    C0, C1 = now["C"]
    return matmul(h0, C0[..., None])[..., 0] + matmul(h1, C1[..., None])[..., 0]


def _hold(z: Array) -> Array:
    """Return (e^z - 1) / z, and its derivatives, without cancellation at small z."""
    small = jnp.abs(z) < 0.25
    series = jnp.ones_like(z)
    near = jnp.where(small, z, 0)
    for n in range(12, 1, -1):  # 1 + z/2 (1 + z/3 (1 + z/4 (...))); the rest is 0.25^12 / 13!
        series = 1 + near / n * series
    far = jnp.where(small, 1, z)
    return jnp.where(small, series, jnp.expm1(far) / far)
