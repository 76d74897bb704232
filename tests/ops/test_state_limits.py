"""Linear attention with a limited state, against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import methods

pytestmark = pytest.mark.usefixtures("compiled_quickly")
B, T, G, H, K, V = 2, 11, 1, 2, 3, 4


def inputs():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, G, K))
    v, log_decay = rng.standard_normal((B, T, H, V)), -rng.exponential(0.1, (B, T, H))
    reset = np.zeros((B, T), bool)
    reset[0, 3] = reset[1, 6] = reset[1, 8] = True
    return tuple(map(jnp.asarray, (q, k, v, log_decay))), jnp.asarray(reset)


def writes(q, k, v, log_decay, reset, b, h, t):
    """Return the outer products of the document of step t, each with its decay at t."""
    start = np.flatnonzero(reset[b, : t + 1])
    first = start[-1] if len(start) else 0
    return [
        np.exp(log_decay[b, i + 1 : t + 1, h].sum()) * np.outer(k[b, i, 0], v[b, i, h])
        for i in range(first, t + 1)
    ]


@pytest.mark.parametrize("window", [1, 3, 20])
def test_a_window_reads_the_last_writes(window, x64):
    arrays, reset = inputs()
    limit = methods.StateWindow(window)
    run = jax.jit(limit)
    y, state = run(*arrays, reset=reset)
    plain = [np.asarray(z) for z in (*arrays, reset)]
    for b, t, h in np.ndindex(B, T, H):
        S = sum(writes(*plain, b, h, t)[-window:])
        wanted = S.T @ plain[0][b, t, 0] * K**-0.5
        np.testing.assert_allclose(y[b, t, h], wanted, rtol=1e-10, atol=1e-12)
    # Split inside a document, and inside the window.
    first, middle = run(*(z[:, :5] for z in arrays), reset=reset[:, :5])
    rest, last = run(*(z[:, 5:] for z in arrays), middle, reset=reset[:, 5:])
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), y, rtol=1e-10, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), last, state)
    steps, last = stepped(run, arrays, reset)
    np.testing.assert_allclose(steps, y, rtol=1e-10, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), last, state)


def stepped(run, arrays, reset):
    """Run calls of one step each."""
    outputs, state = [], None
    for t in range(T):
        now = slice(t, t + 1)
        y, state = run(*(z[:, now] for z in arrays), state, reset=reset[:, now])
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def test_a_window_of_narrow_inputs_is_the_rounded_difference():
    """Decays near 1 make the state far larger than the window's part of it."""
    rng, length, window = np.random.default_rng(0), 400, 3
    shapes = (1, length, G, K), (1, length, G, K), (1, length, H, V)
    narrow = [jnp.asarray(rng.random(shape) + 0.5, jnp.bfloat16) for shape in shapes]
    narrow.append(jnp.asarray(-rng.exponential(0.002, (1, length, H)), jnp.bfloat16))
    y, _ = jax.jit(methods.StateWindow(window))(*narrow)
    assert y.dtype == jnp.bfloat16
    found, *plain = (np.asarray(z, np.float64) for z in (y, *narrow))
    none = np.zeros((1, length), bool)
    for t, h in np.ndindex(length, H):
        S = sum(writes(*plain, none, 0, h, t)[-window:])
        wanted = S.T @ plain[0][0, t, 0] * K**-0.5
        # Half a unit in the last place of bfloat16, and float32 sums of 400 steps.
        np.testing.assert_allclose(found[0, t, h], wanted, rtol=2**-8 + 1e-4)


def test_what_was_before_a_reset_is_not_read(x64):
    """Check values and gradients with NaN in the document before."""
    (q, k, v, log_decay), _ = inputs()
    reset = jnp.zeros((B, T), bool).at[:, 4].set(True)
    v, limit = v.at[:, :4].set(jnp.nan), methods.StateWindow(3)

    def tail(q, log_decay):
        return jnp.sum(limit(q, k, v, log_decay, reset=reset)[0][:, 4:] ** 2)

    value, grads = jax.jit(jax.value_and_grad(tail, (0, 1)))(q, log_decay)
    assert np.isfinite(value)
    assert all(np.isfinite(g[:, 4:]).all() for g in grads)
    alone = limit(*(z[:, 4:] for z in (q, k, v, log_decay)))[0]
    np.testing.assert_allclose(value, jnp.sum(alone**2), rtol=1e-10)


