"""`sequence_axis` through layers and models: T over eight devices, each shard compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.compiled import collectives
from seqjax.layers import LRU, LSTM, S5, ParaGRU, SlidingWindowAttention
from seqjax.models import Backbone, Classifier, LanguageModel
from tests.contract.harness import OPTIONS, assert_close, cast, contract, weights
from tests.contract.layer_cases import LAYERS

pytestmark = pytest.mark.usefixtures("compiled_quickly")
DEVICES, B, T = 8, 2, 16
TIME = P(None, "time")
QUICK = ("DeltaNet",)  # a matrix state with a halo
GRADIENTS = {
    *(
        "S5-bidirectional",
        "DeltaNet",
        "SlidingWindowAttention",
        "LRU",
        "Mamba",
        "DeltaNet-gated",
        "RWKV7",
        "MLSTM",
        "ParaLSTM",
        "GRU",
        "SRWM",
    ),
    *("Attention", "ShortConv", "TokenShift", "LogLinearAttention", "MesaNet", "TTTMLP", "Titans"),
    "BlockRecurrent",
}


def split(function, *specs, out_specs):
    """Return `function(..., sequence_axis)` with T of some arguments over eight devices."""
    mesh = jax.make_mesh((DEVICES,), ("time",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        functools.partial(function, sequence_axis="time"),
        mesh=mesh,
        in_specs=specs,
        out_specs=out_specs,
    )


def numbers(tree):
    return jax.tree.map(lambda x: jnp.astype(x, float) if x.dtype == bool else x, tree)


def of_numbers(gradients):
    """Return the gradients of numbers, without those of flags."""
    return [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]


def resets():
    """Return resets: none in the first row, whose state passes all devices, and some in row two."""
    return jnp.zeros((B, T), bool).at[1, jnp.array([5, 6, 12])].set(True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=str(c), marks=[] if str(c) in QUICK else [pytest.mark.slow])
        for c in LAYERS
        if c.name not in OPTIONS
    ],
)
def test_layer(case, x64, strict):
    """Compare outputs and final state of a continuing call, and gradients shard by shard.

    Few layers have code for derivatives. The gradients of the others follow from those of their ops
    and exchanges. So gradients run for one layer of each kind, and for layers with their own loops
    or exchanges (`GRADIENTS`).
    """
    layer, rng = case.layer, np.random.default_rng(0)
    params = cast(case.inputs(rng, B, T)["params"], "float64")
    before, x = (cast(case.inputs(rng, B, T)["x"], "float64") for _ in range(2))
    state = jax.jit(layer.apply)(params, before)[1] if layer.causal else None
    args = (params, x, state, resets())
    sharded = split(layer.apply, P(), TIME, P(), TIME, out_specs=(TIME, P()))
    if str(case) not in GRADIENTS:
        got, whole = (jax.jit(run)(*args) for run in (sharded, layer.apply))
        assert_close(numbers(got), numbers(whole), 1e-11)
        return
    w = weights(jax.eval_shape(lambda *args: numbers(layer.apply(*args)), *args))

    def loss(run, *args):
        out = numbers(run(*args))
        return contract(out, w), out

    gradient = jax.jit(
        jax.grad(loss, argnums=(1, 2, 3), has_aux=True, allow_int=True), static_argnums=0
    )
    got, out = gradient(sharded, *args)
    expected, whole = gradient(layer.apply, *args)
    assert_close(out, whole, 1e-11)
    assert_close(of_numbers(got), of_numbers(expected), 1e-10)
    for i in range(DEVICES):  # against its own scale
        steps = slice(2 * i, 2 * i + 2)
        assert_close(got[1][:, steps], expected[1][:, steps], 1e-8)


@pytest.mark.slow
def test_one_position_per_device(x64):
    """Check shards that are shorter than the steps that a layer looks back at."""
    layer = SlidingWindowAttention(dim=4, heads=2, window=11)
    params = layer.init(jax.random.key(0), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, B, DEVICES, 4), jnp.float64)
    state = layer.apply(params, x[0])[1]
    reset = jnp.zeros((B, DEVICES), bool).at[1, 3].set(True)
    sharded = split(layer.apply, P(), TIME, P(), TIME, out_specs=(TIME, P()))
    got = jax.jit(sharded)(params, x[1], state, reset)
    assert_close(numbers(got), numbers(layer.apply(params, x[1], state, reset)), 1e-12)


@pytest.mark.slow
def test_language_model(x64):
    backbone = Backbone([LRU(4), SlidingWindowAttention(4, 2, 4)], remat=True)
    model = LanguageModel(7, backbone, dtype="float64")
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), jnp.float64)
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 7)
    reset = resets()

    def loss(run, params):
        logits, state = run(params, tokens, None, reset)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 0]), (logits, numbers(state))

    sharded = split(model.apply, P(), TIME, P(), TIME, out_specs=(TIME, P()))
    gradient = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    assert_close(gradient(sharded, params), gradient(model.apply, params), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pool", "bidirectional"), [("mean", True), pytest.param("last", False, marks=pytest.mark.slow)]
)
def test_classifier(pool, bidirectional, x64):
    """Check masks that begin and end anywhere, resets, and a carried pool."""
    mixer = S5(4, state_dim=4, bidirectional=bidirectional)
    model = Classifier(3, Backbone(mixer), input_dim=2, pool=pool, dtype="float64")
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 6, T, 2)))
    reset, mask = np.zeros((2, 6, T), bool), np.ones((2, 6, T), bool)
    mask[0, 1, :7] = mask[0, 2, 3:] = mask[0, 3, 2:9] = mask[0, 4] = False
    mask[0, 5] = mask[1, 1] = rng.random(T) < 0.5
    reset[0, 0, 9] = reset[0, 3, 5] = reset[0, 5, 4] = reset[1, 2, 15] = reset[1, 5, 0] = True

    def run(params, x, mask, reset, sequence_axis=None):
        state, logits = None, []
        for i in range(2):
            out, state = model.apply(
                params, x[i], state, reset[i], mask=mask[i], sequence_axis=sequence_axis
            )
            logits.append(out)
            if bidirectional:
                state = None
        return logits, state

    time = P(None, None, "time")
    sharded = split(run, P(), time, time, time, out_specs=P())
    w = weights(jax.eval_shape(run, params, x, mask, reset)[0])

    def loss(run, params, x):
        logits, state = run(params, x, mask, reset)
        return contract(logits, w), (logits, state)

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0)
    assert_close(gradient(sharded, params, x), gradient(run, params, x), 1e-10)


def traffic(backbone, length):
    """Return the collectives of a compiled gradient with T over eight devices."""
    params = jax.eval_shape(backbone.init, jax.random.key(0))
    sharded = split(backbone.apply, P(), TIME, P(), TIME, out_specs=(TIME, P()))

    def loss(params, x, reset):
        return jnp.sum(sharded(params, x, None, reset)[0] ** 2)

    x = jax.ShapeDtypeStruct((1, length, backbone.dim), jnp.float32)
    reset = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x, reset).compile()
    return collectives.read(compiled.as_text())


FEW = [LRU(4), SlidingWindowAttention(4, heads=2, window=5)]
# One layer of each kind that `FEW` lacks; the others differ from them in what a step computes.
# `test_layer` runs every layer.
KINDS = ("S5-bidirectional", "GateLoop", "Mamba", "DeltaNet-gated", "GLA", "ShortConv")
LINEAR = [c.layer for c in LAYERS if str(c) in KINDS]
NONLINEAR = [ParaGRU(4, state_dim=3), LSTM(4, state_dim=3)]


@pytest.mark.parametrize(
    "mixers",
    [
        pytest.param(FEW, id="few"),
        pytest.param(LINEAR, id="linear", marks=pytest.mark.slow),
        pytest.param(NONLINEAR, id="nonlinear", marks=pytest.mark.slow),
    ],
)
def test_communication_does_not_grow_with_time(mixers):
    """Check that collectives and bytes do not grow with 16 times the steps, with gradients."""
    short, long = (traffic(Backbone(mixers, mlp_ratio=0), length) for length in (64, 1024))
    assert short == long
    assert short.total > 0
    assert not short.unknown_loops


def test_collectives_in_loops_count_as_often_as_they_run():
    mesh = jax.make_mesh((DEVICES,), ("time",), axis_types=(AxisType.Auto,))

    def turn(x, _):
        return jax.lax.ppermute(x, "time", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]), None

    def run(x):
        x = jax.lax.scan(turn, x, None, length=5)[0]
        return jax.lax.psum(x, "time"), jax.lax.all_gather(x, "time", tiled=True, axis=0)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=P("time"), out_specs=(P(), P("time")))
    text = jax.jit(sharded).lower(jnp.ones((16, 3))).compile().as_text()
    found = collectives.read(text)
    part = 2 * 3 * 4
    assert found.counts == {"collective-permute": 5, "all-reduce": 1, "all-gather": 1}
    assert found.sent == {
        "collective-permute": 5 * part,
        "all-reduce": 2 * part * 7 // 8,
        "all-gather": 8 * part * 7 // 8,
    }
