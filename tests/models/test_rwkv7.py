"""RWKV-7 as a whole model, against its equations in NumPy, with the values of the first layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqjax.layers import LRU, RWKV7, RWKVChannelMix
from seqjax.models import Backbone, Block
from tests.contract.harness import assert_close
from tests.oracles import layer_oracles, rwkv_oracles

pytestmark = pytest.mark.usefixtures("quick_compilation")
DEPTH, D, B, T = 3, 8, 2, 12
RANKS = {"decay_rank": 3, "a_rank": 3, "value_rank": 3, "gate_rank": 3}


def block(layer=0, depth=1):
    return Block(
        RWKV7(D, 2, **RANKS, layer=layer, depth=depth),
        RWKVChannelMix(D, layer=layer, depth=depth),
        norm="layer",
        norm_eps=1e-5,
    )


MODEL = Backbone([block(i, DEPTH) for i in range(DEPTH)], norm="layer", norm_eps=1e-5)


@functools.cache
def arguments():
    """Return parameters away from their initial values, inputs and resets, in float64."""
    rng = np.random.default_rng(0)
    params = MODEL.init(jax.random.key(0), jnp.float64)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)
    return params, rng.standard_normal((B, T, D)), rng.random((B, T)) < 0.15


def equations(params, x, reset):
    """Return the outputs of the model, computed position by position."""
    norm, first = functools.partial(layer_oracles.layer_norm, MODEL.stack[0]._norm), None
    for i, block in enumerate(MODEL.stack):
        p = params[f"block_{i}"]
        y, first = rwkv_oracles.rwkv7_and_values(
            block.mixer, p["mixer"], norm(p["mixer_norm"], x), reset, first
        )
        x = x + y
        x = x + rwkv_oracles.channel_mix(block.mlp, p["mlp"], norm(p["mlp_norm"], x), reset)
    return norm(params["final_norm"], x)


def test_the_model_agrees_with_the_equations(x64, strict):
    params, x, reset = arguments()
    y, state = jax.jit(MODEL.apply)(params, x, None, reset)
    assert_close(y, equations(params, x, reset), 1e-10)

    step, now, seen = jax.jit(MODEL.step), MODEL.initial_state(B, jnp.float64), []
    for t in range(T):
        y_t, now = step(params, x[:, t], now, reset[:, t])
        seen.append(y_t)
    assert_close((np.stack(seen, axis=1), now), (y, state), 1e-11)


def test_the_model_scans_its_blocks_and_splits_time(x64, strict):
    """Check `scan=True` and `sequence_axis`: both pass the first values on as loop carries."""
    params, x, reset = arguments()
    y, _ = jax.jit(MODEL.apply)(params, x, None, reset)
    same = Backbone(block(), DEPTH, norm="layer", norm_eps=1e-5, scan=True, remat=True)
    blocks = [params[f"block_{i}"] for i in range(DEPTH)]
    stacked = {
        "group_0": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        "final_norm": params["final_norm"],
    }
    mesh = jax.make_mesh((4,), ("time",), axis_types=(AxisType.Auto,))
    time = P(None, "time")
    for model, given in ((MODEL, params), (same, stacked)):

        def run(params, x, reset, model=model):
            return model.apply(params, x, None, reset, sequence_axis="time")[0]

        split = jax.shard_map(run, mesh=mesh, in_specs=(P(), time, time), out_specs=time)
        assert_close(jax.jit(split)(given, x, reset), y, 1e-11)
        assert_close(jax.jit(model.apply)(given, x, None, reset)[0], y, 1e-11)


def test_the_first_values_are_those_of_the_first_rwkv_layer(x64, strict):
    """Check a hybrid whose first block is another layer, and `value_residual=False`."""
    params, x, _ = arguments()
    hybrid = Backbone([LRU(D), *MODEL.blocks], mlp_ratio=0, norm="layer", norm_eps=1e-5)
    still = jax.tree.map(jnp.zeros_like, hybrid.init(jax.random.key(0), jnp.float64)["block_0"])
    moved = {f"block_{i + 1}": params[f"block_{i}"] for i in range(DEPTH)}
    given = {"block_0": still, **moved, "final_norm": params["final_norm"]}
    y = jax.jit(MODEL.apply)(params, x)[0]
    assert_close(jax.jit(hybrid.apply)(given, x)[0], y, 1e-12)

    alone = [
        dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, value_residual=False))
        for b in MODEL.blocks
    ]
    model = dataclasses.replace(MODEL, blocks=alone)
    names = model.param_shapes()["block_0"]["mixer"]
    assert not {"v0", "v1", "v2"} & set(names)
    given = params | {
        f"block_{i}": params[f"block_{i}"]
        | {"mixer": {n: params[f"block_{i}"]["mixer"][n] for n in names}}
        for i in range(DEPTH)
    }
    assert float(jnp.abs(jax.jit(model.apply)(given, x)[0] - y).max()) > 1e-2