@pytest.mark.parametrize("largest", [1.5, (1.5, 0.7)])
@pytest.mark.quick("1.5")
def test_a_norm_limits_the_state(largest, x64):
    arrays, reset = inputs()
    run = jax.jit(methods.StateNorm(largest))
    y, state = run(*arrays, reset=reset)
    q, k, v, log_decay, cut = (np.asarray(z) for z in (*arrays, reset))
    limited = 0
    for b, h in np.ndindex(B, H):
        S, limit = np.zeros((K, V)), np.broadcast_to(largest, H)[h]
        for t in range(T):
            S = np.exp(log_decay[b, t, h]) * (0 if cut[b, t] else S) + np.outer(
                k[b, t, 0], v[b, t, h]
            )
            limited += np.linalg.norm(S) > limit
            S = S * min(1, limit / np.linalg.norm(S))
            np.testing.assert_allclose(y[b, t, h], S.T @ q[b, t, 0] * K**-0.5, atol=1e-12)
        np.testing.assert_allclose(state[b, h], S, atol=1e-12)
    assert 0 < limited < B * H * T
    steps, last = stepped(run, arrays, reset)
    np.testing.assert_allclose(steps, y, rtol=1e-12)
    np.testing.assert_allclose(last, state, rtol=1e-12)
    slopes = jax.jit(jax.grad(lambda v: jnp.sum(run(*arrays[:2], v, arrays[3])[0] ** 2)))(
        0 * arrays[2]
    )
    assert np.isfinite(slopes).all()  # also where the state is zero


def test_bad_limits_are_refused():
    (q, k, v, log_decay), _ = inputs()
    with pytest.raises(ValueError, match="StateNorm: `largest` must be above 0, got 0"):
        methods.StateNorm(0)
    with pytest.raises(ValueError, match=r"StateNorm: `largest` must be above 0, got \(1, 0\)"):
        methods.StateNorm([1, 0])
    with pytest.raises(ValueError, match=r"one number or one per head, got shape \[1, 2\]"):
        methods.StateNorm([[1, 2]])
    assert methods.StateNorm(np.array([1.0, 2.0])) == methods.StateNorm((1.0, 2.0))
    with pytest.raises(ValueError, match="`largest` must have one number per head, 2, got 3"):
        methods.StateNorm((1, 2, 3))(q, k, v, log_decay)
    with pytest.raises(ValueError, match="StateWindow: `window` must be a positive integer"):
        methods.StateWindow(0)
    with pytest.raises(ValueError, match=r"`log_decay` must have shape \[2, 11, 2\], one number"):
        methods.StateWindow(2)(q, k, v, log_decay[..., None])
    with pytest.raises(NotImplementedError, match="there is no `sequence_axis`"):
        methods.StateWindow(2)(q, k, v, log_decay, sequence_axis="time")
    with pytest.raises(ValueError, match=r"Mamba2: `decay_factor` must be in \(0, 1\], got 1.5"):
        seqjax.layers.Mamba2(dim=4, head_dim=4, decay_factor=1.5)


def test_states_of_other_limits_are_refused():
    arrays, _ = inputs()
    sizes = (B, H, K, V, arrays[0].dtype)
    limit, norm = methods.StateWindow(4), methods.StateNorm(1.0)
    longer, sizes_of_keys = methods.StateWindow(8), r"\['k'\]` must have shape \[2, 4, 1, 3\], got "
    for op, state, words in (
        (limit, longer.initial_state(*sizes, G), sizes_of_keys + r"\[2, 8, 1, 3\]; make one"),
        (limit, limit.initial_state(*sizes), sizes_of_keys + r"\[2, 4, 2, 3\]; make one"),
        (limit, limit.initial_state(3, *sizes[1:], G), r"\['earlier'\]` .*, got \[3, 2, 3, 4\]"),
        (limit, norm.initial_state(*sizes), r"` must be a dict with the entries .*, got an array;"),
        (norm, limit.initial_state(*sizes), r"` must be an array, got a dict"),
        (norm, jnp.zeros((B, H, V, K)), r"` must have shape \[2, 2, 3, 4\], got \[2, 2, 4, 3\];"),
        (norm, jnp.zeros((B, H, K, V), int), r"` must be floating point, got int32; cast it"),
    ):
        with pytest.raises(ValueError, match=f"^{type(op).__name__}: `initial_state" + words) as e:
            op(*arrays, state)
        assert "\n" not in str(e.value)


def test_a_layer_with_a_window_steps_as_it_applies(x64):
    layer = seqjax.layers.Mamba2(
        dim=4, state_dim=3, head_dim=2, groups=2, state_limit=methods.StateWindow(3)
    )
    params = layer.init(jax.random.key(0), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 7, 4), jnp.float64)
    y, _ = jax.jit(layer.apply)(params, x)
    state, step = layer.initial_state(2, jnp.float64), jax.jit(layer.step)
    for t in range(7):
        y_t, state = step(params, x[:, t], state)
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-9, atol=1e-12)
