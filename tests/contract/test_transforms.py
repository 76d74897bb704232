"""Contract: vmap, scan, checkpoint, sharding, and one compilation for many calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.contract.cases import OPS
from tests.contract.harness import (
    QUICK,
    THOROUGH,
    assert_close,
    by_variant,
    cast,
    contract,
    copied,
    keywords,
    make,
    one_layer_of_each_kind,
    rows_with_meshes,
    runner,
    runner_with_gradients,
    state_weights,
    weights,
    with_kernel_once,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")
EACH = by_variant(variant=wrapped)


def stack(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@EACH
def test_vmap_agrees_with_a_loop(case, algorithm, x64, strict):
    """Map over all arguments, and over one argument with the others shared."""
    made = [make(case, seed=seed) for seed in (0, 1)]
    inputs = [cast(m[0], "float64") for m in made]
    states = [cast(m[1], "float64") for m in made]
    resets = [m[2] for m in made]
    run = functools.partial(case.run, **keywords(algorithm))
    single = runner(case, algorithm)
    every = jax.jit(jax.vmap(run))(stack(*inputs), stack(*states), stack(*resets))
    loop = stack(*(single(*args) for args in zip(inputs, states, resets, strict=True)))
    assert_close(every, loop, 1e-12)
    if not one_layer_of_each_kind(case):
        return

    # Operands that are not mapped reach the batching rules of the ops, not those of a layer.
    name = case.timed[-1]
    axes = dict.fromkeys(inputs[0]) | {name: 1}
    mixed = inputs[0] | {name: np.stack([i[name] for i in inputs], axis=1)}
    some = jax.jit(jax.vmap(run, in_axes=(axes, None, None)))(mixed, states[0], resets[0])
    loop = stack(*(single(inputs[0] | {name: i[name]}, states[0], resets[0]) for i in inputs))
    assert_close(some, loop, 1e-12)


@pytest.mark.slow
@by_variant(one_layer_of_each_kind, every_kernel=False, variant=wrapped)
def test_inside_scan_and_checkpoint(case, algorithm, x64, strict):
    """Run the op in a rematerialized `lax.scan` body and differentiate through the carry."""
    inputs, state, reset = make(case)
    inputs, state = cast(inputs, "float64"), cast(state, "float64")
    run = functools.partial(case.run, **keywords(algorithm))
    shapes = jax.eval_shape(run, inputs, state, reset)
    w, w_state = weights(shapes[0]), state_weights(case, shapes[1])

    def loss(inputs):
        out, final = run(inputs, state, reset)
        total = contract(out, w)
        return total if w_state is None else total + contract(final, w_state)

    def once(scale, _):
        scaled = jax.tree.map(lambda x: x * scale.astype(x.dtype), inputs)
        return scale * 0.9, loss(scaled)

    def looped(scale):
        return jax.lax.scan(jax.checkpoint(once), scale, None, length=2)[1].sum()

    got = jax.jit(jax.grad(looped))(jnp.float64(1.0))
    expected = 0.0
    for scale in (1.0, 0.9):  # d loss(scale inputs) / d scale, from the op's own gradients
        scaled = jax.tree.map(lambda x, s=scale: x * s, inputs)
        grads, _ = runner_with_gradients(case, algorithm)(scaled, state, reset, w, w_state)
        expected += scale * contract(grads, inputs)
    assert_close(got, np.float64(expected), 1e-10)


@functools.cache
def values_and_gradients(case):
    """Return the compiled (inputs, state, reset, weights) -> gradients, (outputs, final state)."""

    def loss(inputs, state, reset, w):
        out, final = case.run(inputs, state, reset)
        return contract(out, w), (out, final)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))


def weighted(case, inputs, state, reset):
    """Return float64 arguments, and random weights of the outputs and the final state."""
    args = cast(inputs, "float64"), cast(state, "float64"), reset
    out, final = jax.eval_shape(case.run, *args)
    return *args, weights(out), weights(final, 8)


@functools.cache
def on_one_device(case):
    """Return float64 arguments and their values and gradients, shared by the tests of sharding."""
    arguments = weighted(case, *make(case, batch=8, length=8))[:4]
    return arguments, jax.tree.map(np.asarray, values_and_gradients(case)(*arguments))


@rows_with_meshes({"linear_scan", "delta_rule-channel", "LRU"}, AxisType.Auto)
def test_batch_sharded_over_eight_devices(case, kind, x64, strict):
    """Compare with one device, and check that there is no collective, without `jax.set_mesh`.

    Gradients are here for ops and thorough rows, in the next test for every row. Gradients of
    shared inputs are here for thorough rows.
    """
    (inputs, state, reset, w), expected = on_one_device(case)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))

    def place(value, sharded=True):
        spec = P("data") if sharded else P()
        return jax.tree.map(lambda v: jax.device_put(v, NamedSharding(mesh, spec)), value)

    placed = (
        {name: place(value, name in case.timed) for name, value in inputs.items()},
        *(place(value) for value in (state, reset, w)),
    )

    def split(result):
        """Return the results that vary over devices."""
        (grads, d_state), out = result
        return {name: grads[name] for name in case.timed}, d_state, out

    gradient = values_and_gradients(case)
    if one_layer_of_each_kind(case):
        program = jax.jit(lambda *args: split(gradient(*args))).lower(*placed).compile()
        got = program(*placed)
        assert_close(got, split(expected), 1e-12)
        out = got[2]
    else:
        program = jax.jit(case.run).lower(*placed[:3]).compile()
        out = program(*placed[:3])
        assert_close(out, expected[1], 1e-12)
    assert all(leaf.sharding.spec[0] == "data" for leaf in jax.tree.leaves(out))
    compiled = program.as_text()
    for collective in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute("):
        assert collective not in compiled, f"{collective} in a program whose batch is split"
    if case.name in THOROUGH and set(inputs) != set(case.timed):
        assert_close(gradient(*placed), expected, 1e-12)


def heads_split(case, inputs, sizes):
    """Return a spec per input: batch over `data`; features, heads, parameters over `model`.

    The logical axis `embed` is split over `data` too, as under FSDP.
    """
    rules = {"embed": "data", "heads": "model", "mlp": "model", "state": "model"}

    def spec(shape, *names):
        names = (*names, *(None,) * (len(shape) - len(names)))
        return P(
            *(
                n if n and size % sizes[n] == 0 else None
                for n, size in zip(names, shape, strict=True)
            )
        )

    def of_param(axes, shape):
        names = [rules.get(axis) for axis in axes]
        return spec(shape, *(n if n not in names[:i] else None for i, n in enumerate(names)))

    found = {}
    for name, value in inputs.items():
        if name == "params" and case.layer is not None:
            axes, shapes = case.layer.param_axes(), case.layer.param_shapes()
            found[name] = jax.tree.map(of_param, axes, shapes, is_leaf=lambda x: type(x) is tuple)
        elif name in case.timed:
            names = ("data", None, "model")
            found[name] = jax.tree.map(
                lambda v, names=names: spec(v.shape, *names[: v.ndim]), value
            )
        else:
            names = (None, "model") if name in case.shared else ("model",)
            found[name] = jax.tree.map(lambda v, names=names: spec(v.shape, *names), value)
    return found


@rows_with_meshes({"linear_scan", "RMSNorm", "LRU"}, AxisType.Explicit)
def test_batch_and_heads_sharded(case, kind, x64, strict):
    """Compare with one device under `jax.set_mesh`: values, gradients, and vmap of both."""
    (inputs, state, reset, w), expected = on_one_device(case)
    heads = case.layer is not None or inputs[case.timed[-1]].ndim > 3
    sizes = {"data": 4, "model": 2} if heads else {"data": 2, "model": 3}  # or D = 3 channels
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * 2)

    def place(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    placed = (
        jax.tree.map(place, inputs, heads_split(case, inputs, sizes)),
        jax.tree.map(lambda v: place(v, P("data")), state),
        place(reset, P("data")),
    )
    gradient = values_and_gradients(case)
    with jax.set_mesh(mesh):
        got = gradient(*placed, w)
        if case.name in ("linear_scan", "delta_rule-channel", "LRU"):
            mapped = jax.tree.map(lambda x: jnp.stack([x, x]), placed)
            every = jax.jit(jax.vmap(gradient, in_axes=(0, 0, 0, None)))(*mapped, w)
            assert_close(jax.tree.map(lambda x: x[1], every), expected, 1e-11)
    assert_close(got, expected, 1e-11)
    if kind == AxisType.Explicit:
        for leaf in jax.tree.leaves(got[1]):
            assert jax.typeof(leaf).sharding.spec[0] == "data"


def values_with_gradients(run):
    """Return (inputs, state, reset, weights of both) -> gradients, (outputs, final state)."""

    def loss(inputs, state, reset, w_out, w_state):
        out, final = run(inputs, state, reset)
        # Selected, not multiplied: outputs without weight may be NaN.
        seen = jax.tree.map(lambda y, w: jnp.where(w == 0, jnp.zeros_like(y), y), out, w_out)
        return contract(seen, w_out) + contract(final, w_state), (out, final)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def time_specs(case, inputs):
    return {
        name: P(None, "time") if name in case.timed else P("time") if name in case.shared else P()
        for name in inputs
    }


@functools.cache
def on_each_part_of_time(case, algorithm, devices=8, chunk_size=4, kind=AxisType.Explicit):
    """Return `values_with_gradients` with `sequence_axis`, compiled once for several tests."""
    run = functools.partial(case.run, **keywords(algorithm, chunk_size), sequence_axis="time")
    mesh = jax.make_mesh((devices,), ("time",), axis_types=(kind,))
    time = P(None, "time")

    def split(inputs, state, reset):
        specs = time_specs(case, inputs), P(), time
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(time, P()))(
            inputs, state, reset
        )

    gradient = values_with_gradients(split)

    def place(spec, value):
        return jax.tree.map(lambda v: jax.device_put(v, NamedSharding(mesh, spec)), value)

    def placed(inputs, state, reset, w_out, w_state):
        # On Explicit axes `jax.shard_map` requires arrays with the sharding of its specs.
        specs = time_specs(case, inputs)
        inputs = {name: place(specs[name], value) for name, value in inputs.items()}
        state, w_state = place(P(), (state, w_state))
        results = gradient(inputs, state, place(time, reset), place(time, w_out), w_state)
        return jax.device_get(results)

    return placed


@functools.cache
def on_one_part_of_time(case):
    """Return the sequential results on one device, the reference for all algorithms of a row."""
    return values_with_gradients(functools.partial(case.run, **keywords("sequential")))


@by_variant(
    lambda case: case.split_axis,
    variant=wrapped,
    quick={"linear_scan", "delta_rule-channel", "monoid_scan-softmax"},
)
@pytest.mark.parametrize("with_state", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_time_sharded_over_eight_devices(case, algorithm, with_state, x64, strict):
    """Check values, final state and gradients per shard, with states that cross shards."""
    if not with_state and (algorithm != case.algorithms[0] or case.name not in THOROUGH):
        pytest.skip("no state is a zero state before any algorithm of the op begins")
    inputs, state, reset = make(case, length=24)
    if not with_state:
        reset, state = None, None
    else:
        reset[:, 5:] = False  # a state that travels over several devices
        reset[1, 17] = True
    args = weighted(case, inputs, state, reset)
    got, out = on_each_part_of_time(case, algorithm)(*args)
    expected, whole = on_one_part_of_time(case)(*args)
    assert_close(out, whole, 1e-11)
    assert_close(got, expected, 1e-10)
    for name in case.timed:  # each shard by itself, against its own scale
        for i in range(8):
            steps = slice(3 * i, 3 * i + 3)
            assert_close(got[0][name][:, steps], np.asarray(expected[0][name])[:, steps], 1e-8)


@by_variant(lambda case: case.split_axis, variant=wrapped, quick={"linear_scan"})
@pytest.mark.parametrize("poison", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_nothing_crosses_a_reset_on_a_later_device(case, algorithm, poison, x64, strict):
    """Check values and gradients after a reset, of sequences with a non-finite past."""
    length, where = 24, 16  # the second step on the sixth of eight devices
    inputs, state, reset = make(case, length=length)
    before, after = slice(0, where), slice(where, length)
    if case.reverse:
        before, after = slice(length - where, length), slice(0, length - where)
    reset[:] = False
    reset[:, -1 - where if case.reverse else where] = True
    spoiled = copied(case, inputs)
    for name in case.timed + case.shared:
        case.in_time(name, spoiled[name], before)[...] = poison
    spoiled_state = jax.tree.map(lambda s: np.full_like(s, poison), state)
    *_, w_out, w_state = weighted(case, inputs, state, reset)
    for leaf in jax.tree.leaves(w_out):
        leaf[:, before] = 0
    results = []
    for data, start in ((inputs, state), (spoiled, spoiled_state)):
        args = cast(data, "float64"), cast(start, "float64"), reset, w_out, w_state
        (grads, _), (out, final) = on_each_part_of_time(case, algorithm)(*args)
        names = case.timed + case.shared
        later = jax.tree.map(lambda y: y[:, after], out)
        results.append(
            ((later, final), {name: case.in_time(name, grads[name], after) for name in names})
        )
    assert_close(results[1], results[0], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["linear_attention-channel", "delta_rule-channel", "generalized_delta_rule"]
)
@pytest.mark.parametrize(("length", "chunk_size"), [(4, 4), (8, 1)])
def test_chunks_of_one_step_over_devices(name, length, chunk_size, x64, strict):
    """Check that constants vary over the mesh axes of their tangents, in the smallest chunk."""
    [case] = [case for case in OPS if case.name == name]
    args = weighted(case, *make(case, length=length))
    got = on_each_part_of_time(case, "chunked", 4, chunk_size, AxisType.Auto)(*args)
    assert_close(got, on_one_part_of_time(case)(*args), 1e-11)


VARIANTS_OF_OPS = [
    pytest.param(case, None, id=str(case), marks=[pytest.mark.slow] * (case.name not in QUICK))
    for case in OPS
] + [
    pytest.param(case, algorithm, id=f"{case}-{algorithm}", marks=pytest.mark.slow)
    for case in OPS
    for algorithm in case.algorithms
    if with_kernel_once(case, algorithm)
]


@pytest.mark.parametrize(("case", "algorithm"), VARIANTS_OF_OPS)
def test_second_eager_call_does_not_compile(case, algorithm):
    """The static arguments of two equal calls are equal."""
    compilations = []

    def listen(event, *args, **keywords):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    data = [make(case, seed=seed) for seed in (0, 1)]
    data = [(cast(i, "float32"), cast(s, "float32"), jnp.asarray(r)) for i, s, r in data]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(case.run(*data[0], **keywords(algorithm)))
        before = len(compilations)
        jax.block_until_ready(case.run(*data[1], **keywords(algorithm)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compilations) == before


def test_numpy_input_is_accepted(strict):
    for case in OPS:
        inputs, state, reset = make(case)
        narrow = jax.tree.map(
            lambda v: v.astype(np.complex64 if np.iscomplexobj(v) else np.float32), (inputs, state)
        )
        jax.eval_shape(functools.partial(case.run, reset=reset), *narrow)
        out, _ = case.run(*narrow, reset)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(out))
