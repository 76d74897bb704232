"""Recurrences over grids: ops and layers against loops, derivatives, vmap, sharding, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import seqjax
from seqjax.layers import PLSTM2D, Chimera
from tests.contract.harness import assert_close, cast, weights
from tests.oracles import grid_oracles

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ALGORITHMS = ("diagonals", "rows")
SHAPES = [(3, 5), (5, 3), (1, 4), (4, 1), (1, 1)]
VARIATES = ((False, False), (True, False))


def plstm_inputs(rows=3, columns=5, batch=2, seed=0):
    rng, lead = np.random.default_rng(seed), (batch, rows, columns, 2)
    sizes = {"q": (3,), "k": (3,), "v": (4,), "source": (2,), "mark": (2,), "direct": ()}
    made = {name: rng.standard_normal((*lead, *size)) for name, size in sizes.items()}
    return made | {"transition": rng.uniform(-0.7, 0.7, (*lead, 2, 2))}


def ssm_inputs(rows=3, columns=5, batch=2, seed=0):
    rng, lead = np.random.default_rng(seed), (batch, rows, columns)
    A = rng.standard_normal((2, 2, 3, 2))
    A[0, 0], A[1, 1] = -np.exp(A[0, 0]), -np.exp(A[1, 1])
    A[0, 0, 0, 0] = 0.0  # the limit of (exp(dt A) - 1) / A
    return {
        "x": rng.standard_normal((*lead, 3)),
        "dt": np.exp(rng.standard_normal((*lead, 2, 3)) - 1),
        "A": A,
        "B": rng.standard_normal((*lead, 2, 2)),
        "C": rng.standard_normal((*lead, 2, 2)),
        "D": rng.standard_normal(3),
    }


OPS = {
    "plstm_2d": (seqjax.plstm_2d, plstm_inputs, grid_oracles.plstm_2d),
    "selective_scan_2d": (seqjax.selective_scan_2d, ssm_inputs, grid_oracles.selective_scan_2d),
}
LAYERS = {
    "PLSTM2D-P": (PLSTM2D(dim=4, heads=2), grid_oracles.plstm_layer),
    "PLSTM2D-D": (PLSTM2D(dim=4, heads=1, mode="D"), grid_oracles.plstm_layer),
    "PLSTM2D-complement": (
        PLSTM2D(dim=4, heads=2, complement=True, flips=((True, False),)),
        grid_oracles.plstm_layer,
    ),
    "Chimera": (Chimera(dim=4, state_dim=3, expand=1), grid_oracles.chimera),
    "Chimera-variates": (Chimera(dim=3, state_dim=2, flips=VARIATES), grid_oracles.chimera),
}
EACH_OP = pytest.mark.parametrize("name", OPS)
EACH_LAYER = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * ("-" in n)) for n in LAYERS]
)
EACH_ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS)


@functools.cache
def runner(name, algorithm):
    return jax.jit(lambda inputs: OPS[name][0](**inputs, algorithm=algorithm))


@functools.cache
def expected(name, shape):
    _, make, oracle = OPS[name]
    return oracle(**make(*shape))


@functools.cache
def gradients(name, algorithm):
    def loss(inputs, w):
        return jnp.sum(OPS[name][0](**inputs, algorithm=algorithm) * w)

    return jax.jit(jax.grad(loss))


def layer_case(name):
    """Return the layer, float64 parameters with noise, inputs and the oracle's outputs."""
    layer, oracle = LAYERS[name]
    rng = np.random.default_rng(0)
    params = jax.jit(lambda key: layer.init(key, jnp.float64))(jax.random.key(0))
    params = jax.tree.map(lambda p: np.asarray(p) + 0.3 * rng.standard_normal(p.shape), params)
    x = rng.standard_normal((2, 3, 4, layer.dim))
    return layer, params, x, oracle(layer, params, x)


