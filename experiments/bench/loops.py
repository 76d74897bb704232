"""Times of the elementwise scan, of `decay + x` and of a loop that numba compiles, in one process.

Memory that is new to the process has to be mapped page by page, which takes as long as a loop over
it. So the table separates outputs that are allocated by the call ("fresh"), outputs in an existing
array ("given"), and calls whose input `x` may be overwritten ("donated").
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from experiments.bench.peers import installed
from experiments.bench.tools import ONLY, SCAN_SHAPES, Candidates, Table, processor_times

REFERENCE = "decay + x"


def candidates(*shape: int) -> tuple[Candidates, Candidates]:
    """Return the calls for the outputs, and those that also compute gradients, by name."""
    keys = jax.random.split(jax.random.key(0), 2)
    decay, x = jax.random.uniform(keys[0], shape), jax.random.normal(keys[1], shape)

    def scan(decay: jax.Array, x: jax.Array) -> jax.Array:
        return seqjax.linear_scan(decay, x)[0]

    def both(decay: jax.Array, x: jax.Array) -> Any:
        y, pull = jax.vjp(scan, decay, x)
        return y, pull(y)

    forward: Candidates = {
        REFERENCE: functools.partial(jax.jit(jnp.add), decay, x),
        "seqjax": functools.partial(jax.jit(scan), decay, x),
        "decay + x, donated": _Donated(jnp.add, decay, x),
        "seqjax, donated": _Donated(scan, decay, x),
    }
    gradients: Candidates = {
        REFERENCE: forward[REFERENCE],
        "seqjax, with gradients": functools.partial(jax.jit(both), decay, x),
    }
    if numba := installed("numba"):
        loop, adjoint = (numba.njit(f, fastmath=True) for f in (scan_loop, adjoint_loop))
        a, v, given = np.array(decay), np.array(x), np.zeros_like(x)

        def numba_both() -> Any:
            y = loop(a, v, np.empty_like(v))
            return y, adjoint(a, y, y)

        forward["numba"] = lambda: loop(a, v, np.empty_like(v))
        forward["numba, given"] = lambda: loop(a, v, given)
        gradients["numba, with gradients"] = numba_both
    return forward, gradients


class _Donated:
    """A call that may overwrite its argument `x`; its result is the next call's `x`."""

    def __init__(self, function: Any, decay: jax.Array, x: jax.Array) -> None:
        self._run, self._decay = jax.jit(function, donate_argnums=1), decay
        self._x = jnp.array(x)  # a copy

    def __call__(self) -> jax.Array:
        self._x = self._run(self._decay, self._x)
        return self._x


def scan_loop(a: Any, x: Any, y: Any) -> Any:
    """Write the states of the scan to y."""
    for b in range(x.shape[0]):
        y[b, 0] = x[b, 0]
        for t in range(1, x.shape[1]):
            for d in range(x.shape[2]):
                y[b, t, d] = a[b, t, d] * y[b, t - 1, d] + x[b, t, d]
    return y


def adjoint_loop(a: Any, y: Any, dy: Any) -> Any:
    """Return the cotangents of the decays and of x."""
    da, dx = np.empty_like(y), np.empty_like(y)
    for b in range(y.shape[0]):
        for d in range(y.shape[2]):
            dx[b, -1, d] = dy[b, -1, d]
            da[b, 0, d] = 0
        for t in range(y.shape[1] - 1, 0, -1):
            for d in range(y.shape[2]):
                da[b, t, d] = dx[b, t, d] * y[b, t - 1, d]
                dx[b, t - 1, d] = dy[b, t - 1, d] + a[b, t, d] * dx[b, t, d]
    return da, dx


def bench_loops(rounds: int) -> None:
    """Print processor times over that of `decay + x`, as minimum / median over the rounds."""
    shapes = [shape for shape in SCAN_SHAPES if f"linear_scan, {[*shape]}".startswith(ONLY.value)]
    if not shapes:
        return
    table = Table(f"Elementwise scan, float32: processor time over that of `{REFERENCE}`")
    for shape in shapes:
        row: dict[str, float | str] = {}
        for group in candidates(*shape):
            times = processor_times(group, rounds)
            low, middle = (pick(times[REFERENCE]) for pick in (min, statistics.median))
            row |= {
                name: f"{min(found) / low:.2f} / {statistics.median(found) / middle:.2f}"
                for name, found in times.items()
                if name != REFERENCE
            }
        table.row(f"linear_scan, {[*shape]}", row)
