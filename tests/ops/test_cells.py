"""Cells: steps follow the equations, and the declared structures and bounds are correct.

The layers of the cells are rows of `cases.LAYERS`; these tests cover the rest.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import cells, layers
from tests.contract.cases import cell_params
from tests.oracles.rnn_oracles import STEPS

pytestmark = pytest.mark.usefixtures("compiled_quickly")
D = 4
CELLS = [
    cells.Elman(D),
    cells.GRU(D),
    cells.LSTM(D),
    cells.LSTM(D, layer_norm=True, norm_eps=1e-2),
    cells.ParaGRU(D),
    cells.ParaLSTM(D),
    cells.SLSTM(D),
    cells.DenseSLSTM(D),
    cells.LEM(D, dt=0.3),
    cells.LTC(D, dt=0.3),
    cells.IndRNN(D),
    cells.IndRNN(D, activation="tanh"),
    cells.MGU(D),
    cells.PLRNN(D),
    cells.LeakyRNN(D),
    cells.CoRNN(D, dt=0.3),
    cells.UnICORNN(D, alpha=2.0),
    cells.SRU(D),
]
EACH = pytest.mark.parametrize("cell", CELLS, ids=repr)
AT_SCALES = pytest.mark.parametrize("scale", [1.0, 3.0])


def limits(cell, params):
    """Return the bounds as arrays of the state's shape."""
    shape = cell.initial_state(1).shape[1:]
    bounds = cell.bounds(jax.tree.map(jnp.asarray, params)) or (-np.inf, np.inf)
    return [np.broadcast_to(np.asarray(bound), shape) for bound in bounds]


def draw(cell, scale, seed=0):
    """Draw parameters, a state within the bounds, and pre-activations, in float64."""
    rng = np.random.default_rng(seed)
    params = cell_params(rng, cell, scale)
    low, high = limits(cell, params)
    within = rng.uniform(np.maximum(low, -5), np.minimum(high, 5))
    if isinstance(cell, cells.SLSTM):
        within[:, 0] = within[:, 1] * rng.uniform(-1, 1, D)  # |c| <= n, as in every sLSTM state
    return params, within, scale * rng.standard_normal((cell.gates, D))


def draws(cell, scale, count=50):
    """Stack `count` results of `draw`."""
    return jax.tree.map(
        lambda *leaves: np.stack(leaves), *(draw(cell, scale, i) for i in range(count))
    )


@EACH
@AT_SCALES
def test_no_step_leaves_the_bounds(cell, scale, x64, strict):
    params, h, u = draws(cell, scale)
    after = np.asarray(jax.jit(jax.vmap(cell))(params, h, u))
    assert np.isfinite(after).all()
    low, high = zip(
        *(limits(cell, {k: p[i] for k, p in params.items()}) for i in range(len(u))), strict=True
    )
    # A mean of two numbers may round to just beyond both.
    assert (np.stack(low) - 1e-14 <= after).all()
    assert (after <= np.stack(high) + 1e-14).all()
    assert (np.stack(low) <= 0).all()
    assert (np.stack(high) >= 0).all()


@EACH
def test_bounds_leave_out_no_number_that_has_some(cell, x64):
    """Check the number of infinite lower and upper bounds per channel: 0 for most cells."""
    low, high = limits(cell, draw(cell, 1.0)[0])
    unbounded = {
        cells.LSTM: (1, 1),  # c
        cells.SLSTM: (2, 3),  # c and m, and n from above
        cells.DenseSLSTM: (2, 3),
        cells.PLRNN: (1, 1),
        cells.CoRNN: (2, 2),
        cells.UnICORNN: (2, 2),
        cells.SRU: (1, 1),
    }
    relu = getattr(cell, "activation", None) == "relu"
    wanted = (0, 1) if relu else unbounded.get(type(cell), (0, 0))
    assert (np.isinf(low).sum(), np.isinf(high).sum()) == (D * wanted[0], D * wanted[1])