@EACH_ALGORITHM
@EACH_OP
@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=[pytest.mark.slow] * (s != (3, 5))) for s in SHAPES], ids=str
)
def test_values(name, algorithm, shape, x64):
    made = runner(name, algorithm)(OPS[name][1](*shape))
    assert_close(made, expected(name, shape), 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@EACH_OP
@pytest.mark.slow
def test_narrow_inputs(name, dtype, tolerance):
    inputs = cast(OPS[name][1](), dtype)
    out = runner(name, "diagonals")(inputs)
    assert out.dtype == dtype
    rounded = {n: np.asarray(z).astype(np.float64) for n, z in inputs.items()}
    assert_close(out, OPS[name][2](**rounded), tolerance)


@EACH_OP
@pytest.mark.parametrize("algorithm", ["diagonals", pytest.param("rows", marks=pytest.mark.slow)])
def test_gradients(name, algorithm, x64):
    """Compare the slope along a random direction with that of the oracle."""
    _, make, oracle = OPS[name]
    inputs = make()
    w, direction = weights(expected(name, (3, 5))), weights(inputs, 3)
    found = gradients(name, algorithm)(inputs, w)
    slope = sum(np.sum(np.asarray(found[n]) * direction[n]) for n in inputs)
    step = 1e-5
    ends = [
        np.sum(w * oracle(**{n: z + sign * step * direction[n] for n, z in inputs.items()}))
        for sign in (1, -1)
    ]
    # The error of a central difference is about step^2 times a third derivative.
    assert_close(np.float64(slope), np.float64((ends[0] - ends[1]) / (2 * step)), 1e-7)


@EACH_OP
@pytest.mark.slow
def test_derivatives_agree_between_algorithms_and_modes(name, x64):
    inputs = OPS[name][1]()
    w, direction = weights(expected(name, (3, 5))), weights(inputs, 3)
    first, second = (gradients(name, algorithm)(inputs, w) for algorithm in ALGORITHMS)
    assert_close(first, second, 1e-12)
    run = runner(name, "diagonals")
    _, tangent = jax.jvp(run, (inputs,), (direction,))
    slope = sum(np.sum(np.asarray(first[n]) * direction[n]) for n in inputs)
    assert_close(np.sum(np.asarray(tangent) * w), slope, 1e-12)

    def slope_of(inputs):
        found = gradients(name, "diagonals")(inputs, w)
        return sum(jnp.sum(found[n] * direction[n]) for n in inputs)

    _, curvature = jax.jvp(jax.jit(slope_of), (inputs,), (direction,))
    near = [
        slope_of({n: z + sign * 1e-5 * direction[n] for n, z in inputs.items()}) for sign in (1, -1)
    ]
    assert_close(curvature, np.float64((near[0] - near[1]) / 2e-5), 1e-6)


@EACH_ALGORITHM
@EACH_OP
def test_an_output_depends_on_earlier_nodes_only(name, algorithm, x64):
    """Check to the bit, with NaN at the changed node."""
    inputs = OPS[name][1]()
    before = np.asarray(runner(name, algorithm)(inputs))
    changed = {n: z.copy() for n, z in inputs.items()}
    changed["v" if name == "plstm_2d" else "x"][:, 1, 2] = np.nan
    after = np.asarray(runner(name, algorithm)(changed))
    later = np.zeros(before.shape, bool)
    later[:, 1:, 2:] = True
    np.testing.assert_array_equal(before[~later], after[~later])
    assert np.isnan(after[:, 1:, 2:]).all(axis=(0, -1)).any()


@EACH_OP
@pytest.mark.slow
def test_vmap(name, x64):
    batch = [OPS[name][1](seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *z: np.stack(z), *batch)
    every = jax.jit(jax.vmap(lambda z: OPS[name][0](**z)))(stacked)
    loop = np.stack([np.asarray(runner(name, None)(inputs)) for inputs in batch])
    assert_close(every, loop, 1e-13)


@EACH_OP
@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_batch_sharded_over_eight_devices(name, kind, x64):
    inputs = OPS[name][1](batch=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    placed = {
        n: jax.device_put(z, NamedSharding(mesh, P("data") if z.shape[0] == 8 else P()))
        for n, z in inputs.items()
    }
    with jax.set_mesh(mesh):
        program = runner(name, "diagonals").lower(placed).compile()
        out = program(placed)
    assert_close(out, OPS[name][2](**inputs), 1e-13)
    assert out.sharding.spec[0] == "data"
    assert "all-gather(" not in program.as_text()
    assert "all-reduce(" not in program.as_text()


@EACH_LAYER
def test_layers(name, x64):
    layer, params, x, y = layer_case(name)
    out, state = jax.jit(layer.apply)(params, x)
    assert_close(out, y, 1e-12)
    assert state == ()


@pytest.mark.parametrize("name", ["PLSTM2D-P", "Chimera"])
def test_layers_in_bfloat16(name, x64, strict):
    layer, params, x, _ = layer_case(name)
    x = jnp.asarray(x, jnp.bfloat16)
    y = LAYERS[name][1](layer, params, np.asarray(x, np.float64))
    out, _ = jax.jit(layer.apply)(cast(params, "float32"), x)
    assert out.dtype == jnp.bfloat16
    assert_close(out, y, 2e-2)


@pytest.mark.parametrize("kind", [functools.partial(PLSTM2D, heads=2), Chimera])
def test_flips_may_be_lists(kind):
    layer = kind(4, flips=[[0, False], [True, np.True_]])
    assert layer == kind(4, flips=((False, False), (True, True)))
    assert hash(layer) == hash(kind(4, flips=layer.flips))
    jax.eval_shape(functools.partial(apply, layer), jnp.ones((1, 2, 2, 4)))


@pytest.mark.slow
@EACH_LAYER
def test_gradients_of_layers(name, x64):
    layer, params, x, y = layer_case(name)
    w, direction = weights(y), weights(params, 3)
    found = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply(p, x)[0] * w)))(params)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), found, direction)))
    oracle = LAYERS[name][1]
    ends = [
        np.sum(w * oracle(layer, jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), x))
        for s in (1e-5, -1e-5)
    ]
    assert_close(np.float64(slope), np.float64((ends[0] - ends[1]) / 2e-5), 1e-6)


