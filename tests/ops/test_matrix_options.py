"""Options of the matrix-state ops: shared heads, exclusive reads, normalizers, value decays.

The contract tests compare every option with a loop. These tests cover what the rows leave out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.ops.matrix_state import delta_rule
from tests.contract.harness import assert_close

pytestmark = pytest.mark.usefixtures("compiled_quickly")
B, T, G, H, K, V = 2, 9, 2, 6, 3, 4


def arrays(op, decay):
    rng = np.random.default_rng(0)
    keys = [name for name in ("q", "k", "a", "b") if name in "qk" or op.startswith("general")]
    made = {name: 0.5 * rng.standard_normal((B, T, G, K)) for name in keys}
    made["v"] = rng.standard_normal((B, T, H, V))
    if op == "delta_rule":
        made["beta"] = rng.uniform(0, 1, (B, T, H))
    if decay is not None:
        shape = (B, T, H) if decay == "scalar" else (B, T, H, K)
        made["log_decay"] = -rng.uniform(0, 1, shape)
    return made, rng.standard_normal((B, H, K, V)), rng.random((B, T)) < 0.2


def repeated(arrays):
    return {k: jnp.repeat(x, H // G, axis=2) if k in "qkab" else x for k, x in arrays.items()}


@pytest.mark.quick("linear_attention-None-chunked")
@pytest.mark.parametrize(
    "algorithm", ["chunked", pytest.param("sequential", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("op", "decay"),
    [
        ("linear_attention", None),
        pytest.param("linear_attention", "scalar", marks=pytest.mark.slow),
        ("delta_rule", "channel"),
        pytest.param("generalized_delta_rule", "scalar", marks=pytest.mark.slow),
    ],
)
def test_shared_heads_have_the_gradients_of_repeated_ones(op, decay, algorithm, x64, strict):
    given, state, reset = arrays(op, decay)
    run = functools.partial(getattr(seqjax, op), reset=reset, algorithm=algorithm, chunk_size=4)

    @jax.jit
    def both(given, state):
        def total(given, state, repeat):
            given = repeated(given) if repeat else given
            o, S = run(**given, initial_state=state)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(S))

        value = functools.partial(jax.value_and_grad(total, (0, 1)), given, state)
        return value(False), value(True)

    found, expected = both(given, state)
    assert_close(found, expected, 1e-12)


def test_heads_must_be_a_multiple_of_the_shared_ones():
    q, v = jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"^linear_attention: `v` must have a multiple of the G=2"):
        seqjax.linear_attention(q, q, v)


def test_options_that_exclude_each_other():
    q, v = jnp.ones((1, 2, 1, 3)), jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="`bonus` must be None without `exclusive`"):
        seqjax.linear_attention(q, q, v, bonus=jnp.ones(1))
    with pytest.raises(ValueError, match="`value_log_decay` must be None with `log_decay`"):
        seqjax.linear_attention(q, q, v, -jnp.ones((1, 2, 1)), value_log_decay=-v)
    with pytest.raises(ValueError, match="`value_log_decay` must be None with `normalizer`"):
        seqjax.linear_attention(q, q, v, normalizer=True, value_log_decay=-v)  # type: ignore[call-overload]


def test_a_bonus_per_head():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, G, K))
    v, bonus = rng.standard_normal((B, T, H, V)), rng.standard_normal(H)
    run = functools.partial(seqjax.linear_attention, q, k, v, exclusive=True)
    wide = np.broadcast_to(bonus[:, None], (H, K))
    assert_close(run(bonus=jnp.asarray(bonus)), run(bonus=jnp.asarray(wide)), 1e-5)


def test_the_momentum_state_has_two_matrices():
    x = jnp.ones((1, 2, 1, 3))
    beta = x[..., 0]
    with pytest.raises(ValueError, match=r"must have shape \[B, H, 2, K, V\]"):
        seqjax.momentum_delta_rule(x, x, x, beta, None, -beta, jnp.zeros((1, 1, 3, 3, 3)))


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_a_bfloat16_state_is_the_rounded_state(op):
    given, state, reset = arrays(op, "scalar")
    given = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
    run = functools.partial(getattr(seqjax, op), **given, reset=reset)
    narrow = jnp.asarray(state, jnp.bfloat16)
    o, final = run(initial_state=narrow, state_dtype=jnp.bfloat16)
    expected, wide = run(initial_state=narrow)
    assert final.dtype == jnp.bfloat16
    assert_close((o, final), (expected, wide.astype(jnp.bfloat16)), 1e-6)
    with pytest.raises(ValueError, match=f"^{op}: `state_dtype` must be bfloat16 or None, got"):
        run(state_dtype=jnp.float16)


@pytest.mark.parametrize("algorithm", ["sequential", "chunked", "associative"])
def test_exclusive_reads_see_nothing_across_a_reset(algorithm):
    """Check values and gradients with a NaN before a reset, and with a query of NaN at it."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 8, 1, n)), jnp.float32) for n in (2, 2, 3))
    reset = (jnp.arange(8) == 4)[None]

    def run(q, k, v):
        return seqjax.linear_attention(
            q, k, v, exclusive=True, reset=reset, algorithm=algorithm, chunk_size=4
        )[0]

    def loss(*arrays):
        return jnp.sum(run(*arrays)[:, 4:] ** 2)

    poisoned = k.at[0, 2].set(jnp.nan)
    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(q, poisoned, v):
        assert bool(jnp.isfinite(gradient[:, 4:]).all())
    found = jnp.isnan(run(q.at[0, 4].set(jnp.nan), k, v)[0, :, 0]).all(-1)
    assert found.tolist() == [t == 4 for t in range(8)]


def test_a_bonus_takes_part_in_the_dtypes():
    one = jnp.ones((1, 2, 1, 1))
    o, _ = seqjax.linear_attention(one, one, one, exclusive=True, bonus=jnp.full(1, 1j))
    assert o.ravel().tolist() == [1j, 1 + 1j]


@pytest.mark.parametrize("state", [jnp.ones((2, 1, 1, 1)), (jnp.ones((2, 1, 1, 1)), None)])
def test_a_normalizer_needs_both_parts_of_the_state(state):
    one = jnp.ones((2, 2, 1, 1))
    with pytest.raises(ValueError, match=r"^linear_attention: `initial_state` must be a pair"):
        seqjax.linear_attention(one, one, one, None, state, normalizer=True)


def test_exclusive_reads_use_normalized_queries_and_keys(x64):
    given, state, _ = arrays("delta_rule", None)
    unit = {n: given[n] / np.sqrt((given[n] ** 2).sum(-1, keepdims=True) + 1e-6) for n in "qk"}
    run = functools.partial(
        delta_rule._DELTA_RULE, initial_state=state, exclusive=True, bonus=jnp.full((H,), 0.5)
    )
    assert_close(run(given, normalize=True), run(given | unit), 1e-12)