@EACH
def test_infinite_bounds_pass_debug_infs(cell, strict):
    """Call a cell eagerly: `jax.debug_infs` checks the result of every eager operation."""
    params, h, u = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), draws(cell, 1.0, 2))
    params = jax.tree.map(lambda p: p[0], params)
    with jax.debug_infs(True):
        hs, *_ = seqjax.nonlinear_scan(cell, params, u[:, None], h, algorithm="sequential")
    assert np.isfinite(hs).all()


@EACH
@AT_SCALES
def test_the_jacobian_has_the_declared_structure(cell, scale, x64, strict):
    jacobians = np.asarray(jax.jit(jax.vmap(jax.jacfwd(cell, 1)))(*draws(cell, scale)))
    k = cell.width
    jacobians = np.abs(jacobians).reshape(-1, D, k, D, k).max(axis=0)
    same_channel = np.eye(D, dtype=bool)[:, None, :, None]
    across = np.where(same_channel, 0, jacobians)
    within = jacobians[np.arange(D), :, np.arange(D), :]
    if cell.structure == "dense":
        assert (across.max(axis=(1, 3))[~np.eye(D, dtype=bool)] > 0).all()
        return
    assert (across == 0).all()
    assert (within.max(axis=(1, 2)) > 0).all()
    if cell.structure == "diagonal":
        assert k == 1
    else:
        assert (within[:, ~np.eye(k, dtype=bool)] > 0).any()


def as_sums(cell, h):
    """Convert a state to the oracle's form: a list of vectors, sLSTM's without the stabilizer."""
    columns = list(np.asarray(h).reshape(D, cell.width).T)
    if isinstance(cell, cells.SLSTM):
        c, n, h, m = columns
        return [c * np.exp(m), n * np.exp(m), h]
    return columns


@EACH
@AT_SCALES
def test_a_step_is_the_equations(cell, scale, x64, strict):
    oracle, width, read = STEPS[type(cell).__name__]
    hyper = types.SimpleNamespace(**dataclasses.asdict(cell))
    step = jax.jit(cell)
    for seed in range(6):
        params, h, u = draw(cell, scale, seed)
        h = h * (seed > 0)  # the zero state as well
        expected = oracle(hyper, params, as_sums(cell, h), u)
        assert len(expected) == width
        after = step(params, h, u)
        # What cancels in float64 is of the size of 1.
        np.testing.assert_allclose(as_sums(cell, after), expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(cell.output(after), expected[read], rtol=1e-12, atol=1e-14)


@EACH
def test_states_are_of_the_dtype_given(cell, strict):
    params, h, u = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), draw(cell, 1.0))
    after = cell(params, h, u)
    assert after.dtype == jnp.float32
    assert after.shape == h.shape
    assert hash(cell) == hash(dataclasses.replace(cell))


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_slstm_does_not_overflow(shift, strict):
    """Multiply all input gates by exp(shift): h does not change, and derivatives are finite."""
    cell = cells.SLSTM(D)
    params, _, _ = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), draw(cell, 1.0))
    us = jnp.asarray(np.random.default_rng(1).standard_normal((20, 4, D)), jnp.float32)

    @jax.jit
    def run(us, h):
        return jax.lax.scan(lambda h, u: (cell(params, h, u),) * 2, h, us)[1][..., 2]

    start = jnp.zeros((D, 4))
    shifted = us.at[:, 0].add(shift)
    np.testing.assert_allclose(run(shifted, start), run(us, start), atol=1e-4)

    def value(us, h):
        return jnp.sum(jnp.sin(run(us, h)))

    for leaf in jax.jit(jax.grad(value, argnums=(0, 1)))(shifted, start):
        assert np.isfinite(leaf).all()


