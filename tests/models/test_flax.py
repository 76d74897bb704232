"""Flax adapters: results of the bare layer, and the transformations of Flax."""

import dataclasses
import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.layers._grid import GridLayer
from tests.contract.harness import assert_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, DIM = 2, 6, 4
LRU = seqjax.layers.LRU(DIM)
DELTANET = seqjax.layers.DeltaNet(DIM, heads=2, gated=True)
HYBRID = seqjax.models.Backbone([LRU, seqjax.layers.ParaGRU(DIM)], mlp_ratio=0)
LANGUAGE = seqjax.models.LanguageModel(11, seqjax.models.Backbone([DELTANET]))
MLP = seqjax.layers.GatedMLP(8)
slow = pytest.mark.slow
BOTH = [
    pytest.param(LRU, id="LRU"),
    pytest.param(DELTANET, id="DeltaNet", marks=slow),
    pytest.param(HYBRID, id="Backbone", marks=slow),
    pytest.param(LANGUAGE, id="LanguageModel"),
]


def inputs(layer, length=T):
    if layer is LANGUAGE:
        return jax.random.randint(jax.random.key(1), (B, length), 0, 11)
    return jax.random.normal(jax.random.key(1), (B, length, DIM))


@functools.cache
def wrapped(layer):
    """Return (bare parameters, NNX module, Linen module, its variables) with equal values."""
    module = seqjax.nnx.Recurrent(layer, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module))["params"]
    twin = seqjax.linen.Recurrent(layer)
    variables = jax.jit(twin.init)(jax.random.key(0), inputs(layer))
    boxed = jax.tree.map(
        lambda old, new: old.replace_boxed(new),
        variables["params"],
        params,
        is_leaf=lambda leaf: isinstance(leaf, linen.LogicallyPartitioned),
    )
    return params, module, twin, {"params": boxed}


@pytest.mark.quick("LRU")
@pytest.mark.parametrize("layer", BOTH)
def test_same_numbers_as_the_bare_layer(layer):
    params, module, twin, variables = wrapped(layer)
    x = inputs(layer)
    reset = jnp.zeros((B, T), bool).at[0, 3].set(True)
    apply, step = jax.jit(layer.apply), jax.jit(layer.step)
    bare = apply(params, x, None, reset)
    assert_same_bits(nnx.jit(lambda m, *a: m(*a))(module, x, None, reset), bare)
    assert_same_bits(jax.jit(twin.apply)(variables, x, None, reset), bare)
    one = step(params, x[:, 0], bare[1], reset[:, 3])
    assert_same_bits(nnx.jit(lambda m, *a: m.step(*a))(module, x[:, 0], bare[1], reset[:, 3]), one)
    linen_step = jax.jit(functools.partial(twin.apply, method="step"))
    assert_same_bits(linen_step(variables, x[:, 0], bare[1], reset[:, 3]), one)
    for adapter in (module, twin):
        assert_same_bits(adapter.initial_state(B), layer.initial_state(B))


def test_parameters_start_as_the_layer_starts_them():
    """Check that parameters are drawn with Flax's key and have the requested dtype."""
    module = seqjax.nnx.Recurrent(LRU, rngs=nnx.Rngs(3), param_dtype=jnp.bfloat16)
    drawn = LRU.init(nnx.Rngs(3).params(), jnp.bfloat16)
    assert_same_bits(nnx.to_pure_dict(nnx.state(module))["params"], drawn)
    assert module.params["B"].dtype == jnp.bfloat16
    assert module.params["nu_log"].dtype == jnp.float32
    twin = seqjax.linen.Recurrent(LRU, param_dtype=jnp.bfloat16, partitioned=False)
    params = twin.init(jax.random.key(0), inputs(LRU))["params"]
    assert jax.tree.map(jnp.shape, params) == LRU.param_shapes()
    assert params["C"].dtype == jnp.bfloat16
    # gamma_log is a function of nu_log: the parameters were drawn together.
    size = jnp.exp(-2 * jnp.exp(params["nu_log"])) + jnp.exp(2 * params["gamma_log"])
    assert_close(size, np.ones(DIM), 1e-5)


