"""`seqjax.ops.previous`: resets, carried state, trees, derivatives, a mesh axis, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import seqjax

B, T = 2, 16


def draw():
    rng = np.random.default_rng(0)
    x = {"a": jnp.asarray(rng.normal(size=(B, T, 3))), "b": jnp.asarray(rng.random((B, T)) > 0.5)}
    start = {"a": jnp.asarray(rng.normal(size=(B, 3))), "b": jnp.ones(B, bool)}
    reset = jnp.zeros((B, T), bool).at[1, jnp.array([0, 5, 6])].set(True)
    return x, start, reset


def shifted(x, start, reset):
    """Compute `previous` with a loop."""
    out = np.zeros_like(x)
    for t in range(T):
        before = start if t == 0 else x[:, t - 1]
        clear = np.asarray(reset[:, t]).reshape(B, *(1,) * (before.ndim - 1))
        out[:, t] = np.where(clear, np.zeros_like(before), before)
    return out


@pytest.mark.slow
def test_values_split_and_devices():
    x, start, reset = draw()
    y, last = seqjax.ops.previous(x, start, reset)
    for name in x:
        np.testing.assert_array_equal(y[name], shifted(x[name], start[name], reset))
        np.testing.assert_array_equal(last[name], x[name][:, -1])
    early, late = (jax.tree.map(lambda z, p=p: z[:, p], x) for p in (slice(7), slice(7, T)))
    y_early, state = seqjax.ops.previous(early, start, reset[:, :7])
    y_late, _ = seqjax.ops.previous(late, state, reset[:, 7:])
    np.testing.assert_array_equal(jnp.concatenate([y_early["a"], y_late["a"]], 1), y["a"])
    mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        functools.partial(seqjax.ops.previous, sequence_axis="time"),
        mesh=mesh,
        in_specs=(P(None, "time"), P(), P(None, "time")),
        out_specs=(P(None, "time"), P()),
    )
    jax.tree.map(np.testing.assert_array_equal, split(x, start, reset), (y, last))


def test_derivatives_and_vmap():
    x, start, reset = draw()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, 3)))

    def loss(x, start):
        return jnp.sum(weight * seqjax.ops.previous(x, start, reset)[0] ** 2)

    dx, d_start = jax.grad(loss, (0, 1))(x["a"], start["a"])
    write = jnp.where(reset[..., None], 0, weight)
    wanted = jnp.concatenate([write[:, 1:], jnp.zeros_like(write[:, :1])], axis=1) * 2 * x["a"]
    np.testing.assert_allclose(dx, wanted, rtol=1e-6)
    np.testing.assert_allclose(d_start, 2 * write[:, 0] * start["a"], rtol=1e-6)
    both = jax.vmap(lambda x: seqjax.ops.previous(x, fill=-1.0)[0])(jnp.stack([x["a"], -x["a"]]))
    np.testing.assert_array_equal(both[1, :, 1:], -x["a"][:, :-1])
    assert (both[:, :, 0] == -1).all()


def test_errors():
    x, _, _ = draw()
    with pytest.raises(ValueError, match=r"previous: every leaf of `x` must have shape \[B, T"):
        seqjax.ops.previous({"a": x["a"], "b": jnp.ones((B, T + 1))})
    with pytest.raises(ValueError, match="previous: `initial_state` must have the structure of"):
        seqjax.ops.previous(x, {"a": jnp.ones((B, 3))})
    with pytest.raises(ValueError, match="previous: `reset` must"):
        seqjax.ops.previous(x, reset=jnp.ones((B, T)))