def test_slstm_begins_where_nothing_has_been_summed(x64, strict):
    """Check that with n = 0 the past does not count, for any c and m."""
    cell = cells.SLSTM(D)
    params, _, u = jax.tree.map(jnp.asarray, draw(cell, 1.0))
    empty = jnp.zeros((D, 4))
    other = empty.at[:, 0].set(3.0).at[:, 3].set(50.0)
    np.testing.assert_array_equal(cell(params, other, u), cell(params, empty, u))
    np.testing.assert_array_equal(cell(params, empty, u)[:, 1], 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cells.GRU(0), "GRU: `dim`"),
        (lambda: cells.SLSTM(2.0), "SLSTM: `dim`"),
        (lambda: cells.LEM(2, dt=0), "LEM: `dt`"),
        (lambda: cells.LEM(2, dt=1.5), "LEM: `dt`"),
        (lambda: cells.LEM(0), "LEM: `dim`"),
        (lambda: cells.LTC(2, dt=-1.0), "LTC: `dt`"),
        (lambda: cells.LTC(2, dt=float("inf")), "LTC: `dt`"),
        (lambda: cells.CoRNN(2, dt=0.0), "CoRNN: `dt`"),
        (lambda: cells.CoRNN(2, epsilon=-1.0), "CoRNN: `epsilon`"),
        (lambda: cells.UnICORNN(2, alpha=float("nan")), "UnICORNN: `alpha`"),
        (lambda: cells.IndRNN(2, activation="gelu"), "IndRNN: `activation`"),
    ],
)
def test_bad_hyperparameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.quick("ParaGRU")
@pytest.mark.parametrize("kind", [layers.ParaGRU, layers.SLSTM], ids=lambda kind: kind.__name__)
def test_layers_say_how_they_were_solved(kind, x64):
    """Check that `algorithm` and `solver` reach the solver, and that values do not change."""
    x = np.random.default_rng(0).standard_normal((2, 40, D))
    reset = np.zeros((2, 40), bool)
    reset[0, 17] = True
    outputs = {}
    for algorithm in ("sequential", "newton"):
        layer = kind(D, algorithm=algorithm)
        params = layer.init(jax.random.key(0), jnp.float64)
        outputs[algorithm] = layer.apply(params, x, reset=reset)
        info = layer.apply_with_aux(params, x, reset=reset)[2]["solve"]
        assert info.converged.all()
        steps, iterations = (40, 0) if algorithm == "sequential" else (0, 1)
        assert (info.sequential_steps == steps).all()
        assert (info.iterations >= iterations).all()
        assert (info.iterations < 20).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), *outputs.values()
    )
    rough = kind(D, algorithm="newton", solver=seqjax.Newton(tol=0.1))
    again = rough.apply_with_aux(params, x, reset=reset)[2]["solve"]
    assert again.iterations.sum() < info.iterations.sum()
    with pytest.raises(ValueError, match=f"{kind.__name__}.*`algorithm` must be"):
        kind(D, algorithm="associative")


