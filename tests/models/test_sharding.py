"""Meshes, partition rules, stacked blocks, and the errors for meshes that do not fit."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.compiled import collectives
from seqjax import linear_scan, sharding
from seqjax.layers import LRU, S5, Attention, DeltaNet, Mamba, Scaled, ShortConv
from seqjax.models import Backbone, Block, LanguageModel
from tests.contract.harness import assert_close
from tests.contract.layer_cases import LAYERS

optax = pytest.importorskip("optax")

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def model_of(*mixers, **keywords):
    return LanguageModel(16, Backbone(mixers, **keywords))


def test_meshes():
    mesh = sharding.make_mesh("data=2, fsdp=2,sequence=-1")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert sharding.make_mesh({"tensor": 2}, jax.devices()[:2]).devices.size == 2
    explicit = sharding.make_mesh("data=8", axis_types=AxisType.Explicit)
    assert explicit.axis_types == (AxisType.Explicit,) * 4


@pytest.mark.parametrize(("tensor", "wanted"), [(2, "tensor"), (4, None)])
def test_heads_of_keys_are_split_or_whole(tensor, wanted):
    """Check that a mesh with more devices than heads of keys is accepted."""
    attention = Attention(8, heads=4, kv_heads=2, head_dim=4, bias=True, capacity=8)
    scaled = Scaled(attention, param_scales={"k_proj": 2.0})
    model = model_of(Block(attention), Block(scaled), scan=True)
    mesh = sharding.make_mesh(f"fsdp=-1,tensor={tensor}")
    specs = sharding.param_specs(model, mesh)["backbone"]
    for group in ("group_0", "group_1"):
        mixer = specs[group]["mixer"]
        assert mixer["k_proj"] == P(None, "fsdp", wanted)
        assert mixer["v_bias"] == P(None, wanted)
        assert mixer["q_proj"] == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta=8", "unknown axis 'dta'; write data, fsdp, tensor, sequence"),
        ("data=two", "'data=two' must be an axis and an integer"),
        ("data", "must be an axis and an integer"),
        ("data=0", "at least 1"),
        ("data=-1,fsdp=-1", "at most one -1"),
        ("data=2,sequence=2", "'data=2,sequence=2' requires 4 devices, got 8; data=4 would fit"),
        ("fsdp=3", r"requires 3 devices, got 8; a product .* would fit: 2 or 4"),
        ("data=-1,fsdp=3", r"requires a multiple of 3 devices, got 8; .* 2 or 4"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(text)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Fake device with the attributes that the placement reads."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "a chip"
    process_index: int = 0


CHIPS = [Chip(i, i % 4) for i in range(16)]  # of four slices in turn


@pytest.mark.parametrize(
    ("text", "crossing"),
    [
        ("data=2,fsdp=4,sequence=2", {"data": 2, "fsdp": 2}),
        ("fsdp=16", {"fsdp": 4}),
        ("tensor=4,sequence=4", {"sequence": 4}),
    ],
)
def test_the_batch_crosses_slices_first(text, crossing):
    sizes = sharding.parse_mesh(text, len(CHIPS))
    placed = sharding._placed(sizes, CHIPS)
    assert placed.shape == tuple(sizes.values())
    assert set(placed.flat) == set(CHIPS)
    slices = np.vectorize(lambda chip: chip.slice_index)(placed)
    for axis, name in enumerate(sizes):
        blocks = np.split(slices, crossing.get(name, 1), axis=axis)
        seen = [set(block.flat) for block in blocks]
        assert sum(map(len, seen)) == len(set().union(*seen))  # no slice on both sides


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="of 2 slices there are 4, 2 devices; take equally many"):
        sharding.make_mesh("fsdp=6", [*CHIPS[::4], *CHIPS[1:9:4]])


@pytest.mark.parametrize(
    ("mesh", "shape", "message"),
    [
        (
            "data=4,fsdp=2",
            (12, 8),
            r"the batch 12 .* data \* fsdp = 8; take 8 or 16, or .* 6 or 12",
        ),
        (
            "sequence=8",
            (8, 20),
            "the length 20 .* sequence = 8; take 16 or 24, or sequence = 5 or 10",
        ),
        ("tensor=8", (8, 8), "DeltaNet: heads 6 .* tensor = 8; take 8, or tensor = 6"),
        ("tensor=4,data=2", (8, 8), "DeltaNet: heads 6 .* take 4 or 8, or tensor = 3 or 6"),
        ("fsdp=8", (8, 8), r"\(embed\) 12 cannot be split over fsdp = 8; take 8 or 16, or fsdp"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_what_would(mesh, shape, message):
    model = model_of(DeltaNet(12, heads=6))
    with pytest.raises(ValueError, match=message):
        sharding.shard(model, sharding.make_mesh(mesh), batch_shape=shape)


def test_specs_follow_the_logical_axes():
    model = model_of(DeltaNet(8, heads=4), Mamba(8))
    specs = sharding.param_specs(model, sharding.make_mesh("data=2,fsdp=2,tensor=2"))
    assert specs["embedding"] == P("tensor", "fsdp")
    first, second = specs["backbone"]["block_0"], specs["backbone"]["block_1"]["mixer"]
    assert first["mixer"]["q_proj"] == P("fsdp", "tensor")
    assert first["mixer"]["out_proj"] == P("tensor", "fsdp")
    assert first["mixer"]["q_conv"]["weight"] == P(None, "tensor")
    assert first["mlp"]["down_proj"] == P("tensor", "fsdp")
    assert first["mixer_norm"]["scale"] == P("fsdp")
    assert second["A_log"] == P("tensor", None)  # the state's axis too, which comes second


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_every_layer_has_specs(case):
    specs = sharding.param_specs(case.layer, sharding.make_mesh("tensor=1,data=8"))
    shapes = case.layer.param_shapes()
    ranks = jax.tree.map(len, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert jax.tree.map(len, specs, is_leaf=lambda leaf: isinstance(leaf, P)) == ranks


def test_the_optimizer_state_lives_where_its_parameters_do():
    model = model_of(LRU(8, state_dim=6))
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    groups = jax.tree.map(lambda role: role, model.param_roles())
    transform = optax.multi_transform(
        {
            role: optax.chain(optax.adam(1e-3), optax.trace(0.9))
            for role in set(jax.tree.leaves(groups))
        },
        groups,
    )
    state = jax.eval_shape(transform.init, jax.eval_shape(model.init, jax.random.key(0)))
    plan = sharding.shard(model, mesh, optimizer_state=state)
    assert jax.tree.structure(plan.optimizer) == jax.tree.structure(state)
    found = {}
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(plan.optimizer), strict=True
    ):
        found.setdefault(leaf.shape, set()).add(place.spec)
        if "embedding" in jax.tree_util.keystr(path) and leaf.ndim:
            assert place.spec == P("tensor", "fsdp")
    assert found[()] == {P()}
    assert found[(2, 8, 6)] == {P(None, "fsdp", "tensor")}
    # It can be made there.
    made = jax.jit(transform.init, out_shardings=plan.optimizer)
    params = jax.jit(model.init, out_shardings=plan.params)(jax.random.key(0))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(made(params)))


@pytest.mark.slow
def test_stacked_blocks_are_the_same_model(x64):
    mixers, depth, groups = [LRU(4), ShortConv(4)], 4, 2
    plain = LanguageModel(7, Backbone(mixers, depth, remat=True), dtype="float64")
    stacked = LanguageModel(7, Backbone(mixers, depth, scan=True, remat=True), dtype="float64")
    params = jax.jit(stacked.init, static_argnums=1)(jax.random.key(0), jnp.float64)
    assert len(params["backbone"]) == groups + 1
    shapes = jax.tree.map(lambda p: p.shape, params)
    assert shapes == stacked.param_shapes()
    assert jax.tree.structure(stacked.param_roles()) == jax.tree.structure(params)
    axes = jax.tree.leaves(stacked.param_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert [len(a) for a in axes] == [p.ndim for p in jax.tree.leaves(params)]

    blocks = {
        f"block_{i}": jax.tree.map(
            lambda p, i=i: p[i // groups], params["backbone"][f"group_{i % groups}"]
        )
        for i in range(depth)
    }
    final = {"final_norm": params["backbone"]["final_norm"]}
    flat = params | {"backbone": blocks | final}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 6)))

    def loss(model, params):
        logits, state = model.apply(params, tokens[:, :4])
        logits, state = model.apply(params, tokens[:, 4:], state)
        return jnp.sum(logits**2), state

    gradient = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    got, state = gradient(stacked, params)
    expected, wanted = gradient(plain, flat)
    assert_close(state, wanted, 1e-12)
    assert_close(got["embedding"], expected["embedding"], 1e-12)
    for i in range(depth):
        ours = jax.tree.map(lambda p, i=i: p[i // groups], got["backbone"][f"group_{i % groups}"])
        assert_close(ours, expected["backbone"][f"block_{i}"], 1e-11)


def test_blocks_that_differ_are_stacked_by_their_order():
    mixers = [S5(4), LRU(4), S5(4), S5(4)]
    assert list(Backbone(mixers, scan=True).declare_params()) == [
        *(f"group_{i}" for i in range(4)),
        "final_norm",
    ]
    assert len(Backbone(mixers, depth=8, scan=True).declare_params()) == 5


@pytest.mark.parametrize("with_context", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes",
    [
        "data=2,fsdp=2,tensor=2",
        pytest.param("fsdp=2,tensor=2,sequence=2", marks=pytest.mark.slow),
    ],
)
def test_a_model_on_an_explicit_mesh(sizes, with_context, x64):
    """Compare values and gradients of stacked blocks with one device, with `shard`'s rules."""
    model = model_of(LRU(4), scan=True, depth=2, mlp_ratio=2)
    model = dataclasses.replace(model, dtype="float64")
    mesh = sharding.make_mesh(sizes, axis_types=AxisType.Explicit)
    where = sharding.shard(model, mesh, batch_shape=(4, 8))
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), jnp.float64)
    tokens = np.random.default_rng(0).integers(0, 16, (4, 8))

    def loss(model, mesh, params, tokens):
        def local(params, tokens, sequence_axis):
            logits, _ = model.apply(params, tokens, sequence_axis=sequence_axis)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()
            return losses if sequence_axis is None else jax.lax.pmean(losses, sequence_axis)

        split = sharding.split_time(local, mesh, (P(), P(None, "sequence")), P())
        return split(params, tokens)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=2), static_argnums=(0, 1))
    expected = gradient(model, None, params, tokens)
    constrained = sharding.constrain_activations(model, mesh)
    with jax.set_mesh(mesh) if with_context else contextlib.nullcontext():
        args = jax.device_put(params, where.params), jax.device_put(tokens, where.batch)
        got = gradient(constrained, mesh, *args)
    assert_close(got, expected, 1e-11)
    for leaf, place in zip(jax.tree.leaves(got[1]), jax.tree.leaves(where.params), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.slow
def test_a_state_keeps_its_sharding():
    """Check that a state keeps its sharding, so that a loop can carry it."""
    layer = LRU(4)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        params = layer.init(jax.random.key(0))
        x = jax.device_put(jnp.ones((4, 3, 4)), P("data", None, "model"))
        y, state = layer.apply(params, x)
        assert jax.typeof(y).sharding.spec == P("data", None, "model")
        assert jax.typeof(state).sharding.spec == P("data", None)
        _, ys = jax.lax.scan(
            lambda s, x_t: layer.step(params, x_t, s)[::-1],
            layer.initial_state(4),
            jnp.swapaxes(x, 0, 1),
        )
        assert_close(jnp.swapaxes(ys, 0, 1), y, 1e-6)
        many = jax.device_put(jnp.ones((4, 3, 4)), P("data", None, "model"))
        h, _ = linear_scan(jnp.ones(4), many, jax.device_put(jnp.ones((4, 4)), P("data", "model")))
        assert jax.typeof(h).sharding.spec == P("data", None, "model")


def test_a_kernel_on_an_explicit_mesh_is_refused_when_traced():
    x = jnp.ones((8, 16, 128))
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        x = jax.device_put(x, P("data"))
        with pytest.raises(NotImplementedError, match="cannot be split over devices by the comp"):
            jax.eval_shape(lambda x: linear_scan(x, x, implementation="pallas"), x)


def test_no_activation_crosses_devices():
    """Check that a training step's traffic does not grow with the number of sequences.

    The transpose of the embedding's lookup once gathered the rows of all devices.
    """
    mesh = sharding.make_mesh("data=2,fsdp=2,sequence=2")
    model = model_of(LRU(8), mlp_ratio=2)
    constrained = sharding.constrain_activations(model, mesh)

    def traffic(batch):
        where = sharding.shard(model, mesh, batch_shape=(batch, 64))

        def apply(params, tokens, sequence_axis):
            logits, _ = constrained.apply(params, tokens, sequence_axis=sequence_axis)
            return jax.lax.pmean(jnp.mean(logits**2), sequence_axis)

        def loss(params, tokens):
            specs = (P(), P(None, "sequence"))
            return sharding.split_time(apply, mesh, specs, P())(params, tokens)

        params = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(model.init, jax.random.key(0)),
            where.params,
        )
        tokens = jax.ShapeDtypeStruct((batch, 64), jnp.int32, sharding=where.batch)
        step = jax.jit(jax.grad(loss), out_shardings=where.params).lower(params, tokens)
        sent = collectives.read(step.compile().as_text()).sent
        del sent["collective-permute"]  # states and halos of sequences, as many as there are
        return sent

    assert traffic(4) == traffic(16)
