"""`step_scan`: states of any dtype, fresh states, memory, devices in turn, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import seqjax

pytestmark = pytest.mark.usefixtures("compiled_quickly")
B, T = 2, 16


def step(params, state, x):
    """Count steps, keep the largest input, and add up the inputs of even steps."""
    count, largest, total = state
    total = jnp.where(count % 2 == 0, params["keep"] * total + x, total)
    return (count + 1, jnp.maximum(largest, x), total), (total, count)


def draw():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, 3)))
    reset = jnp.zeros((B, T), bool).at[1, jnp.array([4, 9])].set(True)
    fresh = jnp.zeros(B, jnp.int32), jnp.full((B, 3), -jnp.inf), jnp.full((B, 3), 0.25)
    return {"keep": jnp.full(3, 0.9)}, x, fresh, reset


def looped(params, x, fresh, reset):
    totals, counts = np.zeros(x.shape), np.zeros(x.shape[:2], int)
    for b in range(B):
        state = [np.asarray(f[b]) for f in fresh]
        for t in range(T):
            if reset[b, t]:
                state = [np.asarray(f[b]) for f in fresh]
            count, largest, total = state
            total = params["keep"] * total + x[b, t] if count % 2 == 0 else total
            totals[b, t], counts[b, t] = total, count
            state = [count + 1, np.maximum(largest, x[b, t]), total]
    return totals, counts


@pytest.mark.slow
def test_integers_in_the_state_and_a_fresh_state(x64, strict):
    params, x, fresh, reset = draw()
    run = functools.partial(seqjax.step_scan, step, chunk_size=4)
    (totals, counts), final = run(params, x, fresh_state=fresh, reset=reset)
    wanted = looped(params, x, fresh, reset)
    np.testing.assert_allclose(totals, wanted[0], rtol=1e-12)
    np.testing.assert_array_equal(counts, wanted[1])
    assert final[0].tolist() == [16, 7]
    np.testing.assert_array_equal(final[1], [x[0].max(0), x[1, 9:].max(0)])

    early, state = run(params, x[:, :5], fresh_state=fresh, reset=reset[:, :5])
    late, last = run(params, x[:, 5:], state, fresh_state=fresh, reset=reset[:, 5:])
    np.testing.assert_allclose(np.concatenate([early[0], late[0]], 1), totals, rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, last, final)

    def loss(params, x):
        return jnp.sum(run(params, x, fresh_state=fresh, reset=reset)[0][0] ** 2)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    moved = 1e-6 * jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape)
    slope = (loss(params, x + moved) - loss(params, x - moved)) / 2
    np.testing.assert_allclose(jnp.sum(grads[1] * moved), slope, rtol=1e-6)
    assert np.isfinite(grads[0]["keep"]).all()

    mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda p, x, f, r: run(p, x, fresh_state=f, reset=r, sequence_axis="time"),
        mesh=mesh,
        in_specs=(P(), P(None, "time"), P(), P(None, "time")),
        out_specs=(P(None, "time"), P()),
    )
    (parts, numbers), last = jax.jit(split)(params, x, fresh, reset)
    np.testing.assert_allclose(parts, totals, rtol=1e-12)
    np.testing.assert_array_equal(numbers, counts)
    jax.tree.map(np.testing.assert_array_equal, last, final)


def test_states_are_not_stored():
    """Check that the backward pass stores one matrix per chunk, and the inputs."""
    size, length = 32, 4096

    def grow(params, S, x):
        S = S + jnp.outer(jnp.tanh(S.T @ x), x) * params
        return S, S @ x

    def both(params, xs):
        def run(params, xs):
            return seqjax.step_scan(grow, params, xs, jnp.zeros((1, size, size)))[0]

        y, pull = jax.vjp(run, params, xs)
        return pull(jnp.ones_like(y))

    args = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1, length, size), "float32")
    memory = jax.jit(both).lower(*args).compile().memory_analysis().temp_size_in_bytes
    states = length // 64 + 2 * 64  # one per chunk, and those of one chunk with their cotangents
    assert memory < 4 * (1.5 * states * size * size + 8 * length * size)


def test_errors():
    params, x, fresh, reset = draw()
    run = functools.partial(seqjax.step_scan, step, params, x, fresh)

    def refused(match, call, *args, **keywords):
        with pytest.raises(ValueError, match=f"^step_scan: {match}"):
            call(*args, **keywords)

    refused(r"`step` must be a function of .* got int", seqjax.step_scan, 1, params, x, fresh)
    refused(
        r"`step` must be a .* got one of \(x\)", seqjax.step_scan, lambda x: x, params, x, fresh
    )
    refused(r"every leaf of `xs` must .* got \[3\]", seqjax.step_scan, step, params, x[0, 0], fresh)
    refused(r"`initial_state` must be .* got None", seqjax.step_scan, step, params, x)
    refused(r"every leaf of `initial_state` .*\[B=2", seqjax.step_scan, step, params, x, x[:1, 0])
    refused(r"`fresh_state` must have the structure", run, fresh_state=x[:, 0])
    refused(r"`reset` must have shape", run, reset=reset[:, 1:])
    refused(r"`chunk_size` must be a positive", run, chunk_size=0)
    for wrong, match in (
        (lambda p, s, x: s, r"must return \(state, y\), got a tuple of 3"),
        (lambda p, s, x: (s[0], x), r"must return .* structure, a tuple of 3, got an array"),
        (
            lambda p, s, x: ((s[0], s[1], s[2][:1]), x),
            r"must return .* float32\[3\], got float32\[1",
        ),
        (lambda p, s, x: ((s[1][0], s[1], s[2]), x), r"must return .* int32\[\], got float32\[\]"),
    ):
        refused(f"`step` {match}", seqjax.step_scan, wrong, params, x, fresh)