@pytest.mark.parametrize("name", seqjax.layers.__all__)
def test_every_layer_can_be_wrapped(name):
    """Check that no parameter name collides with an attribute of Flax."""
    kind = getattr(seqjax.layers, name)
    is_layer = inspect.isclass(kind) and issubclass(kind, seqjax.layers.Layer)
    if not is_layer or inspect.isabstract(kind):
        pytest.skip("not a layer by itself")
    sizes = {"dim": 32, "heads": 2, "window": 3, "layer": LRU, "kv_rank": 4, "head_dim": 8}
    sizes |= {"experts": 4, "top_k": 2, "name": "a", "mlp": MLP}
    sizes["attention"] = seqjax.layers.Attention(16, heads=2, out_dim=8)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    layer = kind(**{field: sizes[field] for field in needed})
    if kind is seqjax.layers.SharedTransformer:  # it runs inside a backbone only
        layer = seqjax.models.Backbone(seqjax.models.Block(MLP, injection=layer))
    wanted = jax.tree.map(tuple, layer.param_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    state = nnx.state(nnx.eval_shape(lambda: seqjax.nnx.Recurrent(layer, rngs=nnx.Rngs(0))))
    axes = {path[1:]: leaf.out_sharding for path, leaf in nnx.to_flat_state(state)}
    assert axes == dict(nnx.traversals.flatten_mapping(wanted))
    x = jnp.ones((B, T, 1, layer.dim) if issubclass(kind, GridLayer) else (B, T, layer.dim))
    variables = jax.eval_shape(seqjax.linen.Recurrent(layer).init, jax.random.key(0), x)
    names = jax.tree.map(
        lambda box: box.names,
        variables["params"],
        is_leaf=lambda leaf: isinstance(leaf, linen.LogicallyPartitioned),
    )
    assert names == wanted


def test_split_merge_filters_and_state():
    _, module, _, _ = wrapped(LANGUAGE)
    x = inputs(LANGUAGE)
    graph, recurrence, rest = nnx.split(module, "recurrence", ...)
    roles = dict(nnx.traversals.flatten_mapping(LANGUAGE.param_roles()))
    found = {path[1:] for path, _ in nnx.to_flat_state(recurrence)}
    assert found == {path for path, role in roles.items() if role == "recurrence"}
    assert len(nnx.to_flat_state(rest)) == len(roles) - len(found)
    same = nnx.merge(graph, recurrence, rest)
    assert_same_bits(same(x), module(x))
    assert len(nnx.to_flat_state(nnx.state(module, nnx.Param))) == len(roles)


def test_nnx_grad_and_optimizer():
    """Compare gradients with the bare layer's; use an optimizer that depends on roles."""
    params, _, _, _ = wrapped(LRU)
    module = seqjax.nnx.Recurrent(LRU, rngs=nnx.Rngs(0))
    x = inputs(LRU)

    def loss(module):
        return jnp.sum(module(x)[0] ** 2)

    labels = jax.tree.map(
        lambda role: "still" if role == "recurrence" else "moves", {"params": LRU.param_roles()}
    )
    transform = optax.multi_transform(
        {"still": optax.set_to_zero(), "moves": optax.adam(1e-2)},
        lambda state: nnx.State(labels),
    )
    optimizer = nnx.Optimizer(module, transform, wrt=nnx.Param)

    @nnx.jit
    def train_step(module, optimizer):
        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value, grads

    before, grads = train_step(module, optimizer)
    bare = jax.jit(jax.grad(lambda p: jnp.sum(LRU.apply(p, x)[0] ** 2)))(params)
    assert_close(nnx.to_pure_dict(grads)["params"], bare, 1e-6)
    after, _ = train_step(module, optimizer)
    assert after < before
    assert_same_bits(module.params["nu_log"][...], params["nu_log"])
    assert np.any(module.params["B"][...] != params["B"])


def test_nnx_scan_over_time_equals_the_layer():
    params, module, _, _ = wrapped(DELTANET)
    x = inputs(DELTANET)

    @nnx.jit
    @nnx.scan(in_axes=(None, nnx.Carry, 1), out_axes=(nnx.Carry, 1))
    def over_time(module, state, x_t):
        y, state = module.step(x_t, state)
        return state, y

    state, y = over_time(module, module.initial_state(B), x)
    assert_close((y, state), jax.jit(DELTANET.apply)(params, x), 1e-5)


def test_nnx_vmap_and_scan_over_layers():
    """Create a stack with vmap and run it with scan and remat, with an axis name for the stack."""
    names = {nnx.PARTITION_NAME: "layers"}

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=names)
    def make(rngs):
        return seqjax.nnx.Recurrent(LRU, rngs=rngs)

    stack = make(nnx.Rngs(0))
    assert stack.params["B"].shape == (3, 2, DIM, DIM)
    assert stack.params["B"].out_sharding == ("layers", None, "embed", "state")

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=names)
    @nnx.remat
    def run(module, x):
        return x + module(x)[0]

    x = inputs(LRU)
    y, grads = nnx.jit(nnx.value_and_grad(lambda m: jnp.sum(run(m, x))))(stack)
    params = nnx.to_pure_dict(nnx.state(stack))["params"]
    wanted = x
    for i in range(3):
        wanted = wanted + LRU.apply(jax.tree.map(operator.itemgetter(i), params), wanted)[0]
    assert_close(y, jnp.sum(wanted), 1e-5)
    assert grads["params"]["B"].shape == (3, 2, DIM, DIM)