@pytest.mark.parametrize("base", [cells.GRU(3), cells.LSTM(3), cells.DenseSLSTM(3)], ids=repr)
def test_a_headwise_cell_is_one_cell_per_head(base, x64, strict):
    cell, rng = cells.Headwise(base, heads=2), np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, cell_params(rng, cell))
    u = jnp.asarray(rng.standard_normal((1, 5, cell.gates, 6)))
    hs, last, _ = seqjax.nonlinear_scan(cell, params, u, cell.initial_state(1, "float64"))
    assert last.shape == (1, 2, 3 * cell.width)
    for head in range(2):
        own = {
            name: p[head] if p.ndim == 3 else p[3 * head : 3 * head + 3]
            for name, p in params.items()
        }
        part = u[..., 3 * head : 3 * head + 3]
        alone, *_ = seqjax.nonlinear_scan(base, own, part, base.initial_state(1, "float64"))
        found = cell.output(hs)[..., 3 * head : 3 * head + 3]
        np.testing.assert_allclose(found, base.output(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "base",
    [
        *(cells.GRU(2), cells.LSTM(2), cells.DenseSLSTM(2), cells.LEM(2), cells.ParaLSTM(2)),
        *(cells.LTC(1), cells.LTC(2), cells.IndRNN(2)),
    ],
    ids=repr,
)
def test_bounds_of_a_headwise_cell_are_those_of_its_heads(base, x64):
    cell, rng, dim = cells.Headwise(base, heads=3), np.random.default_rng(0), base.dim
    params = cell_params(rng, cell)
    shape = (dim, base.width)[: 1 + (base.width > 1)]
    found = [np.broadcast_to(b, (3, dim * base.width)) for b in cell.bounds(params)]
    for head in range(3):
        own = {
            name: p[head] if p.ndim == 3 else p[dim * head : dim * (head + 1)]
            for name, p in params.items()
        }
        for bound, wanted in zip(found, base.bounds(own), strict=True):
            np.testing.assert_array_equal(
                cell._channels(jnp.asarray(bound[head])), np.broadcast_to(wanted, shape)
            )


@pytest.mark.quick("ParaLSTM(dim=2)")
@pytest.mark.parametrize("base", [cells.LEM(2), cells.ParaLSTM(2), cells.LTC(1)], ids=repr)
def test_newton_solves_headwise_cells_with_bounds(base, x64, strict):
    cell, rng = cells.Headwise(base, heads=3), np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, cell_params(rng, cell))
    u = jnp.asarray(rng.standard_normal((1, 9, cell.gates, cell.dim)))
    newton, steps = (
        seqjax.nonlinear_scan(
            cell, params, u, cell.initial_state(1, "float64"), algorithm=algorithm
        )[0]
        for algorithm in ("newton", "sequential")
    )
    np.testing.assert_allclose(newton, steps, rtol=1e-8, atol=1e-9)


def test_headwise_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="`heads` must be a positive integer, got 0"):
        cells.Headwise(cells.GRU(3), 0)
    with pytest.raises(ValueError, match="`heads` must divide state_dim=4, got 3"):
        layers.GRU(4, heads=3)


VARIANTS = ("nig", "nfg", "nog", "niaf", "noaf", "cifg", "fgr")


def test_lstm_variants_are_the_equations(x64):
    rng = np.random.default_rng(0)
    for variant in VARIANTS:
        normed = variant in ("noaf", "cifg", "fgr")
        cell = cells.LSTM(D, variant, peepholes=variant != "nog", layer_norm=normed)
        params = cell_params(rng, cell)
        h = rng.uniform(0, 1, (D, cell.width))
        u = rng.standard_normal((cell.gates, D))
        expected = STEPS["LSTM"][0](cell, params, list(h.T), u)
        got = jax.jit(cell)(params, h, u)
        np.testing.assert_allclose(got, np.stack(expected, axis=-1), rtol=1e-12)
    with pytest.raises(ValueError, match="`variant` must be one of nig, nfg"):
        cells.LSTM(D, "np")
    with pytest.raises(ValueError, match="`norm_eps` must be above 0, got 0"):
        cells.LSTM(D, norm_eps=0.0)


def test_lstm_variants_start_with_a_forget_bias_of_one():
    for variant in (None, *VARIANTS):
        layer = layers.LSTM(D, variant=variant)
        bias = layer.init(jax.random.key(0))["bias"].reshape(layer.cell.gates, D)
        row = [name for name in "ifgo" if name != {"nig": "i"}.get(variant)].index("f")
        wanted = np.zeros_like(bias)
        if variant not in ("nfg", "cifg"):
            wanted[row] = 1
        np.testing.assert_array_equal(bias, wanted)


def test_heads_of_heads_are_refused():
    inner = cells.Headwise(cells.GRU(2), 2)
    with pytest.raises(ValueError, match=r"^Headwise: `cell` must be the cell of one head"):
        cells.Headwise(inner, 2)


def test_infinite_bounds_of_heads_are_no_infinities_of_a_computation():
    cell = cells.Headwise(cells.LSTM(2), 2)
    params = {name: jnp.ones(cell.param_shape(name)) for name in cell.recurrent}
    xs = jnp.ones((1, 3, cell.gates, cell.dim))
    with jax.debug_infs(True):
        hs, _, _ = seqjax.nonlinear_scan(cell, params, xs, cell.initial_state(1))
    assert bool(jnp.isfinite(hs).all())
