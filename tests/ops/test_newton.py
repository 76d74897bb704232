"""Newton: correct at any weight scale, on models with long memory, and on chaotic input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import seqjax
from seqjax import cells
from seqjax.ops.nonlinear import jacobian_structure, memory_check
from tests.contract.cases import cell_params
from tests.contract.harness import assert_close, error

pytestmark = pytest.mark.usefixtures("compiled_quickly")
D = 4
# The quick tests run one cell with a state per channel, one with several, and one with a matrix.
CELLS = [
    cells.ParaGRU(D),
    cells.SLSTM(D),
    cells.GRU(D),
    *(
        pytest.param(cell, marks=pytest.mark.slow)
        for cell in (
            cells.Elman(D),
            cells.LSTM(D),
            cells.Headwise(cells.GRU(2), 2),
            cells.ParaLSTM(D),
            cells.LEM(D),
            cells.LTC(D),
            cells.IndRNN(D, activation="tanh"),  # relu overflows at these weight scales
            cells.MGU(D),
            cells.LeakyRNN(D),
            cells.CoRNN(D),
            cells.UnICORNN(D),
            cells.SRU(D),
        )
    ),
]


def draw(cell, scale, length, batch=2):
    """Draw float64 parameters at a weight scale and inputs; return them with the zero state."""
    rng = np.random.default_rng(0)
    params = cell_params(rng, cell, scale)
    return params, rng.standard_normal((batch, length, cell.gates, D)), cell.initial_state(batch)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def solved(cell, algorithm, params, xs, h0):
    """Return states, info, and the gradients of a weighted sum of the states."""
    weights = jnp.cos(jnp.arange(xs.shape[1], dtype=h0.dtype))

    def loss(params, xs, h0):
        hs, _, info = seqjax.nonlinear_scan(cell, params, xs, h0, algorithm=algorithm)
        along = weights.reshape(-1, *(1 for _ in h0.shape[1:]))
        return jnp.sum(hs * along), (hs, info)

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    grads, (hs, info) = gradient(params, xs, h0)
    return hs, info, grads


LENGTHS = [256, *(pytest.param(n, marks=pytest.mark.slow) for n in (1000, 4096))]


@pytest.mark.quick("ParaGRU(dim=4)-256")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_values_and_gradients_at_any_weight_scale(cell, length, x64):
    for scale in (0.08, 1.0, 3.0, 6.0):
        arrays = draw(cell, scale, length)
        hs, _, grads = exact = solved(cell, "sequential", *cast(arrays, "float64"))
        exponent = seqjax.lyapunov(cell, *cast(arrays[:2], "float64"), hs)
        for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-4)):
            got, info, got_grads = solved(cell, "newton", *cast(arrays, dtype))
            assert info.converged.all(), (scale, dtype, info)
            # Neighboring states agree to the default tolerance, relative to their size.
            size = jnp.maximum(1, jnp.abs(got).max())
            assert (info.residual <= 128 * jnp.finfo(dtype).eps * size).all(), (scale, dtype, info)
            if exponent.max() > -0.05:  # chaotic, or nearly: rounding decides where it goes
                continue
            # Even where neighbors come together in the end, rounding may grow on the way: then
            # float32 is judged by what float32 steps reach, which round off one resolution each.
            rounding = max(1.0, float(info.residual.max() / jnp.finfo(dtype).eps))
            stepped = (
                exact if dtype == "float64" else solved(cell, "sequential", *cast(arrays, dtype))
            )
            for mine, theirs, true in ((got, stepped[0], hs), (got_grads, stepped[2], grads)):
                true = jax.tree.map(np.asarray, true)
                assert_close(mine, true, max(tolerance, 10 * rounding * error(theirs, true)[0]))


def parity_model(cell, seed=0):
    """Return parameters of a cell between a two-row input table and a readout."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    size = cell.dim

    def recurrent(kind):
        if kind == "vector":
            return 0.5 * jax.random.normal(next(keys), (size,))
        return size**-0.5 * jax.random.normal(next(keys), (size, size))

    return {
        "cell": {name: recurrent(kind) for name, kind in cell.recurrent.items()},
        "table": jax.random.normal(next(keys), (2, cell.gates, size)),
        "readout": size**-0.5 * jax.random.normal(next(keys), (size,)),
        "bias": jnp.zeros(()),
    }


