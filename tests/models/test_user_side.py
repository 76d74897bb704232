"""Extension points, used as a user does: public names of the library only.

An mLSTM on `seqjax.ops.MatrixRecurrence`, a dropout layer, and a backbone of two kinds of blocks.
"""

import ast
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import seqjax

B, T, H, K, V = 2, 16, 2, 3, 4


def _write(S, decayed, x):
    """Compute S_t = f_t S_{t-1} + i_t k_t v_t^T."""
    return decayed + (x["gate"] * x["k"])[..., :, None] * x["v"][..., None, :]


def _write_chunk(x):
    """Return the map of a chunk of steps of the recurrence of `_write`."""
    product = functools.partial(jnp.matmul, precision="highest")
    keys = x["gate"] * x["k"]
    [[scores]] = seqjax.ops.decayed_products((x["q"],), (keys,), x["log_decay"])
    from_start, to_end = seqjax.ops.cumulative_decays(x["log_decay"], keys.dtype)
    return seqjax.ops.ChunkMap(
        outputs=product(scores, x["v"]),
        reads=x["q"] * from_start,
        offset=product((keys * to_end).mT, x["v"]),
        transition=from_start[..., -1, :, None],
    )


GATED = {"k": "B T H K", "gate": "B T H"}
MEMORY = seqjax.ops.MatrixRecurrence("mlstm", _write, _write_chunk, GATED, diagonal=True)
STEPS = seqjax.ops.MatrixRecurrence("mlstm", _write, None, GATED)


def _add_decay(early, late):
    """Compose (d, m) pairs of m_t = max(m_{t-1} + d_t, i_t)."""
    return early[0] + late[0], jnp.maximum(early[1] + late[0], late[1])


def mlstm(inputs, state, reset=None, memory=MEMORY, sequence_axis=None, **keywords):
    """Compute mLSTM (arXiv 2405.04517); the normalizer n is the last column of the state."""
    q, k, v, i, f = (inputs[name] for name in ("q", "k", "v", "i", "f"))
    S, m = state
    log_f = jax.nn.log_sigmoid(f)
    options = {"reset": reset, "sequence_axis": sequence_axis}
    pairs = jax.lax.stop_gradient((log_f, i))
    (_, new_m), (_, last_m) = seqjax.monoid_scan(
        _add_decay, pairs, (jnp.zeros_like(m), m), **options
    )
    old_m, _ = seqjax.ops.previous(new_m, m, fill=-jnp.inf, **options)
    arrays = {
        "q": q,
        "k": k,
        "v": jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1),
        "gate": jnp.exp(i - new_m),
    }
    o, S = memory(arrays, log_f + old_m - new_m, S, **options, **keywords)
    norm = jnp.maximum(jnp.abs(o[..., -1:]), jnp.exp(-new_m)[..., None])
    return o[..., :-1] / norm, (S, last_m)


def fresh(batch=B):
    return jnp.zeros((batch, H, K, V + 1)), jnp.full((batch, H), -jnp.inf)


def oracle(inputs, reset):
    """Compute the paper's equations 19 to 27 in a float64 loop, without a stabilizer."""
    q, k, v, i, f = (np.asarray(inputs[name], np.float64) for name in ("q", "k", "v", "i", "f"))
    out = np.zeros((B, T, H, V))
    for b, h in np.ndindex(B, H):
        C, n = np.zeros((V, K)), np.zeros(K)
        for t in range(T):
            forget, write = 1 / (1 + np.exp(-f[b, t, h])), np.exp(i[b, t, h])
            forget = 0 if reset[b, t] else forget
            C = forget * C + write * np.outer(v[b, t, h], k[b, t, h])
            n = forget * n + write * k[b, t, h]
            query = q[b, t, h] / np.sqrt(K)
            out[b, t, h] = C @ query / max(abs(n @ query), 1)
    return out


def draw():
    """Return inputs and a reset; in float64 if it is enabled."""
    rng = np.random.default_rng(0)
    shapes = {"q": (K,), "k": (K,), "v": (V,), "i": (), "f": ()}
    inputs = {name: 2 * rng.normal(size=(B, T, H, *rest)) for name, rest in shapes.items()}
    reset = np.zeros((B, T), bool)
    reset[0, 0] = reset[1, 5] = reset[1, 6] = True
    return {name: jnp.asarray(x) for name, x in inputs.items()}, jnp.asarray(reset)


