"""Methods around recurrences, against float64 loops and backpropagation through time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import seqjax
from seqjax import cells, methods
from tests.contract.cases import cell_params

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def column(params, h, x):
    """Compute a columnar network with input weights; one gate reads both numbers of a channel."""
    u = x @ params["V"]
    c = jax.nn.sigmoid(params["w"] * h[:, 1] + u) * h[:, 0] + u
    return jnp.stack([c, jnp.tanh(params["a"] * c)], axis=-1)


def squared(head, h, y):
    return jnp.sum((h[..., -1] @ head - y) ** 2)


def squared_sum(head, h, y):
    return jnp.sum((h @ head - y) ** 2)


def tanh(w, h, x):
    return jnp.tanh(w * h + x)


def test_rtrl_is_backpropagation_through_time(x64):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    params, head = {"V": draw(3, 4), "w": draw(4), "a": draw(4)}, draw(4, 2)
    xs, targets, h0 = draw(2, 11, 3), draw(2, 11, 2), draw(2, 4, 2)
    reset = jnp.asarray(rng.random((2, 11)) < 0.2)

    def total(params, head):
        hs, *_ = seqjax.nonlinear_scan(column, params, xs, h0, reset=reset, algorithm="sequential")
        return jax.vmap(jax.vmap(lambda h, y: squared(head, h, y)))(hs, targets).sum()

    value, exact = jax.jit(jax.value_and_grad(total, (0, 1)))(params, head)
    run = jax.jit(lambda *args, **kwargs: methods.rtrl(column, squared, *args, **kwargs))
    losses, grads, _ = run(params, head, xs, targets, h0, reset=reset)
    np.testing.assert_allclose(losses.sum(), value, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), grads, exact
    )

    one, first, state = run(params, head, xs[:, :4], targets[:, :4], h0, reset=reset[:, :4])
    two, second, _ = run(params, head, xs[:, 4:], targets[:, 4:], *state, reset=reset[:, 4:])
    np.testing.assert_allclose(jnp.concatenate([one, two], axis=1), losses, rtol=1e-12)
    both = jax.tree.map(jnp.add, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), both, exact)


def test_rtrl_of_narrow_numbers_is_computed_in_float32(strict):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    args = draw(3), draw(3, 2), draw(2, 7, 3), draw(2, 7, 2), draw(2, 3)
    run = jax.jit(functools.partial(methods.rtrl, tanh, squared_sum))
    losses, grads, (state, S) = run(*args)
    assert {g.dtype for g in grads} == {jnp.dtype("bfloat16")}
    assert state.dtype == S.dtype == losses.dtype == jnp.float32
    wide = run(*(a.astype(jnp.float32) for a in args))
    np.testing.assert_array_equal(losses, wide[0])
    for narrow, exact in zip(grads, wide[1], strict=True):
        np.testing.assert_array_equal(narrow, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_methods_on_a_mesh(kind):
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    values = draw(4), draw((4, 2)), draw((8, 5, 4)), draw((8, 5, 2)), draw((8, 4))
    args = [jnp.asarray(v, jnp.float32) for v in values]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    specs = P("model"), P("model"), P("data"), P("data"), P("data")
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    run = jax.jit(functools.partial(methods.rtrl, tanh, squared_sum))
    found = run(*placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, run(*args))
    drop = jax.jit(lambda p: methods.weight_drop(p, 0.5, jax.random.key(0), ("W",)))
    dropped = drop({"W": placed[1]})["W"]
    np.testing.assert_array_equal(dropped, drop({"W": args[1]})["W"])
    if kind == AxisType.Explicit:
        assert found[0].sharding.spec[0] == "data"
        assert found[1][0].sharding.spec[0] == dropped.sharding.spec[0] == "model"


def test_rtrl_refuses_targets_of_another_length():
    args = (tanh, squared_sum, jnp.ones(2), jnp.ones((2, 2)), jnp.ones((1, 3, 2)))
    with pytest.raises(ValueError, match=r"`targets` must have shape \[B=1, T=3, ...\]"):
        methods.rtrl(*args, jnp.ones((1, 4, 2)), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"`initial_state` must have shape \[B=1, D\]"):
        methods.rtrl(*args, jnp.ones((1, 3, 2)), jnp.zeros((2, 2)))


def test_rtrl_refuses_channels_that_mix():
    args = (jnp.ones(2), jnp.ones((1, 3, 2)), jnp.ones((1, 3, 2)), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="`cell` must keep its channels apart"):
        methods.rtrl(lambda w, h, x: jnp.tanh(h @ w + x), squared, jnp.ones((2, 2)), *args)
    with pytest.raises(ValueError, match="`cell` must keep its channels apart"):
        methods.rtrl(lambda w, h, x: jnp.tanh(w[::-1] * h + x), squared, jnp.ones(2), *args)
    with pytest.raises(ValueError, match=r"`params` must be arrays \[..., D=2\]"):
        methods.rtrl(lambda w, h, x: jnp.tanh(w[0] * h + x), squared, jnp.ones(3), *args)


def test_teacher_forcing_is_the_loop_and_saves_iterations(x64):
    rng, dim = np.random.default_rng(0), 4
    params = cell_params(rng, cells.Elman(dim), 1.5)
    u, targets = rng.standard_normal((1, 200, 1, dim)), np.tanh(rng.standard_normal((1, 200, dim)))
    largest = np.linalg.norm(params["W"], 2)  # the slope of tanh is at most 1
    alpha = methods.least_forcing(largest)
    assert alpha > 0
    np.testing.assert_allclose((1 - alpha) * largest, 1)
    taken = {}
    for forcing in (0.0, alpha):
        cell = methods.TeacherForced(cells.Elman(dim), forcing)
        hs, _, info = seqjax.nonlinear_scan(
            cell, params, (u, targets), jnp.zeros((1, dim)), algorithm="newton"
        )
        h, hs = np.zeros(dim), np.asarray(hs)
        for t in range(200):
            h = np.tanh(u[0, t, 0] + ((1 - forcing) * h + forcing * targets[0, t]) @ params["W"])
            np.testing.assert_allclose(hs[0, t], h, atol=1e-9)
        taken[forcing] = int(info.iterations[0])
    assert taken[alpha] < taken[0.0]
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\]"):
        methods.TeacherForced(cells.Elman(dim), 1.5)


def test_jacobian_norms_are_those_of_the_products(x64):
    """Check the norms of an Elman network, and the bound on products of forced Jacobians."""
    rng, dim, length = np.random.default_rng(0), 4, 12
    params = cell_params(rng, cells.Elman(dim), 1.5)
    u, reset = rng.standard_normal((1, length, 1, dim)), jnp.arange(length)[None] == 5
    h0 = jnp.asarray(rng.standard_normal((1, dim)))
    hs, *_ = seqjax.nonlinear_scan(cells.Elman(dim), params, u, h0, reset=reset)
    found = methods.jacobian_norms(cells.Elman(dim), params, u, hs, h0, reset=reset)
    jacobians = [(1 - h**2)[:, None] * params["W"].T for h in np.asarray(hs)[0]]
    np.testing.assert_allclose(found[0], [np.linalg.norm(J, 2) for J in jacobians], rtol=1e-10)
    keep = 1 - methods.least_forcing(float(found.max()))
    product = np.linalg.multi_dot([keep * J for J in jacobians[::-1]])
    assert np.linalg.norm(product, 2) <= 1


def test_jacobian_norms_of_narrow_states_are_float32():
    W = jnp.asarray([[2, 1], [0, 0.5]], jnp.bfloat16)
    states = jnp.ones((1, 3, 2), jnp.bfloat16)
    found = methods.jacobian_norms(lambda w, h, x: w @ h + x, W, states, states)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.full((1, 3), np.linalg.norm(W.astype(float), 2)), 1e-6)


def test_teacher_forcing_does_not_cross_resets(x64):
    rng, dim, start = np.random.default_rng(0), 3, 4
    params = cell_params(rng, cells.Elman(dim))
    u, targets = rng.standard_normal((1, 9, 1, dim)), rng.standard_normal((1, 9, dim))
    reset = jnp.arange(9)[None] == start
    cell = methods.TeacherForced(cells.Elman(dim), 0.7)

    def run(u, targets, reset):
        earlier, _ = seqjax.ops.previous(targets, None, reset)
        h0 = jnp.zeros((1, dim))
        return seqjax.nonlinear_scan(cell, params, (u, earlier), h0, reset=reset)[0]

    hs = run(u, targets, reset)
    for part in (slice(start), slice(start, None)):
        alone = run(u[:, part], targets[:, part], None)
        np.testing.assert_allclose(hs[:, part], alone, rtol=1e-12)


def test_weight_drop_reads_names_once():
    params, key = {"W": jnp.ones(50), "V": jnp.ones(50)}, jax.random.key(0)
    dropped = methods.weight_drop(params, 0.5, key, iter(["W"]))
    assert (dropped["W"] == 0).any()
    with pytest.raises(ValueError, match=r"`names` must be a collection of names, got 'WV'"):
        methods.weight_drop(params, 0.5, key, "WV")


def test_weight_drop_keeps_the_mean_and_other_weights():
    params = {"layer": {"W": jnp.ones((200, 50)), "V": jnp.ones(3)}}
    dropped = methods.weight_drop(params, 0.25, jax.random.key(0), ("W",))["layer"]
    assert set(np.unique(dropped["W"])) == {np.float32(0), np.float32(1 / 0.75)}
    # 10,000 entries: the mean deviates by 0.006 at one standard deviation.
    assert abs(dropped["W"].mean() - 1) < 0.03
    assert (dropped["V"] == 1).all()
    with pytest.raises(ValueError, match="`names` must be among"):
        methods.weight_drop(params, 0.25, jax.random.key(0), ("U",))
    with pytest.raises(ValueError, match=r"`rate` must be in \[0, 1\)"):
        methods.weight_drop(params, 1.0, jax.random.key(0), ("W",))


def test_prefix_linear_attention_is_the_sums_of_each_document(x64):
    rng, (B, T, H, K, V) = np.random.default_rng(0), (2, 12, 2, 3, 4)
    q, k, prefix_k = rng.standard_normal((3, B, T, H, K))
    v, prefix_v = rng.standard_normal((2, B, T, H, V))
    starts = np.zeros((B, T), bool)
    starts[0, 5] = starts[1, 3] = starts[1, 8] = True
    in_prefix = np.zeros((B, T), bool)
    in_prefix[0, :3] = in_prefix[0, 5:9] = in_prefix[1, :2] = in_prefix[1, 8:] = True
    prefix_v[~in_prefix] = np.nan  # ignored
    y, state = methods.prefix_linear_attention(
        *map(jnp.asarray, (q, k, v, prefix_k, prefix_v, in_prefix)), reset=jnp.asarray(starts)
    )
    documents, y, state = np.cumsum(starts, axis=1), np.asarray(y), np.asarray(state)
    for b in range(B):
        for t in range(T):
            same = documents[b] == documents[b, t]
            S = np.einsum(
                "thk,thv->hkv", k[b, : t + 1][same[: t + 1]], v[b, : t + 1][same[: t + 1]]
            )
            own = same & in_prefix[b]
            S = S + np.einsum("thk,thv->hkv", prefix_k[b, own], prefix_v[b, own])
            np.testing.assert_allclose(
                y[b, t], np.einsum("hk,hkv->hv", q[b, t], S) * K**-0.5, rtol=1e-10, atol=1e-10
            )
        np.testing.assert_allclose(state[b], S, rtol=1e-10, atol=1e-10)
