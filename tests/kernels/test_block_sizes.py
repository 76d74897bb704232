"""Block sizes of the callers: the grid that they give, and equal results of interpreted kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

import seqjax
from tests.contract.harness import assert_close

B, T = 1, 20


def heads(count, *names):
    """Return the shapes of a matrix-state op; `names` are further vectors."""
    vectors = dict.fromkeys(("q", "k", "v", *names), (B, T, count, 2))
    return vectors | {"log_decay": (B, T, count)}


# Op -> shapes of its arguments, block sizes, and the grid that they give.
CALLS = {
    "linear_scan": ({"decay": (B, T, 200), "x": (B, T, 200)}, (16, 128), (B, 2, 2)),
    "selective_scan": (
        {"x": (B, T, 200), "dt": (B, T, 200), "A": (200, 2), "B": (B, T, 2), "C": (B, T, 2)},
        (16, 128),
        (B, 2, 2),
    ),
    # By default, 9 heads are two blocks.
    "linear_attention": (heads(9), (16, 9), (B, 1, 2)),
    "delta_rule": (heads(2) | {"beta": (B, T, 2)}, (16, 2), (B, 1, 2)),
    "generalized_delta_rule": (heads(2, "a", "b"), (16, 2), (B, 1, 2)),
}


def arguments(op):
    rng = np.random.default_rng(0)
    given = {name: 0.5 * rng.standard_normal(shape) for name, shape in CALLS[op][0].items()}
    for name in {"log_decay", "A"} & given.keys():
        given[name] = -np.abs(given[name])
    return {name: jnp.asarray(x) for name, x in given.items()}


@pytest.fixture
def grids(monkeypatch):
    """Return the list of the grids of the kernels that are traced."""
    found, call = [], pallas.pallas_call
    monkeypatch.setattr(
        pallas,
        "pallas_call",
        lambda *args, grid, **kw: found.append(grid) or call(*args, grid=grid, **kw),
    )
    return found


@pytest.mark.quick("linear_scan")
@pytest.mark.parametrize("op", CALLS)
def test_block_sizes_change_the_grid_and_no_number(op, grids, x64, strict, compiled_quickly):
    """Check outputs, final state and gradients; T, and D of an elementwise op, are ragged."""
    given = arguments(op)
    reset = np.arange(T)[None] == 11

    def results(block_sizes):
        run = functools.partial(
            getattr(seqjax, op), reset=reset, block_sizes=block_sizes, interpret=True
        )

        @jax.jit
        def both(given):
            out, pull = jax.vjp(lambda given: run(**given), given)
            return out, pull(jax.tree.map(jnp.cos, out))

        return both(given)

    _, block_sizes, grid = CALLS[op]
    expected = results(None)
    assert grid not in grids
    assert_close(results(block_sizes), expected, 1e-11)
    assert grids.count(grid) == 2  # forward and backward
