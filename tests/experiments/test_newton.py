"""Training with Newton equals sequential training, and the log has Newton's numbers."""

import functools

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from experiments import train
from experiments.base import logs
from experiments.base.build import build_model
from experiments.configs import lm
from experiments.training import newton_report

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def rows_of(text, tmp_path_factory):
    """Train 30 steps, once for each layer and algorithm; return the logged rows."""

    @functools.cache
    def run(layer, algorithm, stops=(30,)):
        workdir = tmp_path_factory.mktemp("run")
        for steps in stops:
            config = lm.get_config(f"{layer},quicktest")
            config.data.path = str(text)
            config.model.options[layer].algorithm = algorithm
            config.update({"log_every": 10, "eval_every": 30, "save_every": 30, "steps": steps})
            config.optimizer.final_fraction = 1.0  # a rate that does not know the last step
            train.train(config, workdir)
        rows = [row for row in logs.read_rows(workdir) if "loss" in row]
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["paragru", "paralstm"])
def test_newton_trains_as_steps_do(rows_of, layer):
    newton, sequential = rows_of(layer, "newton"), rows_of(layer, "sequential")
    losses = [[row["loss"] for row in rows] for rows in (newton, sequential)]
    assert len(losses[0]) == 30
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)

    told = [row for row in newton if "newton_iterations" in row]
    assert [row["step"] for row in told] == [10, 20, 30]
    assert all(1 <= row["newton_iterations"] < 32 for row in told)
    assert all(row["newton_unconverged"] == 0 for row in told)
    assert not any(name.startswith("newton") for row in sequential for name in row)


@pytest.mark.slow
def test_a_run_resumed_logs_the_same(rows_of):
    """Resume to the bit, between two steps at which Newton's numbers are logged."""
    assert rows_of("paragru", "newton", (15, 30)) == rows_of("paragru", "newton")


def hybrid(algorithm):
    """Return a model with two layers for Newton and another between them, and a batch of two."""
    config = lm.get_config("lru,quicktest").model
    config.mixers, config.depth = "paragru,lru,gru", 3
    with config.unlocked():
        for layer in ("paragru", "gru"):
            config.options[layer].algorithm = algorithm
    model = build_model(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 256)
    reset = jnp.zeros((2, 24), bool).at[1, 5].set(True)
    return model, model.init(jax.random.key(0)), tokens, reset


@pytest.mark.slow
def test_every_block_tells_what_its_layer_would():
    model, params, tokens, reset = hybrid("newton")
    infos = jax.jit(functools.partial(newton_report.solve_infos, model))(params, tokens, reset)
    assert list(infos) == ["block_0", "block_2"]

    @jax.jit
    def first(params):
        hidden = params["embedding"][tokens] * model.dim**0.5
        block, norm = params["backbone"]["block_0"], seqjax.layers.RMSNorm(model.dim)
        mixed, _ = norm.apply(block["mixer_norm"], hidden)
        mixer = model.backbone.stack[0].mixer
        return mixer.apply_with_aux(block["mixer"], mixed, reset=reset)[2]["solve"]

    for name, alone in first(params)._asdict().items():
        np.testing.assert_allclose(getattr(infos["block_0"], name), alone, atol=1e-6)


@pytest.mark.slow
def test_the_report_is_the_worst_of_all():
    model, params, tokens, reset = hybrid("newton")
    infos = jax.jit(functools.partial(newton_report.solve_infos, model))(params, tokens, reset)
    report = newton_report.make_report(model)
    found = report(params, tokens, reset)
    assert found["newton_iterations"] == max(int(i.iterations.max()) for i in infos.values())
    assert found["newton_unconverged"] == 0

    # NaN in the first of the two layers reaches the other: no sequence of either converges.
    mixer = params["backbone"]["block_0"]["mixer"]
    mixer["in_proj"] = mixer["in_proj"] * jnp.nan
    assert report(params, tokens, reset)["newton_unconverged"] == 4


@pytest.mark.parametrize("algorithm", [None, "sequential"])
def test_nothing_to_tell_without_newton(algorithm):
    assert jax.default_backend() == "cpu"
    assert newton_report.make_report(hybrid(algorithm)[0]) is None
