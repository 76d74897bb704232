"""The recurrence of pLSTM over a grid: matrix states on the edges right and down."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import checks, explicit_mesh, jax_compat
from seqjax.ops.core.linalg import outer, read
from seqjax.ops.grid import grid_scan
from seqjax.ops.grid.grid_scan import Algorithm
from seqjax.types import Array, Float

OP = "plstm_2d"
PATTERNS = {
    "q": "B X Y H K",
    "k": "B X Y H K",
    "v": "B X Y H V",
    "source": "B X Y H edges",
    "transition": "B X Y H edges edges",
    "mark": "B X Y H edges",
}


@explicit_mesh.auto_inside(grid_scan.like("v"))
def plstm_2d(
    q: Float[Array, "B X Y H K"],
    k: Float[Array, "B X Y H K"],
    v: Float[Array, "B X Y H V"],
    source: Float[Array, "B X Y H 2"],
    transition: Float[Array, "B X Y H 2 2"],
    mark: Float[Array, "B X Y H 2"],
    direct: Float[Array, "B X Y H"] | None = None,
    *,
    scale: float | None = None,
    algorithm: Algorithm | None = None,
) -> Float[Array, "B X Y H V"]:
    """Compute the recurrence of pLSTM over a grid (arXiv 2506.11997).

        E_0(x, y) = T_00 E_0(x-1, y) + T_01 E_1(x, y-1) + s_0 k v^T        [K, V] per head
        E_1(x, y) = T_10 E_0(x-1, y) + T_11 E_1(x, y-1) + s_1 k v^T
        o(x, y) = scale (m_0 E_0(x-1, y) + m_1 E_1(x, y-1) + d k v^T)^T q

    E_0(x, y) is the state of the edge from (x, y) to (x+1, y), and E_1(x, y) that of the edge to
    (x, y+1). Edges that enter the grid are zero. All other arrays are those of the node (x, y). A
    node reads the edges that enter it, so m does not see the node's own source. The four entries of
    T are numbers (J = 1 in the paper).

    An output depends on the nodes (x', y') with x' <= x and y' <= y only. Flip the arrays for other
    orientations. The op has no initial state and no resets.

    Both algorithms are exact for every transition. With T_01 or T_10 zero (the paper's D-mode),
    there is one path between two nodes. States stay bounded if abs(T) <= 1. With two couplings
    (P-mode), the number of paths grows exponentially. States stay bounded if each column of abs(T)
    sums to at most 1.

    Args:
      q: [B, X, Y, H, K].
      k: [B, X, Y, H, K].
      v: [B, X, Y, H, V].
      source: s, [B, X, Y, H, 2]: weights of the node's own input on both leaving edges.
      transition: T, [B, X, Y, H, 2, 2]: from the entering edges (last axis) to the leaving edges.
      mark: m, [B, X, Y, H, 2]: weights of the entering edges in the output.
      direct: d, [B, X, Y, H], the weight of the node's own input; by default 0.
      scale: factor of the outputs, a number; by default K^-0.5.
      algorithm: "diagonals" (X + Y - 1 steps, each for an anti-diagonal) or "rows" (one step for
        each row along the shorter axis, with a scan of log depth inside). By default "diagonals".
        It is the faster one on CPU. Accelerators have not been benchmarked yet.

    Returns:
      o [B, X, Y, H, V] in the dtype of `v`. States are float32, or float64 for float64 input.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the algorithm is unknown.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> one = jnp.ones((1, 2, 2, 1, 1))
      >>> pair, half = jnp.ones((1, 2, 2, 1, 2)), jnp.full((1, 2, 2, 1, 2, 2), 0.5)
      >>> seqjax.plstm_2d(one, one, one, pair, half, pair)[0, :, :, 0, 0].tolist()
      [[0.0, 1.0], [1.0, 3.0]]
    """
    given = checks.as_arrays(
        {"q": q, "k": k, "v": v, "source": source, "transition": transition, "mark": mark}
    )
    sizes = checks.check_shapes(OP, PATTERNS, given)
    if sizes["edges"] != 2:
        raise ValueError(
            f"{OP}: `source` must have shape [B, X, Y, H, 2], got {list(given['source'].shape)}."
        )
    given["direct"] = None if direct is None else jnp.asarray(direct)
    if direct is not None:
        nodes = "B={B} X={X} Y={Y} H={H}".format(**sizes)
        wanted = tuple(sizes[axis] for axis in "BXYH")
        if given["direct"].shape != wanted:
            raise ValueError(
                f"{OP}: `direct` must have shape [{', '.join(nodes.split())}], got"
                f" {list(given['direct'].shape)}."
            )
    checks.check_dtypes(OP, given, complex_ok=False)
    grid_scan.check_algorithm(OP, algorithm)
    factor = checks.check_scale(OP, scale)
    if factor is None:
        factor = jnp.asarray(sizes["K"] ** -0.5)
    return _scan(*given.values(), factor, algorithm=algorithm or "diagonals")


@functools.partial(jax.jit, static_argnames=("algorithm",))
def _scan(*arrays: Array | None, algorithm: Algorithm) -> Array:
    q, k, v, source, transition, mark, direct, scale = jax_compat.match_varying(*arrays)
    out, wide = v.dtype, checks.state_dtype(q, k, v, source, transition, mark, direct)
    q, k, v = q.astype(wide) * scale.astype(wide), k.astype(wide), v.astype(wide)
    source, transition, mark = (z.astype(wide) for z in (source, transition, mark))
    # The last axes of the gates come first, so that their parts are whole arrays.
    s, m = (jnp.moveaxis(z, -1, 0) for z in (source, mark))
    t = jnp.moveaxis(transition, (-2, -1), (0, 1))
    rows, columns = q.shape[1:3]
    # Fewer lanes or fewer rows: the edges change places with the axes.
    turned = columns > rows if algorithm == "diagonals" else rows > columns
    a, b = (1, 0) if turned else (0, 1)
    inputs: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "s": (s[a], s[b]),
        "m": (m[a], m[b]),
        "t": ((t[a, a], t[a, b]), (t[b, a], t[b, b])),
    }
    if turned:
        inputs = jax.tree.map(lambda z: jnp.swapaxes(z, 1, 2), inputs)
    zero = jnp.zeros_like(outer(inputs["k"][:, 0], inputs["v"][:, 0]))
    if algorithm == "diagonals":
        o = grid_scan.by_diagonals(_node, (zero, zero), inputs)
    else:
        o = grid_scan.by_rows(_row, zero, inputs)
    o = jnp.swapaxes(o, 1, 2) if turned else o
    if direct is not None:
        own = jnp.sum(q * k, axis=-1) * direct.astype(wide)
        o = o + own[..., None] * v
    return o.astype(out)


def _weigh(weight: Array, state: Array) -> Array:
    return weight[..., None, None] * state


def _node(left: Any, up: Any, x: Any) -> tuple[Any, Array]:
    """Return both edges that leave the nodes [B, L], and the outputs."""
    entering, written = (left[0], up[1]), outer(x["k"], x["v"])
    leaving = tuple(
        _weigh(t[0], entering[0]) + _weigh(t[1], entering[1]) + _weigh(s, written)
        for t, s in zip(x["t"], x["s"], strict=True)
    )
    return leaving, _read(entering, x)


def _row(left: Array, x: Any) -> tuple[Array, Array]:
    """Return the edges to the next row, and the outputs, of a row [B, Y]."""
    (t00, t01), (t10, t11) = x["t"]
    written = outer(x["k"], x["v"])
    entering = _weigh(t10, left) + _weigh(x["s"][1], written)
    up = grid_scan.shifted(grid_scan.scan_row(t11[..., None, None], entering))
    leaving = _weigh(t00, left) + _weigh(t01, up) + _weigh(x["s"][0], written)
    return leaving, _read((left, up), x)


def _read(entering: tuple[Array, Array], x: Any) -> Array:
    seen = _weigh(x["m"][0], entering[0]) + _weigh(x["m"][1], entering[1])
    return read(seen, x["q"])
