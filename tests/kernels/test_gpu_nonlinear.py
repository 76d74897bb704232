"""GPU kernel for elementwise cells: the cell applied to rows, and the interpreted kernel.

Running it needs a jax whose Pallas interprets Mosaic GPU, 0.11.2 or newer, and finds races; the
rest needs none. `test_aot_gpu` compiles it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import seqjax
from pallas_kernels.nonlinear_scan import cell_program, gpu
from tests.contract.cases import cell_params
from tests.contract.harness import assert_close
from tests.kernels.gpu import KERNEL, TOLERANCE, interpreted, whole
from tests.oracles import rnn_oracles

CONSTANT = np.linspace(0.5, 1.5, 128, dtype="float32")


def mine(params, h, x):
    """Compute a cell with every operation that the kernel supports."""
    pair = jax.nn.softplus(params["mix"]) * h + x["both"]
    low = jnp.minimum(params["scale"] * pair[:, 0], pair.sum(axis=1)) * CONSTANT[: h.shape[0]]
    kept = jnp.where(x["keep"] > 0, h[:, 1], jnp.expm1(-jnp.square(low)) / (2 + h[:, 1] ** 2))
    pieces = [low[:, None], jnp.clip(kept, -2, 2)[:, None]]
    return jnp.flip(jnp.concatenate(pieces, axis=1), axis=1) * jax.nn.sigmoid(params["wide"].T)


def own_arrays(rng, channels, lead=()):
    def draw(*shape):
        return rng.standard_normal(shape).astype("float32")

    params = {"mix": draw(channels, 1), "scale": draw(), "wide": draw(2, channels)}
    keep = rng.integers(0, 2, (*lead, channels), "int32")
    return params, {"both": draw(*lead, channels, 2), "keep": keep}


def narrow(array, dtype="float32"):
    """Cast to a dtype; integers stay unchanged."""
    return jnp.asarray(array, "int32" if array.dtype == "int32" else dtype)


def arrays(cell, batch, length, seed=0):
    """Draw parameters, inputs, state, resets, and cotangents of all states and the last one."""
    rng = np.random.default_rng(seed)
    xs = rng.standard_normal((batch, length, cell.gates, cell.dim))
    # From a state that its steps lead to: sLSTM's divides by one of its numbers.
    state = np.asarray(cell.initial_state(batch), "float64")
    if cell.width < 4:
        state = rng.uniform(-0.9, 0.9, state.shape)
    cts = rng.standard_normal((batch, length, *state.shape[1:])), rng.standard_normal(state.shape)
    return cell_params(rng, cell), xs, state, rng.random((batch, length)) < 0.2, *cts


CELLS = [
    seqjax.cells.ParaGRU(128),
    seqjax.cells.ParaLSTM(128),
    seqjax.cells.SLSTM(128),
    seqjax.cells.SRU(128),
    seqjax.cells.IndRNN(128),
    seqjax.cells.UnICORNN(128),
    mine,
]


@pytest.mark.quick("ParaLSTM(dim=128)")
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: getattr(cell, "__name__", repr(cell)))
def test_a_cell_by_rows(cell):
    """Compare the cell by rows and its adjoint with the function; check the operations used."""
    rng = np.random.default_rng(0)
    if cell is mine:
        (params, xs), h = own_arrays(rng, 128, (1, 1)), rng.standard_normal((1, 128, 2))
    else:
        params, xs, h, *_ = arrays(cell, 1, 1)
    params, xs, h = jax.tree.map(narrow, (params, xs, h))
    program = cell_program.cell_program(cell, params, xs, h, (128,))

    def rows(array):
        return list(array.reshape(-1, 128))

    of_state = [
        rows(program.state.channels_last(h, 128)),
        rows(program.state.channels_last(jnp.cos(h), 128)),
    ]
    of_params, of_xs = (
        [row for a in arrays for row in rows(a)]
        for arrays in (program.param_arrays, program.x_arrays)
    )
    found = jax.jit(program.forward)(*of_params, *of_state[0], *of_xs)
    leaves, tree = jax.tree.flatten((params, h[0], jax.tree.map(lambda x: x[0, 0], xs)))
    moving = [i for i, x in enumerate(leaves) if x.dtype == "float32"]

    def of_moving(values):
        filled = list(leaves)
        for i, value in zip(moving, values, strict=True):
            filled[i] = value
        return cell(*jax.tree.unflatten(tree, filled))

    out, pull = jax.vjp(of_moving, [leaves[i] for i in moving])
    assert_close(jnp.stack(found, -1).reshape(out.shape), out, 1e-6)
    back = iter(jax.jit(program.backward)(*of_params, *of_state[0], *of_xs, *of_state[1]))
    for _ in range(program.closed_over):  # CONSTANT, one row, has an unused cotangent
        assert next(back).shape == (128,)
    layouts = [*program.params[program.closed_over :], program.state, *program.xs]
    cotangents = [
        layouts[i].original_axes(
            jnp.stack([next(back) for _ in range(layouts[i].size)]).reshape(
                *layouts[i].number_axis, 128
            )
        )
        for i in moving
    ]
    assert_close(cotangents, pull(jnp.cos(h[0]))[0], 2e-6)
    assert next(back, None) is None


def refused(cell, message, channels=8, **keywords):
    xs = keywords.pop("xs", jnp.ones((1, 3, channels)))
    state, params = keywords.pop("state", jnp.ones((1, channels))), keywords.pop("params", ())
    run = functools.partial(seqjax.nonlinear_scan, cell, implementation="pallas", **keywords)
    with pytest.raises(NotImplementedError, match=f"^nonlinear_scan: .*{message}"):
        jax.jit(run).trace(params, xs, state).lower(lowering_platforms=("cuda",))


def tanh_cell(params, h, x):
    return jnp.tanh(h + x)


def test_what_it_cannot_do():
    refused(lambda p, h, x: jnp.tanh(jnp.roll(h, 1) + x), "got '.*' over channels")
    # Not seen in the derivative: what is mixed does not depend on the state.
    refused(lambda p, h, x: h + jnp.cumsum(x), "got the operation 'cumsum'")
    refused(lambda p, h, x: h * x.sum(), "got 'reduce_sum' over channels")
    refused(lambda p, h, x: h + x[::-1], "got 'rev' over channels")
    refused(lambda p, h, x: h + jax.lax.lgamma(x), "got the operation 'lgamma'")
    refused(tanh_cell, "rows of multiples of 16 bytes, got D=6", channels=6)
    refused(tanh_cell, "does not support float16 arrays", xs=jnp.ones((1, 3, 8), "float16"))
    refused(tanh_cell, "got bool", params=jnp.ones(8, bool))
    refused(lambda p, h, x: h * x, "an axis of D=8 channels", xs=jnp.ones((1, 3)))
    refused(tanh_cell, "kernel is sequential, not newton", algorithm="newton")

    def split(xs, state):
        keywords = {"implementation": "pallas", "sequence_axis": "x"}
        return seqjax.nonlinear_scan(tanh_cell, (), xs, state, **keywords)[:2]

    in_time = P(None, "x")
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    over = jax.shard_map(split, mesh=mesh, in_specs=(in_time, P()), out_specs=(in_time, P()))
    with pytest.raises(NotImplementedError, match=r"^nonlinear_scan: .*T split over devices"):
        jax.eval_shape(over, jnp.ones((1, 3, 8)), jnp.ones((1, 8)))
    with pytest.raises(NotImplementedError, match=r"^nonlinear_scan: there is no Pallas"):
        seqjax.nonlinear_scan(
            tanh_cell, (), jnp.ones((1, 3, 8)), jnp.ones((1, 8)), implementation="pallas"
        )


def lowered(function, *args):
    """Return the program lowered for GPU, without a GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