@pytest.mark.slow
def test_all_orientations_see_the_whole_grid(x64):
    """Check that one input changes all outputs with four orientations, and a quarter with one."""
    for flips, seen in ((PLSTM2D(dim=4, heads=1).flips, 12), (((False, False),), 6)):
        layer = PLSTM2D(dim=4, heads=1, flips=flips)
        params = layer.init(jax.random.key(0), jnp.float64)
        x = np.random.default_rng(0).standard_normal((1, 3, 4, 4))
        other = x.copy()
        other[:, 1, 1] += 1
        run = jax.jit(layer.apply)
        change = np.asarray(run(params, x)[0] - run(params, other)[0])
        assert (np.abs(change).max(axis=-1) > 0).sum() == seen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: seqjax.plstm_2d(**plstm_inputs() | {"mark": np.ones((2, 3, 5, 2, 3))}),
            "plstm_2d: `mark` must have shape [B=2, X=3, Y=5, H=2, edges=2], got [2, 3, 5, 2, 3].",
        ),
        (
            lambda: seqjax.plstm_2d(**plstm_inputs() | {"direct": np.ones((2, 3, 5))}),
            "plstm_2d: `direct` must have shape [B=2, X=3, Y=5, H=2], got [2, 3, 5].",
        ),
        (
            lambda: seqjax.plstm_2d(**plstm_inputs(), algorithm="chunked"),
            "plstm_2d: `algorithm` must be one of 'diagonals', 'rows' or None, got 'chunked'.",
        ),
        (
            lambda: seqjax.selective_scan_2d(**ssm_inputs() | {"dt": np.ones((2, 3, 5, 3, 3))}),
            "selective_scan_2d: `A` must have shape [axes=3, axes=3, D=3, N], got [2, 2, 3, 2].",
        ),
        (
            lambda: PLSTM2D(dim=4, heads=2, flips=((True, True), (True, True))),
            "PLSTM2D: `flips` must be different pairs of booleans",
        ),
        (
            lambda: PLSTM2D(dim=4, heads=2, mode="D", complement=True),
            "PLSTM2D: `complement` must be False in mode 'D', got True;",
        ),
        (
            lambda: apply(Chimera(dim=4), np.ones((2, 3, 4))),
            "Chimera: `x` must have shape [B, X, Y, 4], got [2, 3, 4].",
        ),
        (
            lambda: apply(Chimera(dim=4), np.ones((2, 3, 3, 4), int)),
            "Chimera: `x` must have the dtype bfloat16 or float16 or float32 or float64, got int",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


def apply(layer, x, **keywords):
    return layer.apply(layer.init(jax.random.key(0)), x, **keywords)


def test_what_a_grid_does_not_have():
    layer, x = Chimera(dim=2, state_dim=1, expand=1), np.ones((1, 2, 2, 2), np.float32)
    with pytest.raises(NotImplementedError, match="Chimera: there are no resets for a layer over"):
        apply(layer, x, reset=np.zeros((1, 2), bool))
    with pytest.raises(NotImplementedError, match="Chimera: initial_state requires a causal layer"):
        layer.initial_state(1)
