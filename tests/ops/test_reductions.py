"""Reductions to the matrix-state ops, against loops that do not share their algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.layers import _reductions

pytestmark = pytest.mark.usefixtures("x64", "compiled_quickly")
B, T, H, K, V = 2, 9, 2, 4, 3


def draws(seed=0):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, T, H, K))
    return rng, q, k, rng.standard_normal((B, T, H, V)), rng.random((B, T)) < 0.2


def loop(q, k, v, decay, reset, count=1):
    """Run S = decay S + sum_j k_j v_j^T, o = S^T q, with `count` pairs k_j, v_j per step."""
    o, S = np.zeros((B, T, H, V)), np.zeros((B, H, K, V))
    for t in range(T):
        S = np.where(reset[:, t, None, None, None], 0, S) * decay[:, t, ..., None]
        for j in range(t * count, (t + 1) * count):
            S = S + k[:, j, :, :, None] * v[:, j, :, None, :]
        o[:, t] = np.einsum("bhkv,bhk->bhv", S, q[:, t])
    return o, S


def turned(x, frequencies):
    half = K // 2
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.arange(T)[:, None, None] * frequencies
    )
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_rotation_needs_no_position_in_the_state(cut):
    _, q, k, v, reset = draws()
    frequencies = np.array([1.0, 0.01])
    expected, _ = loop(
        turned(q, frequencies), turned(k, frequencies), v, np.ones((B, T, H, 1)), reset
    )

    @jax.jit
    def call(q, k, v, S, reset):
        rotation = _reductions.Rotation(frequencies, q, None)
        o, S = seqjax.linear_attention(rotation(q), rotation(k), v, None, S, scale=1.0, reset=reset)
        return o, rotation.end(S)

    state, outputs = jnp.zeros((B, H, K, V)), []
    for steps in (slice(0, cut), slice(cut, T)) if cut else (slice(0, T),):
        o, state = call(*(z[:, steps] for z in (q, k, v)), state, reset[:, steps])
        outputs.append(o)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, atol=1e-12)


def test_rotation_keeps_its_digits_at_large_positions():
    length = 2**18
    x = jnp.ones((1, length, 1, 2), jnp.float32)
    rotate = jax.jit(lambda x: _reductions.Rotation([0.3], x, None)(x)[0, -1, 0])
    angle = 0.3 * (length - 1)
    expected = [np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)]
    np.testing.assert_allclose(rotate(x), expected, atol=2e-4)


def test_signed_decays():
    rng, q, k, v, reset = draws()
    decay = rng.uniform(-1, 1, (B, T, H, K))
    decay[0, 3, 0, 1] = 0.0
    expected = loop(q, k, v, decay, reset)

    @jax.jit
    def call(q, k, v, decay):
        s = _reductions.signs(decay < 0, decay.dtype, None)
        o, S = seqjax.linear_attention(
            s * q, s * k, v, jnp.log(jnp.abs(decay)), scale=1.0, reset=reset
        )
        return o, _reductions.last_step(s, None)[..., None] * S

    for got, want in zip(call(q, k, v, decay), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_several_updates_per_step(count):
    rng, q, _, _, reset = draws()
    k = rng.standard_normal((B, T * count, H, K))
    v = rng.standard_normal((B, T * count, H, V))
    decay = rng.uniform(0, 1, (B, T, H, 1))
    expected = loop(q, k, v, decay, reset, count)
    at_substep = _reductions.at_substep

    @jax.jit
    def call(q, k, v, log_decay):
        o, S = seqjax.linear_attention(
            at_substep(q, count, count - 1),
            k,
            v,
            at_substep(log_decay, count, 0),
            scale=1.0,
            reset=at_substep(reset, count, 0),
        )
        return o[:, count - 1 :: count], S

    for got, want in zip(call(q, k, v, np.log(decay[..., 0])), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