def test_it_has_to_be_named_and_has_a_backward_pass():
    cell = seqjax.cells.ParaLSTM(8)
    params, xs, state, *_ = jax.tree.map(jnp.asarray, arrays(cell, 2, 3))

    def run(params, xs, **keywords):
        return jnp.sum(seqjax.nonlinear_scan(cell, params, xs, state, **keywords)[0])

    assert KERNEL not in lowered(run, params, xs)
    assert KERNEL not in lowered(functools.partial(run, algorithm="sequential"), params, xs)
    named = functools.partial(run, implementation="pallas")
    assert lowered(named, params, xs).count(KERNEL) == 1
    assert lowered(jax.grad(named, argnums=(0, 1)), params, xs).count(KERNEL) == 2
    layer = seqjax.layers.ParaLSTM(8, implementation="pallas")
    assert lowered(layer.apply, layer.init(jax.random.key(0)), xs[:, :, 0]).count(KERNEL) == 1
    mapped = jax.vmap(jax.grad(named), in_axes=(None, 0))
    assert lowered(mapped, params, jnp.stack([xs, xs])).count(KERNEL) == 2


def gradients_in_float64(cell, params, xs, state, reset, *cts):
    def run(params, xs, state):
        return seqjax.nonlinear_scan(cell, params, xs, state, reset=reset, algorithm="sequential")[
            :2
        ]

    with jax.enable_x64(True):
        return jax.vjp(run, params, xs, state)[1](cts)