class Stack(linen.Module):
    """Three rematerialised layers by scan, as a Linen user stacks blocks."""

    @linen.compact
    def __call__(self, x):
        def body(module, x, _):
            return x + module(x)[0], None

        block = linen.remat(seqjax.linen.Recurrent)(LRU, name="block")
        scan = linen.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={linen.meta.PARTITION_NAME: "layers"},
        )
        return scan(block, x, None)[0]


class OverTime(linen.Module):
    """One layer, step after step."""

    @linen.compact
    def __call__(self, state, x):
        def body(module, state, x_t):
            y, state = module.step(x_t, state)
            return state, y

        scan = linen.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        return scan(seqjax.linen.Recurrent(DELTANET), state, x)


def test_linen_scan_and_remat_over_layers():
    x = inputs(LRU)
    variables = jax.jit(Stack().init)(jax.random.key(0), x)
    box = variables["params"]["block"]["B"]
    assert box.names == ("layers", None, "embed", "state")
    spec = linen.get_partition_spec(variables)["params"]["block"]["B"]
    assert spec == jax.sharding.PartitionSpec("layers", None, "embed", "state")
    params = linen.unbox(variables)["params"]["block"]
    assert len(np.unique(params["nu_log"])) == 3 * DIM
    wanted = x
    for i in range(3):
        wanted = wanted + LRU.apply(jax.tree.map(operator.itemgetter(i), params), wanted)[0]
    value, grads = jax.jit(jax.value_and_grad(lambda v: jnp.sum(Stack().apply(v, x))))(variables)
    assert_close(value, jnp.sum(wanted), 1e-5)
    assert np.all(np.isfinite(linen.unbox(grads)["params"]["block"]["nu_log"]))


def test_linen_scan_over_time_equals_the_layer():
    x, state = inputs(DELTANET), DELTANET.initial_state(B)
    variables = jax.jit(OverTime().init)(jax.random.key(0), state, x)
    params = linen.unbox(variables)["params"]
    (params,) = params.values()
    final, y = jax.jit(OverTime().apply)(variables, state, x)
    assert_close((y, final), jax.jit(DELTANET.apply)(params, x), 1e-5)


@pytest.mark.slow
def test_orbax_saves_and_restores_both(tmp_path):
    _, module, twin, variables = wrapped(DELTANET)
    x = inputs(DELTANET)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", nnx.state(module))
        checkpointer.save(tmp_path / "linen", variables)
        checkpointer.wait_until_finished()
        empty = nnx.eval_shape(lambda: seqjax.nnx.Recurrent(DELTANET, rngs=nnx.Rngs(5)))
        graph, abstract = nnx.split(empty)
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "nnx", abstract))
        assert_same_bits(restored(x), module(x))
        abstract = jax.eval_shape(twin.init, jax.random.key(5), x)
        restored = checkpointer.restore(tmp_path / "linen", abstract)
        assert_same_bits(twin.apply(restored, x), twin.apply(variables, x))


RULES = {"heads": "model", "state": "model"}