FORMS = {
    "sequential": {"algorithm": "sequential"},
    "chunked": {"algorithm": "chunked", "chunk_size": 8},
    "steps only": {"memory": STEPS},
}


@pytest.mark.quick("chunked")
@pytest.mark.parametrize("form", FORMS)
def test_mlstm_equals_the_papers_loop(form, x64):
    """Check values, a directional derivative against finite differences, split and resume."""
    inputs, reset = draw()
    run = functools.partial(mlstm, **FORMS[form])
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(B, T, H, V))
    direction = {name: rng.normal(size=x.shape) for name, x in inputs.items()}

    def loss(inputs):
        out, _ = run(inputs, fresh(), reset)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    np.testing.assert_allclose(out, oracle(inputs, reset), rtol=1e-10, atol=1e-12)

    def moved(size):
        at = {name: np.asarray(x) + size * direction[name] for name, x in inputs.items()}
        return np.sum(oracle(at, reset) * weight)

    wanted = (8 * (moved(1e-5) - moved(-1e-5)) - (moved(2e-5) - moved(-2e-5))) / 12e-5
    got = sum(np.sum(np.asarray(gradients[name]) * direction[name]) for name in inputs)
    np.testing.assert_allclose(got, wanted, rtol=1e-7)

    early, late = ({name: x[:, p] for name, x in inputs.items()} for p in (slice(7), slice(7, T)))
    first, state = run(early, fresh(), reset[:, :7])
    second, _ = run(late, state, reset[:, 7:])
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), out, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chunked", pytest.param("steps only", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "explicit",
    [pytest.param(False, id="auto", marks=pytest.mark.slow), pytest.param(True, id="explicit")],
)
def test_mlstm_on_several_devices(form, explicit, x64):
    """Split T over eight devices, or the batch over two of an Explicit mesh, with gradients."""
    inputs, reset = draw()
    run = functools.partial(mlstm, **FORMS[form])
    wanted, (S, m) = run(inputs, fresh(), reset)

    def loss(run):
        return lambda inputs: jnp.sum(jnp.sin(run(inputs, fresh(), reset)[0]))

    gradients = jax.jit(jax.grad(loss(run)))(inputs)
    if explicit:
        with jax.set_mesh(jax.make_mesh((2,), ("data",))):
            split = jax.tree.map(lambda x: jax.device_put(x, P("data")), (inputs, fresh(), reset))
            got, state = jax.jit(run)(*split)
            assert jax.typeof(got).sharding.spec[0] == "data"
            sharded_gradients = jax.jit(
                jax.grad(lambda inputs: jnp.sum(jnp.sin(run(inputs, *split[1:])[0])))
            )(split[0])
    else:
        mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
        shard = P(None, "time")
        sharded = jax.shard_map(
            functools.partial(run, sequence_axis="time"),
            mesh=mesh,
            in_specs=(shard, P(), shard),
            out_specs=(shard, P()),
        )
        got, state = jax.jit(sharded)(inputs, fresh(), reset)
        sharded_gradients = jax.jit(jax.grad(loss(sharded)))(inputs)
    for name in inputs:
        np.testing.assert_allclose(
            sharded_gradients[name], gradients[name], rtol=1e-8, atol=1e-10, err_msg=name
        )
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state[0], S, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state[1], m, rtol=1e-10)


def test_large_input_gates_stay_finite():
    """Check gates of 400, whose exponentials float32 cannot represent."""
    inputs, reset = draw()
    out, _ = mlstm(inputs | {"i": 200 * inputs["i"]}, fresh(), reset)
    assert jnp.isfinite(out).all()


def test_names_of_ops_with_kernels_are_refused():
    """Check that a user's recurrence cannot have the name of an op with kernels."""
    with pytest.raises(ValueError, match=r"^delta_rule: `name` must not be"):
        seqjax.ops.MatrixRecurrence("delta_rule", lambda S, DS, x: DS)


def test_a_recurrence_without_chunks_has_no_chunked_algorithm():
    inputs, _ = draw()
    with pytest.raises(NotImplementedError, match="mlstm: there is no 'chunked' algorithm"):
        mlstm(inputs, fresh(), memory=STEPS, algorithm="chunked")
    with pytest.raises(ValueError, match="`inputs` must be a dict with the entries gate, k, q, v"):
        MEMORY({"q": inputs["q"]})
    with pytest.raises(ValueError, match="`inputs` must have the shape 'B T H'"):
        seqjax.ops.MatrixRecurrence("wrong", _write, inputs={"k": "B H K"})


