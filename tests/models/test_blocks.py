"""Blocks of several kinds, built from public names only, as a user would."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import seqjax
from seqjax.layers import GRU, LRU, GatedMLP, Layer, LayerNorm, Param, RMSNorm, ShortConv
from seqjax.models import Backbone, Block, Classifier, LanguageModel, summary

pytestmark = pytest.mark.usefixtures("quick_compilation")
D = 4


@dataclasses.dataclass(frozen=True)
class FirstValue(Layer):
    """Adds to its input what the first block wrote, times the share of blocks done."""

    dim: int

    def declare_params(self):
        return {"scale": Param((self.dim,), ("embed",), "weight", jax.nn.initializers.ones)}

    def make_values(self, batch_size, length, dtype):
        return {"first": jnp.zeros((batch_size, length, self.dim), dtype)}

    def forward(self, params, x, state, context):
        first = jnp.where(context.block == 0, x * params["scale"], context.values["first"])
        context.values["first"] = first
        context.record("norm", jnp.sum(first**2, axis=(1, 2)))
        share = jnp.asarray(context.block, x.dtype) / context.depth
        return share * first, state


@dataclasses.dataclass(frozen=True)
class Undeclared(FirstValue):
    def make_values(self, batch_size, length, dtype):
        return {}

    def forward(self, params, x, state, context):
        context.values["first"] = x
        return x, state


KINDS = {
    "mixer only": Block(LRU(D)),
    "parallel": Block([LRU(D), ShortConv(D)], mlp=GatedMLP(D, 8), residual_factor=0.5),
    "post-norm": Block(LRU(D), GatedMLP(D, 8), norm="layer", norm_position="post"),
    "MLP with a state": Block(ShortConv(D), LRU(D), norm="rms_offset"),
    "values": Block(FirstValue(D), GatedMLP(D, 8)),
}


def run(backbone, reset=None):
    params = backbone.init(jax.random.key(0), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 7, D), jnp.float64)
    return params, x, jax.jit(backbone.apply_with_aux)(params, x, None, reset)


def stacked(params, backbone):
    """Return the parameters of a backbone in the layout of `scan=True`."""
    groups = sorted(name for name in backbone.param_shapes() if name.startswith("group"))
    period = len(groups)
    blocks = [params[f"block_{i}"] for i in range(len(backbone.stack))]
    return {
        f"group_{i}": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks[i::period])
        for i in range(period)
    } | {"final_norm": params["final_norm"]}


@pytest.mark.quick("values")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_steps_splits_scans_and_remats(kind, x64):
    backbone = Backbone([KINDS[kind], KINDS["mixer only"]], depth=4)
    reset = jnp.zeros((2, 7), bool).at[1, 3].set(True)
    params, x, (y, state, _) = run(backbone, reset)

    now, seen = backbone.initial_state(2, jnp.float64), []
    step = jax.jit(backbone.step)
    for t in range(7):
        y_t, now = step(params, x[:, t], now, reset[:, t])
        seen.append(y_t)
    np.testing.assert_allclose(jnp.stack(seen, axis=1), y, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), now, state)

    for options in ({"remat": True}, {"scan": True}, {"scan": True, "remat": True}):
        other = dataclasses.replace(backbone, **options)
        given = stacked(params, other) if other.scan else params

        def loss(p, x, other=other):
            return jnp.sum(other.apply(p, x, None, reset)[0] ** 2)

        again, state_again = jax.jit(other.apply)(given, x, None, reset)
        np.testing.assert_allclose(again, y, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state_again, state)
        assert jnp.isfinite(jax.jit(jax.grad(loss, argnums=1))(given, x)).all()


@pytest.mark.quick("mixer only")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_splits_time_over_a_mesh(kind, x64):
    backbone = Backbone(KINDS[kind], depth=2)
    params, x, _ = run(backbone)
    x = jnp.tile(x, (1, 4, 1))[:, :24]
    y = backbone.apply(params, x)[0]
    mesh = jax.make_mesh((4,), ("time",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        lambda p, x: backbone.apply(p, x, sequence_axis="time")[0],
        mesh=mesh,
        in_specs=(P(), P(None, "time")),
        out_specs=P(None, "time"),
    )
    np.testing.assert_allclose(jax.jit(split)(params, x), y, atol=1e-12)


def test_values_and_extra_outputs(x64):
    backbone = Backbone(KINDS["values"], depth=3)
    for scan in (False, True):
        _, _, (_, _, aux) = run(dataclasses.replace(backbone, scan=scan))
        assert sorted(aux) == [f"block_{i}/mixer/norm" for i in range(3)]
        first = aux["block_0/mixer/norm"]
        assert (first > 0).all()
        for value in aux.values():
            np.testing.assert_array_equal(value, first)


def test_undeclared_values_are_refused(x64):
    with pytest.raises(ValueError, match="wrote the values first, which no `make_values` declares"):
        run(Backbone(Undeclared(D), depth=2))


@pytest.mark.quick("True")
@pytest.mark.parametrize("scan", [False, True])
def test_dropout_needs_a_key_and_differs_by_block(scan):
    backbone = Backbone(ShortConv(D), depth=2, dropout=0.5, scan=scan)
    params = backbone.init(jax.random.key(0))
    x = jnp.ones((2, 5, D))
    apply = jax.jit(lambda key: backbone.apply(params, x, key=key)[0])
    plain = backbone.apply(params, x)[0]
    np.testing.assert_array_equal(plain, backbone.apply(params, x)[0])
    one, same, other = (apply(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one != plain).any()
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\)"):
        Backbone(LRU(D), dropout=1.0)


def test_dropout_keeps_the_mean():
    block = Block(RMSNorm(64), dropout=0.25)
    params = block.init(jax.random.key(0))
    x = jnp.ones((8, 200, 64))
    y, _ = block.apply(params, x, key=jax.random.key(3))
    branch = np.asarray(y - x)
    assert abs((branch == 0).mean() - 0.25) < 0.01
    assert abs(branch.mean() - 1) < 0.02


@pytest.mark.slow
def test_segment_ids_are_resets():
    model = LanguageModel(8, Backbone(LRU(D), depth=1))
    params = model.init(jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6) % 8
    ids = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4]])
    reset = seqjax.segment_starts(ids)
    by_ids = model.apply(params, tokens, segment_ids=ids)
    by_reset = model.apply(params, tokens, reset=reset)
    jax.tree.map(np.testing.assert_array_equal, by_ids, by_reset)

    state = by_ids[1]  # the first step of a call continues the state
    more = model.apply(params, tokens, state, segment_ids=ids)
    rest = model.apply(params, tokens, state, reset.at[:, 0].set(False))
    jax.tree.map(np.testing.assert_array_equal, more, rest)
    with pytest.raises(ValueError, match="`reset` or `segment_ids`, got both"):
        model.apply(params, tokens, None, reset, segment_ids=ids)
    with pytest.raises(ValueError, match="`segment_ids` must be integers of shape"):
        model.apply(params, tokens, segment_ids=ids[:, :3])

    mesh = jax.make_mesh((3,), ("time",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        lambda tokens, ids: model.apply(params, tokens, segment_ids=ids, sequence_axis="time")[0],
        mesh=mesh,
        in_specs=(P(None, "time"), P(None, "time")),
        out_specs=P(None, "time"),
    )
    np.testing.assert_allclose(jax.jit(split)(tokens, ids), by_ids[0], atol=1e-5)


@pytest.mark.slow
def test_a_classifier_takes_segment_ids():
    model = Classifier(3, Backbone(LRU(D), depth=1), input_dim=2)
    params = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 2))
    ids = jnp.array([[1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 4, 4]])
    logits, _ = model.apply(params, x, segment_ids=ids)
    np.testing.assert_array_equal(
        logits, model.apply(params, x, reset=seqjax.segment_starts(ids))[0]
    )


MODELS = [
    Backbone([LRU(D), Block([LRU(D), ShortConv(D)], norm_position="post")], depth=6, dropout=0.1),
    LanguageModel(16, Backbone(GRU(D), depth=3, mlp_ratio=2)),
    Backbone([Block(LRU(D), mlp=GatedMLP(D, 16)), LRU(D)], scan=True, norm="layer"),
]


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_repr_makes_the_model_again(model):
    names = vars(seqjax.layers) | vars(seqjax.models)
    assert eval(repr(model), dict(names)) == model
    assert len(repr(model)) < 160


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_the_summary_adds_up(model):
    if not isinstance(model, LanguageModel):
        model = LanguageModel(16, model)
    lines = summary(model).splitlines()
    params = model.init(jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = model.initial_state(1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert lines[-1].split() == ["total", f"{count:,}", f"{size:,}"]
    assert len(lines) == 4 + len(model.backbone.stack)


def test_a_summary_of_parameters_names_what_it_needs():
    with pytest.raises(ValueError, match=r"^summary: `model` must be a layer .*, got dict; pass"):
        summary({})


def test_layer_norm_without_bias():
    layer = LayerNorm(D, bias=False)
    assert list(layer.param_shapes()) == ["scale"]
