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


@pytest.mark.slow
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


def authors_names(params):
    """Return the model's parameters with the names and layouts of the authors' files."""
    files = {}
    for i in range(DEPTH):
        p, name = jax.tree.map(np.asarray, params[f"block_{i}"]), f"blocks.{i}."
        att, ffn = p["mixer"], p["mlp"]
        for ours, theirs in (("mixer_norm", "ln1"), ("mlp_norm", "ln2")):
            files[f"{name}{theirs}.weight"] = p[ours]["scale"]
            files[f"{name}{theirs}.bias"] = p[ours]["bias"]
        squares = {"r": "receptance", "k": "key", "v": "value", "out": "output"}
        for ours, theirs in squares.items():
            files[f"{name}att.{theirs}.weight"] = att[f"{ours}_proj"].T
        files[f"{name}att.ln_x.weight"] = att["norm_scale"]
        files[f"{name}att.ln_x.bias"] = att["norm_bias"]
        same = [n for n in att if not n.endswith("_proj") and not n.startswith("norm")]
        files |= {f"{name}att.{n}": att[n] for n in same}
        files[f"{name}ffn.x_k"] = ffn["x_k"]
        files[f"{name}ffn.key.weight"] = ffn["key_proj"].T
        files[f"{name}ffn.value.weight"] = ffn["value_proj"].T
    files["ln_out.weight"] = np.asarray(params["final_norm"]["scale"])
    files["ln_out.bias"] = np.asarray(params["final_norm"]["bias"])
    return files


def authors_step(p, x, state):
    """Compute one token of one sequence in the form of the authors' code, state [V, K] per head."""

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    first = None
    for i in range(DEPTH):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        last, S, last_ffn = state[i]
        now = norm(x, f"blocks.{i}.ln1")
        xr, xw, xk, xv, xa, xg = (now + p[f"{att}x_{c}"] * (last - now) for c in "rwkvag")
        r, k, v = (
            p[f"{att}{n}.weight"] @ z for n, z in (("receptance", xr), ("key", xk), ("value", xv))
        )
        w = np.tanh(xw @ p[f"{att}w1"]) @ p[f"{att}w2"] + p[f"{att}w0"]
        w = np.exp(-sigmoid(w) / np.exp(0.5))
        a = sigmoid(p[f"{att}a0"] + xa @ p[f"{att}a1"] @ p[f"{att}a2"])
        g = sigmoid(xg @ p[f"{att}g1"]) @ p[f"{att}g2"]
        kk = (k * p[f"{att}k_k"]).reshape(2, -1)
        kk = kk / np.maximum(np.linalg.norm(kk, axis=1, keepdims=True), 1e-12)
        k = k * (1 + (a - 1) * p[f"{att}k_a"])
        if first is None:
            first = v
        else:
            v = v + (first - v) * sigmoid(p[f"{att}v0"] + xv @ p[f"{att}v1"] @ p[f"{att}v2"])
        r, w, k, v, a = (z.reshape(2, -1, 1) for z in (r, w, k, v, a))
        kk = kk[..., None]
        S = S * w.mT - S @ kk @ (kk * a).mT + v @ k.mT
        o = S @ r
        o = (o - o.mean(1, keepdims=True)) / np.sqrt(o.var(1, keepdims=True) + 1e-5 * D / 2)
        o = o.reshape(-1) * p[f"{att}ln_x.weight"] + p[f"{att}ln_x.bias"]
        o = o + ((r * k * p[f"{att}r_k"][..., None]).sum(1, keepdims=True) * v).reshape(-1)
        x = x + p[f"{att}output.weight"] @ (o * g)
        now_ffn = norm(x, f"blocks.{i}.ln2")
        k = p[f"{ffn}key.weight"] @ (now_ffn + p[f"{ffn}x_k"] * (last_ffn - now_ffn))
        x = x + p[f"{ffn}value.weight"] @ np.maximum(k, 0) ** 2
        state[i] = now, S, now_ffn
    return norm(x, "ln_out"), state


@pytest.mark.slow
def test_the_model_agrees_with_the_form_of_the_authors_code(x64, strict):
    """Compare with steps over parameters named and laid out as in the authors' checkpoints."""
    params, x, _ = arguments()
    y = jax.jit(MODEL.apply)(params, x)[0]
    files, expected = authors_names(params), np.zeros_like(x)
    for b in range(B):
        state = [(np.zeros(D), np.zeros((2, D // 2, D // 2)), np.zeros(D))] * DEPTH
        for t in range(T):
            expected[b, t], state = authors_step(files, x[b, t], state)
    assert_close(y, expected, 1e-10)