@dataclasses.dataclass(frozen=True)
class Dropout(seqjax.layers.Layer):
    """Zero each element with probability `rate`, with the key of the call's context."""

    dim: int
    rate: float = 0.5

    def declare_params(self):
        return {}

    def forward(self, params, x, state, context):
        key = context.local_key()
        if key is None:
            return x, state
        keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0), state


def test_dropout():
    layer, x = Dropout(64), jnp.ones((2, 50, 64))
    still, _ = layer.apply({}, x)
    assert (still == x).all()
    y, _ = layer.apply({}, x, key=jax.random.key(0))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert abs(y.mean() - 1) < 0.05
    assert (y != layer.apply({}, x, key=jax.random.key(1))[0]).any()


@pytest.mark.slow
@dataclasses.dataclass(frozen=True)
class MLSTM(seqjax.layers.Layer):
    """The mLSTM above as a layer: projections, gates, dropout, output projection."""

    dim: int
    heads: int = H

    def _dropout(self):
        return Dropout(self.dim, 0.25)

    def declare_params(self):
        def weight(width):
            normal = jax.nn.initializers.normal(self.dim**-0.5)
            return seqjax.layers.Param((self.dim, width), ("embed", "heads"), "weight", normal)

        gates = {name: weight(self.heads) for name in ("i", "f")}
        return {name: weight(self.dim) for name in ("q", "k", "v", "out")} | gates

    def make_state(self, batch_size, dtype):
        size = self.dim // self.heads
        memory = jnp.zeros((batch_size, self.heads, size, size + 1), dtype)
        return memory, jnp.full((batch_size, self.heads), -jnp.inf, dtype)

    def forward(self, params, x, state, context):
        def split(z):
            return z.reshape(*z.shape[:2], self.heads, -1)

        inputs = {name: split(x @ params[name]) for name in ("q", "k", "v")}
        inputs |= {name: x @ params[name] for name in ("i", "f")}
        o, state = mlstm(inputs, state, context.reset, sequence_axis=context.sequence_axis)
        dropped, _ = self._dropout().forward({}, o.reshape(x.shape), (), context.enter("dropout"))
        return dropped @ params["out"], state


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
def test_two_kinds_of_blocks():
    """Scan and remat change nothing; step equals apply; dropout draws with a key only."""
    dim = 8
    attention = seqjax.layers.SlidingWindowAttention(dim, heads=2, window=4)
    blocks = [MLSTM(dim), seqjax.models.Block(attention, norm="layer", dropout=0.1)]
    plain = seqjax.models.Backbone(blocks, depth=4, mlp_ratio=1)
    model = dataclasses.replace(plain, scan=True, remat=True)
    params = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (B, 8, dim))
    reset = jnp.zeros((B, 8), bool).at[1, 3].set(True)

    @jax.jit
    def run(params, key=None):
        def loss(params):
            y, state = model.apply(params, x, reset=reset, key=key)
            return jnp.sum(y**2), (y, state)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (y, state)), gradients = run(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradients))
    step = jax.jit(model.step)
    stepped = model.initial_state(B)
    for t in range(8):
        y_t, stepped = step(params, x[:, t], stepped, reset[:, t])
        np.testing.assert_allclose(y_t, y[:, t], atol=2e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(stepped), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    with_key = run(params, jax.random.key(2))[0][1][0]
    assert (with_key != y).any()
    assert (with_key == run(params, jax.random.key(2))[0][1][0]).all()
    assert repr(model) == repr(
        eval(repr(model), vars(seqjax.layers) | vars(seqjax.models) | globals())
    )


def test_only_public_names_are_used():
    """Check that this module uses only `seqjax`, and none of its private attributes."""
    tree = ast.parse(pathlib.Path(__file__).read_text())
    imported = [
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    ]
    imported += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    ours = ("seqjax", "pallas_kernels", "experiments", "tests")
    assert [name for name in imported if name.split(".")[0] in ours] == ["seqjax"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("seqjax"):
            parent = functools.reduce(getattr, ast.unparse(node.value).split(".")[1:], seqjax)
            public = getattr(parent, "__all__", [name for name in dir(parent) if name[0] != "_"])
            assert node.attr in public, ast.unparse(node)