def solve(cell, params, bits, **keywords):
    start = cell.initial_state(len(bits))
    return seqjax.nonlinear_scan(cell, params["cell"], params["table"][bits], start, **keywords)


def logits(cell, params, bits, **keywords):
    hs, _, info = solve(cell, params, bits, **keywords)
    return cell.output(hs) @ params["readout"] + params["bias"], info


@functools.cache
def trained_on_parity(cell):
    """Train a cell until it outputs the parity of all bits so far at every position."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    params = parity_model(cell)

    def loss(params, bits):
        said = logits(cell, params, bits, algorithm="sequential")[0]
        return optax.sigmoid_binary_cross_entropy(said, jnp.cumsum(bits, 1) % 2).mean()

    @jax.jit
    def step(carry, key):
        params, state = carry
        bits = jax.random.bernoulli(key, shape=(64, 32)).astype(jnp.int32)
        value, grads = jax.value_and_grad(loss)(params, bits)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    carry = params, optimizer.init(params)
    for i in range(1500):
        carry, value = step(carry, jax.random.fold_in(jax.random.key(1), i))
        if value < 5e-3:
            return carry[0]
    raise AssertionError(f"{cell} has not learnt parity: loss {value}")


REMEMBERS = [
    cells.ParaGRU(32),
    *(
        pytest.param(cell, marks=pytest.mark.slow)
        for cell in (cells.GRU(16), cells.LSTM(16), cells.ParaLSTM(32))
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", REMEMBERS, ids=repr)
def test_models_that_remember(cell):
    """Check models trained to 100 % on running parity: same states, nearly all from Newton."""
    params = trained_on_parity(cell)
    bits = jax.random.bernoulli(jax.random.key(9), shape=(2, 4096)).astype(jnp.int32)
    parity = jnp.cumsum(bits, axis=1) % 2
    expected, _ = logits(cell, params, bits, algorithm="sequential")
    assert ((expected > 0) == parity).all()
    got, info = logits(cell, params, bits, algorithm="newton")
    assert info.converged.all()
    assert (info.sequential_steps <= 4096 // 8).all()
    assert_close(got, expected, 1e-4)
    states = solve(cell, params, bits, algorithm="sequential")[0]
    again, warm = logits(cell, params, bits, algorithm="newton", guess=states)
    assert (warm.iterations <= 2).all()
    assert_close(again, expected, 1e-4)


def chaotic(params, h, x):
    return jnp.sin(params * h + x)


def hard_arrays(length=300):
    x = jax.random.normal(jax.random.key(0), (3, length, D))
    return jnp.full(D, 9.0), x, jnp.zeros((3, D))


@pytest.mark.parametrize(
    "solver",
    [
        seqjax.Newton(max_iterations=1, whole_iterations=0),
        seqjax.Newton(window=7),
        seqjax.Newton(damping=1.0),
        seqjax.Newton(jacobian_clip=0.5),
        seqjax.Newton(projection=False),
        seqjax.Newton(scan_dtype=jnp.bfloat16),
    ],
    ids=str,
)
def test_no_setting_gives_a_wrong_answer(solver):
    """Check a chaotic cell: states are not reproducible, but every step satisfies the equation."""
    arrays = hard_arrays()
    hs, last, info = seqjax.nonlinear_scan(chaotic, *arrays, algorithm="newton", solver=solver)
    assert info.converged.all()
    before = jnp.concatenate([arrays[2][:, None], hs[:, :-1]], axis=1)
    gap = jnp.abs(hs - chaotic(arrays[0], before, arrays[1])).max()
    assert gap <= 128 * jnp.finfo(jnp.float32).eps
    np.testing.assert_array_equal(last, hs[:, -1])


def test_nan_is_reported_and_stays_where_it_is():
    params, x, h0 = hard_arrays(100)
    params = params / 10
    clean, _, _ = seqjax.nonlinear_scan(chaotic, params, x, h0, algorithm="newton")
    x = x.at[1, 40, 2].set(jnp.nan)
    for algorithm in ("newton", "sequential"):
        hs, _, info = seqjax.nonlinear_scan(chaotic, params, x, h0, algorithm=algorithm)
        assert info.converged.tolist() == [True, False, True]
        assert np.isnan(info.residual).tolist() == [False, True, False]
        assert np.isnan(hs[1, 40:, 2]).all()
        others = np.isfinite(np.asarray(hs))
        assert others.sum() == hs.size - 60
        np.testing.assert_allclose(hs[others], clean[others], atol=1e-5)


def test_on_failure():
    hopeless = seqjax.Newton(max_iterations=1, whole_iterations=0)
    run = functools.partial(seqjax.nonlinear_scan, chaotic, *hard_arrays(), algorithm="newton")
    _, _, info = run(solver=hopeless)
    assert info.converged.all()
    assert (info.sequential_steps > 0).all()

    def finished(on_failure):
        result = run(solver=hopeless, on_failure=on_failure)
        jax.effects_barrier()
        return result

    with pytest.warns(UserWarning, match="did not converge"):
        _, _, info = finished("warn")
    assert not info.converged.any()
    assert not (info.residual <= 1e-3).any()
    with pytest.raises(Exception, match=r"3 of 3 sequences did not converge"):
        finished("error")


@pytest.mark.slow
def test_quasi_newton_has_exact_gradients(x64):
    cell = cells.GRU(D)
    arrays = cast(draw(cell, 1.0, 60), "float64")

    def loss(params, algorithm, jacobian):
        hs, _, info = seqjax.nonlinear_scan(
            cell, params, *arrays[1:], algorithm=algorithm, jacobian=jacobian
        )
        return jnp.sum(hs**2), info

    exact, _ = jax.grad(loss, has_aux=True)(arrays[0], "sequential", "auto")
    quasi, info = jax.grad(loss, has_aux=True)(arrays[0], "newton", "quasi")
    assert info.converged.all()
    assert_close(quasi, jax.tree.map(np.asarray, exact), 1e-9)


def test_structures_are_found_and_checked():
    _, x, h0 = hard_arrays(20)

    def mixing(params, h, x):
        return jnp.tanh(params * jnp.roll(h, 1) + x)

    def reversed_twice(params, h, x):
        return jnp.tanh(params * h[::-1][::-1] + x)

    run = functools.partial(seqjax.nonlinear_scan, algorithm="newton", on_failure="error")
    params = jnp.full(D, 0.5)
    for cell in (mixing, reversed_twice):  # one mixes, the other only looks as if it did
        hs, _, info = run(cell, params, x, h0)
        assert info.converged.all()
        stepped = seqjax.nonlinear_scan(cell, params, x, h0, algorithm="sequential")[0]
        assert_close(hs, np.asarray(stepped), 1e-5)
    run(reversed_twice, params, x, h0, jacobian="diagonal")
    with pytest.raises(ValueError, match="must be 'diagonal' as declared"):
        run(mixing, params, x, h0, jacobian="diagonal")
    with pytest.raises(ValueError, match="'block' must have states"):
        run(mixing, params, x, h0, jacobian="block")
    with pytest.raises(ValueError, match="must not close over arrays"):
        jax.jit(lambda a: run(lambda p, h, x: jnp.tanh(a * h + x), params, x, h0)[0])(params)


def test_structures_of_the_results_of_a_call():
    """Check that a call may return one value that mixes channels and one that does not."""

    @jax.jit
    def both(h, total):
        return 2 * h, h + total

    for i, apart in enumerate((True, False)):
        program = jax.make_jaxpr(lambda h, i=i: both(h, jnp.sum(h))[i])(jnp.ones(D))
        assert jacobian_structure.keeps_channels_apart(program, 0) == apart


def test_the_exponent_is_that_of_a_known_map():
    """|d(2h mod 1)/dh| = 2 everywhere, and a constant map forgets at once."""
    xs = jnp.zeros((1, 200, 1))
    hs = jax.random.uniform(jax.random.key(0), (1, 200, 1))
    double = seqjax.lyapunov(lambda p, h, x: jnp.mod(2 * h, 1.0), (), xs, hs)
    np.testing.assert_allclose(double, np.log(2), rtol=1e-5)
    assert seqjax.lyapunov(lambda p, h, x: 0 * h + x, (), xs, hs)[0] == -np.inf


def test_dense_jacobians_beyond_the_memory_are_refused(monkeypatch):
    cell = cells.GRU(D)
    params, xs, h0 = draw(cell, 1.0, 8)
    params, xs = cast((params, xs), "float32")
    # Two sequences of 8 steps with Jacobians of 4 x 4 numbers of 4 bytes: 1,024 bytes.
    monkeypatch.setattr(memory_check, "device_memory", lambda: 2000)
    run = functools.partial(seqjax.nonlinear_scan, cell, params, xs, h0)
    with pytest.raises(ValueError, match=r"at most 50% of 2e-06 GB .* got 1.02e-06 GB"):
        run(algorithm="newton")
    _, _, info = run(algorithm="newton", solver=seqjax.Newton(memory_fraction=0.6))
    assert info.converged.all()
    run(algorithm="sequential")
    with pytest.raises(ValueError, match="`memory_fraction` must be positive, got 0"):
        seqjax.Newton(memory_fraction=0)


@pytest.mark.quick("GRU(dim=4)")
@pytest.mark.parametrize("cell", [cells.GRU(D), cells.Headwise(cells.GRU(D), 1)], ids=repr)
def test_jacobians_of_all_steps_are_counted_in_derivatives(cell, monkeypatch):
    """Check windows of 4 of 8 steps: 512 bytes in the solver, 1,024 in derivatives."""
    params, xs, h0 = draw(cell, 1.0, 8)
    params, xs = cast((params, xs), "float32")
    monkeypatch.setattr(memory_check, "device_memory", lambda: 2000)
    solver = seqjax.Newton(whole_iterations=0, window=4)

    def run(xs, algorithm="newton", solver=solver):
        return seqjax.nonlinear_scan(cell, params, xs, h0, algorithm=algorithm, solver=solver)[0]

    def grad(*options):
        return jax.eval_shape(jax.grad(lambda xs: jnp.sum(run(xs, *options))), xs)

    jax.eval_shape(run, xs)
    with pytest.raises(ValueError, match=r"Jacobians of 8 steps must .* got 1.02e-06 GB"):
        run(xs, "newton", None)
    with pytest.raises(ValueError, match=r"Jacobians of 8 steps must .* got 1.02e-06 GB"):
        grad()
    with pytest.raises(ValueError, match="Jacobians of 8 steps must"):
        jax.jit(lambda x: jax.jvp(run, (x,), (x,))).lower(xs)
    grad("sequential")
    grad(None)
    grad("newton", seqjax.Newton(whole_iterations=0, window=4, memory_fraction=0.6))


def test_the_memory_of_a_shard_is_that_of_one_device(monkeypatch):
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def local(*stats):
        monkeypatch.setattr(jax, "local_devices", lambda: [*map(Device, stats)])

    found = []

    def record(x):
        found.append(memory_check.device_memory())
        return x

    def within(*manual):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        spec = jax.sharding.PartitionSpec()
        run = jax.shard_map(record, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={*manual})
        jax.eval_shape(jax.jit(run), jnp.ones(8))
        return found[-1]

    local({"bytes_limit": 100}, {"bytes_limit": 90})
    assert memory_check.device_memory() == 90 * jax.device_count()
    assert within("a", "b") == 90
    assert within("a") == 2 * 90
    for nothing in (None, {}):
        local(nothing)
        assert memory_check.device_memory() is None