@interpreted
@pytest.mark.parametrize(
    ("cell", "dtype", "shape"),
    [
        # More blocks of time than the prefetch depth; ragged edges in time and features.
        pytest.param(seqjax.cells.ParaGRU(136), "float32", (2, 67), id="ParaGRU"),
        pytest.param(seqjax.cells.ParaGRU(8), "bfloat16", (1, 5), id="bfloat16"),
        pytest.param(seqjax.cells.ParaLSTM(8), "float32", (2, 37), id="ParaLSTM"),
    ],
)
def test_values(cell, dtype, shape):
    params, xs, state, reset, *cts = arrays(cell, *shape)
    given = [jax.tree.map(narrow, params), narrow(xs, dtype), narrow(state), jnp.asarray(reset)]
    params, xs, state = jax.tree.map(lambda a: whole([a]), tuple(given[:3]))
    cts = [whole([narrow(cts[0], dtype)]), whole([narrow(cts[1])])]
    hs, final, kept = gpu.scan(cell, *given, out_dtype=dtype, save_states=True, interpret=True)
    assert hs.dtype == dtype
    expected = rnn_oracles.nonlinear_scan(cell, {"params": params, "x": xs}, state, reset)
    assert_close((hs, final), expected, TOLERANCE[dtype])
    d_params, [d_xs], d_state = gpu.adjoint(
        cell, *given, kept, narrow(cts[0], dtype), narrow(cts[1]), interpret=True
    )
    assert d_xs.dtype == dtype
    wanted = gradients_in_float64(cell, params, xs, state, reset, *cts)
    found = jax.tree.unflatten(jax.tree.structure(params), d_params), d_xs, d_state
    assert_close(found, wanted, TOLERANCE[dtype])


@interpreted
def test_nothing_crosses_a_reset():
    cell = seqjax.cells.ParaGRU(8)
    params, xs, state, reset, *cts = arrays(cell, 1, 12)
    reset[:], reset[0, 7] = False, True
    xs[0, 5], state[:] = np.nan, np.nan
    given = [*jax.tree.map(narrow, (params, xs, state)), reset]
    hs, final, kept = gpu.scan(cell, *given, out_dtype="float32", save_states=True, interpret=True)
    assert np.isnan(hs[0, :7]).all()
    expected = rnn_oracles.nonlinear_scan(cell, {"params": params, "x": xs}, state, reset)
    assert_close((hs[:, 7:], final), (expected[0][:, 7:], expected[1]), TOLERANCE["float32"])
    cts = list(map(narrow, cts))
    _, [d_xs], _ = gpu.adjoint(cell, *given, kept, *cts, interpret=True)
    after = [np.asarray(cts[0][:, 7:], "float64"), np.asarray(cts[1], "float64")]
    zero = np.zeros_like(state)
    wanted = gradients_in_float64(cell, params, xs[:, 7:], zero, None, *after)
    assert_close(d_xs[:, 7:], wanted[1], TOLERANCE["float32"])


def own_loss(params, xs, state, **keywords):
    hs, final, info = seqjax.nonlinear_scan(mine, params, xs, state, **keywords)
    return jnp.sum(jnp.sin(hs)) + jnp.sum(final**2), info


@interpreted
def test_the_op(compiled_quickly):
    """Run a user-defined cell through the op; compare with the sequential form."""
    params, xs = own_arrays(np.random.default_rng(0), 8, (2, 6))
    args = jax.tree.map(jnp.asarray, (params, xs, np.full((2, 8, 2), 0.3, "float32")))
    both = functools.partial(jax.value_and_grad, argnums=(0, 2), has_aux=True)
    found = both(functools.partial(own_loss, interpret=True))(*args)
    expected = both(functools.partial(own_loss, algorithm="sequential"))(*args)
    assert_close(found, expected, 2e-6)


@interpreted
@pytest.mark.slow
def test_other_derivatives(compiled_quickly):
    """Check forward mode and second order (sequential form), and vmap (kernel)."""
    cell = seqjax.cells.ParaGRU(4)
    params, xs, state, *_ = jax.tree.map(narrow, arrays(cell, 1, 2))

    def of_state(state, **keywords):
        hs, last, _ = seqjax.nonlinear_scan(cell, params, xs, state, **keywords)
        return jnp.sum(jnp.sin(hs)) + jnp.sum(last**2)

    def each(**keywords):
        run = functools.partial(of_state, **keywords)
        curve = jax.jvp(jax.grad(run), (state,), (jnp.ones_like(state),))
        return curve, jax.vmap(jax.grad(run))(jnp.stack([state, 2 * state]))

    assert_close(each(interpret=True), each(algorithm="sequential"), 1e-5)
