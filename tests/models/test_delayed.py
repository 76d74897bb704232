"""Matrix memories read before a write, or written by two points, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.layers._delayed import two_point
from seqjax.layers.context import Context
from tests.contract.harness import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, H, K, V = 2, 9, 2, 3, 4


def arrays(channels):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, H, K))
    v, memory = rng.standard_normal((B, T, H, V)), rng.standard_normal((B, H, K, V))
    decay = -rng.random((B, T, H, K) if channels else (B, T, H))
    decay[0, 2] = -np.inf
    reset = np.zeros((B, T), bool)
    reset[0, 0] = reset[1, 4] = reset[1, 5] = True
    return rng, q, k, v, decay, memory, reset


def pieces(run, state, sizes):
    """Run consecutive pieces of the sequence, each from the state of the piece before."""
    outputs, start = [], 0
    for size in sizes:
        o, state = run(slice(start, start + size), state)
        outputs.append(o)
        start += size
    return np.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("sizes", [(T,), (4, 1, 4), (1,) * T])
@pytest.mark.parametrize("channels", [False, True])
def test_exclusive_reads(channels, sizes, x64, strict):
    rng, q, k, v, decay, memory, reset = arrays(channels)
    bonus = rng.standard_normal((H, K))

    @jax.jit
    def call(q, k, v, decay, memory, reset):
        return seqjax.linear_attention(
            q, k, v, decay, memory, scale=1.0, exclusive=True, bonus=bonus, reset=reset
        )

    o, final = pieces(
        lambda s, m: call(q[:, s], k[:, s], v[:, s], decay[:, s], m, reset[:, s]), memory, sizes
    )
    S, expected = memory.copy(), np.zeros_like(v)
    for b, t, h in np.ndindex(B, T, H):
        if reset[b, t]:
            S[b, h] = 0
        write = np.outer(k[b, t, h], v[b, t, h])
        expected[b, t, h] = (S[b, h] + bonus[h][:, None] * write).T @ q[b, t, h]
        S[b, h] = np.exp(decay[b, t, h]).reshape(-1, 1) * S[b, h] + write
    assert_close((o, final), (expected, S), 1e-12)


@pytest.mark.parametrize("sizes", [(T,), (4, 1, 4), (1,) * T])
@pytest.mark.parametrize("rank", [1, 3])
def test_two_point(rank, sizes, x64, strict):
    rng, *_, decay, memory, reset = arrays(channels=False)
    q, k = rng.standard_normal((2, B, T, rank, H, K))
    v = rng.standard_normal((B, T, rank, H, V))
    before, now = rng.random((2, B, T, H))
    last_k, last_v = k[:, 3] + 1, v[:, 3] + 1
    state = {"memory": memory, "k": last_k, "v": last_v}

    @jax.jit
    def call(q, k, v, decay, before, now, state, reset):
        return two_point(q, k, v, decay, (before, now), state, Context(reset))

    o, final = pieces(
        lambda s, m: call(*(x[:, s] for x in (q, k, v, decay, before, now)), m, reset[:, s]),
        jax.tree.map(jnp.asarray, state),
        sizes,
    )
    S, expected = memory.copy(), np.zeros_like(v)
    last_k, last_v = last_k.copy(), last_v.copy()
    for b, t, h in np.ndindex(B, T, H):
        if reset[b, t]:
            S[b, h], last_k[b, :, h], last_v[b, :, h] = 0, 0, 0
        S[b, h] += before[b, t, h] * last_k[b, :, h].T @ last_v[b, :, h]
        S[b, h] *= np.exp(decay[b, t, h])
        S[b, h] += now[b, t, h] * k[b, t, :, h].T @ v[b, t, :, h]
        last_k[b, :, h], last_v[b, :, h] = k[b, t, :, h], v[b, t, :, h]
        expected[b, t, :, h] = q[b, t, :, h] @ S[b, h]
    assert_close((o, final), (expected, {"memory": S, "k": last_k, "v": last_v}), 1e-12)


def test_products_of_the_state_dtype_are_not_rounded():
    """The default precision of accelerators would round the factors of the own and last writes."""
    q = k = v = jnp.ones((1, 3, 2, H, K))
    weight = jnp.ones((1, 3, H))
    state = {"memory": jnp.zeros((1, H, K, K)), "k": k[:, 0], "v": v[:, 0]}
    made = jax.make_jaxpr(lambda: two_point(q, k, v, -weight, (weight,) * 2, state, Context()))()
    dots = [eqn for eqn in made.eqns if eqn.primitive.name == "dot_general"]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(dots) == 5  # two reads of two products, and the writes of the last step
    assert all(eqn.params["precision"] == highest for eqn in dots)