@pytest.mark.slow
def test_nnx_parameters_are_placed_on_a_mesh():
    """Check that modules created under a mesh are split by the rules, with equal results."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params, _, _, _ = wrapped(DELTANET)
    names = sorted(set(jax.tree.leaves(DELTANET.param_axes())))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"^Recurrent: no sharding rule for the axes"):
            seqjax.nnx.Recurrent(DELTANET, rngs=nnx.Rngs(0))
        module = seqjax.nnx.Recurrent(DELTANET, rngs=nnx.Rngs(0), sharding_rules=RULES)
        with nnx.logical_axis_rules(tuple((name, RULES.get(name)) for name in names)):
            by_context = seqjax.nnx.Recurrent(DELTANET, rngs=nnx.Rngs(0))
        y, _ = nnx.jit(lambda m, x: m(x))(module, inputs(DELTANET))
        assert nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)
    for made in (module, by_context):
        assert made.params["q_proj"][...].sharding.spec == jax.P(None, "model")
    assert_close(y, jax.jit(DELTANET.apply)(params, inputs(DELTANET))[0], 1e-5)
    specs = nnx.get_partition_spec(nnx.state(module))
    assert specs["params"]["out_proj"].get_value() == jax.P("model", None)


def test_no_mesh_axis_is_taken_twice():
    module = seqjax.nnx.Recurrent(
        LRU, rngs=nnx.Rngs(0), sharding_rules={"embed": "model", "state": "model"}
    )
    specs = nnx.get_partition_spec(nnx.state(module))["params"]
    assert specs["B"].get_value() == jax.P(None, "model", None)
    assert specs["nu_log"].get_value() == jax.P("model")


@pytest.mark.slow
def test_linen_parameters_are_placed_on_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    _, _, twin, variables = wrapped(DELTANET)
    rules = [(name, RULES.get(name)) for name in jax.tree.leaves(DELTANET.param_axes())]
    logical = linen.get_partition_spec(variables)
    placed = jax.device_put(
        linen.unbox(variables), linen.logical_to_mesh_sharding(logical, mesh, rules)
    )
    assert placed["params"]["q_proj"].sharding.spec == jax.P(None, "model")
    y, _ = jax.jit(twin.apply)(placed, inputs(DELTANET))
    assert_close(y, twin.apply(variables, inputs(DELTANET))[0], 1e-5)


def test_a_classifier_takes_its_mask():
    model = seqjax.models.Classifier(3, seqjax.models.Backbone(LRU, depth=1), input_dim=DIM)
    module = seqjax.nnx.Recurrent(model, rngs=nnx.Rngs(0))
    twin = seqjax.linen.Recurrent(model)
    x, mask = inputs(model), jnp.arange(T)[None].repeat(B, 0) > 1
    params = nnx.to_pure_dict(nnx.state(module))["params"]
    wanted = model.apply(params, x, mask=mask)
    assert_same_bits(module(x, mask=mask), wanted)
    assert_same_bits(twin.apply({"params": params}, x, mask=mask), wanted)
    with pytest.raises(TypeError, match="maks"):
        module(x, maks=mask)


def test_what_is_no_layer_is_refused():
    for make in (
        lambda: seqjax.nnx.Recurrent(4, rngs=nnx.Rngs(0)),
        lambda: seqjax.linen.Recurrent(4).init(jax.random.key(0), jnp.ones((B, T, DIM))),
    ):
        with pytest.raises(ValueError, match=r"^Recurrent: `layer` must be a seqjax layer"):
            make()


def test_without_state_modules_fit_sequential():
    x, reset = inputs(LRU), None
    params, _, _, variables = wrapped(LRU)
    want, _ = LRU.apply(params, x, None, reset)
    module = seqjax.nnx.Recurrent(LRU, rngs=nnx.Rngs(0), return_state=False)
    stack = nnx.Sequential(module, nnx.relu)
    assert_close(stack(x), jax.nn.relu(want), 1e-6)
    twin = seqjax.linen.Recurrent(LRU, return_state=False)
    stack = linen.Sequential([twin, linen.relu])
    got = stack.apply({"params": {"layers_0": variables["params"]}}, x)
    assert_close(got, jax.nn.relu(want), 1e-6)
    # `step` still returns the state, which the next step takes.
    assert len(module.step(x[:, 0], module.initial_state(B))) == 2


def test_nnx_names_rngs_that_are_none():
    for wrong in (0, jax.random.key(0), None):
        with pytest.raises(ValueError, match=r"^Recurrent: `rngs` must be an nnx.Rngs, got"):
            seqjax.nnx.Recurrent(LRU, rngs=wrong)
