"""Blocks that share parameters, norms of the residual stream itself, injections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqjax.layers import Attention, GatedMLP, RMSNorm, SharedTransformer, ShortConv
from seqjax.models import Backbone, Block
from tests.oracles import layer_oracles

pytestmark = pytest.mark.usefixtures("quick_compilation")
D = 4
ATTENTION = Attention(2 * D, heads=2, capacity=32, rotary_dim=2, scale=0.6, out_dim=D)
SHARED = SharedTransformer(
    "a", ATTENTION, GatedMLP(D, 6, activation="gelu", bias=True), 3, True, norm_eps=1e-3
)
MIXER = ShortConv(D, 3)
BACKBONE = Backbone([Block(MIXER), Block(MIXER, injection=SHARED)], depth=4)


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


@pytest.fixture(scope="module")
def arguments():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = jax.jit(lambda key: BACKBONE.init(key, jnp.float64))(jax.random.key(0))
        params = jax.tree.map(lambda p: np.asarray(p) + 0.3 * rng.standard_normal(p.shape), params)
    reset = np.zeros((2, 9), bool)
    reset[1, 5] = True
    return params, rng.standard_normal((2, 9, D)), reset


def expected(params, x, reset):
    """Compute the model in NumPy: the residual stream never holds the shared block's output."""
    shared, first = params["shared"]["a"], x
    for i in range(4):
        block = params[f"block_{i}"]
        inputs = x
        if i % 2:
            own = block["injection"]
            attention = dict(shared["mixer"])
            for name in "qkv":
                added = own[f"{name}_down"] @ own[f"{name}_up"]
                attention[f"{name}_proj"] = attention[f"{name}_proj"] + added
            mlp = dict(shared["mlp"])
            for name in ("gate", "up"):
                mlp[f"{name}_proj"] = mlp[f"{name}_proj"] + own["adapter_down"] @ own[f"{name}_up"]
            h = rms(np.concatenate([x, first], -1), shared["mixer_norm"]["scale"], 1e-3)
            h = layer_oracles.attention(ATTENTION, attention, h, reset)
            h = rms(h, shared["mlp_norm"]["scale"], 1e-3)
            h = layer_oracles.gated_mlp(SHARED.mlp, mlp, h)
            inputs = x + h @ own["out_proj"]
        h = rms(inputs, block["mixer_norm"]["scale"], 1e-6)
        x = x + layer_oracles.short_conv(MIXER, block["mixer"], h, reset)
    return rms(x, params["final_norm"]["scale"], 1e-6)


def test_shared_blocks_are_those_of_the_equations(arguments):
    params, x, reset = arguments
    assert sorted(params["shared"]) == ["a"]
    with jax.enable_x64(True):
        y, _ = jax.jit(BACKBONE.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, expected(params, x, reset), atol=1e-9)


@pytest.mark.slow
def test_steps_stacked_blocks_and_shards_of_time_are_the_whole(arguments):
    params, x, reset = arguments
    want = expected(params, x, reset)
    stacked = dataclasses.replace(BACKBONE, scan=True, remat=True)
    groups = {
        f"group_{i}": jax.tree.map(
            lambda *leaves: np.stack(leaves), params[f"block_{i}"], params[f"block_{i + 2}"]
        )
        for i in range(2)
    }
    others = {name: params[name] for name in ("shared", "final_norm")}

    def loss(model, params):
        return jnp.sum(model.apply(params, x, None, reset)[0] ** 2)

    with jax.enable_x64(True):
        y, _ = jax.jit(stacked.apply)(groups | others, x, None, reset)
        np.testing.assert_allclose(y, want, atol=1e-9)
        plain = jax.jit(jax.grad(lambda p: loss(BACKBONE, p)))(params)
        scanned = jax.jit(jax.grad(lambda p: loss(stacked, p)))(groups | others)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10),
            plain["shared"],
            scanned["shared"],
        )
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain["shared"]))

        step, state = jax.jit(BACKBONE.step), BACKBONE.initial_state(2, jnp.float64)
        for t in range(x.shape[1]):
            y_t, state = step(params, x[:, t], state, reset[:, t])
            np.testing.assert_allclose(y_t, want[:, t], atol=1e-9)

        mesh = jax.make_mesh((2,), ("time",), axis_types=(AxisType.Auto,))
        split = jax.shard_map(
            lambda params, x, reset: BACKBONE.apply(params, x, None, reset, sequence_axis="time")[
                0
            ],
            mesh=mesh,
            in_specs=(P(), P(None, "time"), P(None, "time")),
            out_specs=P(None, "time"),
        )
        np.testing.assert_allclose(
            jax.jit(split)(params, x[:, :8], reset[:, :8]), want[:, :8], atol=1e-9
        )


def test_misuse_of_shared_blocks_is_refused():
    x = jnp.ones((1, 2, D))
    with pytest.raises(ValueError, match="must be inside a Backbone, which has the parameters 'a'"):
        SHARED.apply(SHARED.init(jax.random.key(0)), x)
    other = dataclasses.replace(SHARED, norm_eps=0.1)
    blocks = [Block(MIXER, injection=layer) for layer in (SHARED, other)]
    with pytest.raises(ValueError, match="under the name 'a' must be equal"):
        Backbone(blocks).init(jax.random.key(0))
    with pytest.raises(ValueError, match="`attention` must have dim=8 and out_dim=4"):
        SharedTransformer("a", Attention(8, heads=2), GatedMLP(D))
    with pytest.raises(ValueError, match="`attention_adapters` must have an adapter_rank > 0"):
        dataclasses.replace(SHARED, adapter_rank=0)
    with pytest.raises(ValueError, match="`injection` must have norm_position='pre'"):
        Block(MIXER, injection=SHARED, norm_position="post")


def test_norms_of_the_residual_stream():
    mlps = GatedMLP(D, 6), GatedMLP(D, 5)
    block = Block(
        *mlps, norm_position="stream", stream_factors=(1.5, 0.7), residual_factor=0.4, norm_eps=0.1
    )
    params = block.init(jax.random.key(0))
    x = want = jax.random.normal(jax.random.key(1), (2, 3, D))
    for name, layer, factor in zip(("mixer", "mlp"), mlps, (1.5, 0.7), strict=True):
        want, _ = RMSNorm(D, 0.1).apply(params[f"{name}_norm"], want)
        want = factor * want + 0.4 * layer.apply(params[name], want)[0]
    np.testing.assert_allclose(block.apply(params, x)[0], want, atol=1e-6)
    with pytest.raises(ValueError, match="`stream_factors` must be two numbers"):
        dataclasses.replace(block, stream_factors=(1.0,))
