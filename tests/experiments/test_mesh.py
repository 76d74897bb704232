"""Training on a mesh: the losses equal those of one device, for every split and process count."""

import signal

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import train
from experiments.base import logs
from experiments.base.build import build_model
from experiments.base.devices import DeviceMesh
from experiments.base.errors import UserError
from experiments.configs import common, lm
from experiments.data import pipeline
from experiments.objectives.language import NextByte
from experiments.training import optimizer
from experiments.training.step import make_init, make_train_step
from seqjax import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")


def quick(layer, text, **overrides):
    config = lm.get_config(f"{layer},quicktest")
    config.data.path = str(text)
    config.update(overrides)
    return config


def twenty_losses(config, mesh):
    """Return the losses and gradient norms of 20 steps."""
    model = build_model(config.model)
    schedule = optimizer.make_schedule(config.optimizer, 20)
    transform = optimizer.make_optimizer(config.optimizer, 20, model.param_roles())
    shape = (config.data.batch_size, config.data.length)
    devices = DeviceMesh(mesh, model, shape, make_init(model, transform))
    step = make_train_step(NextByte(model), transform, schedule, devices.shardings)
    batches = pipeline.train_batches(
        pipeline.load_corpus(config.data).train,
        length=config.data.length,
        batch_size=config.data.batch_size,
        seed=0,
        shuffle_windows=config.data.shuffle_windows,
    )
    state, found = jax.jit(devices.make_state, static_argnums=0)(0), []
    for index in range(20):
        state, metrics = step(state, devices.put(next(batches)), np.int32(index))
        found.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.array(found)


def assert_same_run(actual, expected):
    """Compare losses to float32 accuracy: sums have another order, over 20 steps.

    Gradient norms have a larger tolerance. Adam scales all gradients to one size, so parameters
    whose gradients are rounding errors diverge. They change the norm before they change the loss.
    """
    np.testing.assert_allclose(actual[:, 0], expected[:, 0], rtol=2e-5)
    np.testing.assert_allclose(actual[:, 1], expected[:, 1], rtol=5e-4)


@pytest.mark.parametrize("layer", common.MIXERS)
def test_every_layer_can_be_placed_on_a_mesh(layer, text):
    """Check that each parameter, state and batch has a sharding, without compiling."""
    model = build_model(quick(layer, text).model)
    mesh = sharding.make_mesh("data=2,fsdp=2,sequence=2")
    found = sharding.shard(model, mesh, batch_shape=(8, 16))
    params = jax.eval_shape(model.init, jax.random.key(0))
    jax.tree.map(lambda p, place: place.shard_shape(p.shape), params, found.params)


# One layer of each kind. The training step uses the protocol of layers only. The contract tests
# split every layer over batch, heads and time. They take gradients over time of one layer of each
# kind, and of the few layers that have code for them.
KINDS = ("lru", "mamba", "gated_deltanet", "rwkv7", "mlstm", "paralstm", "gru", "hybrid")


@pytest.mark.parametrize(
    "layer", [pytest.param(m, marks=[] if m == "lru" else pytest.mark.slow) for m in KINDS]
)
def test_a_mesh_gives_the_losses_of_one_device(layer, text):
    config = quick(layer, text)
    one = twenty_losses(config, "")
    mesh = "fsdp=2,tensor=2,sequence=2" if "deltanet" in layer else "data=2,fsdp=2,sequence=2"
    assert_same_run(twenty_losses(config, mesh), one)


@pytest.mark.slow
def test_stacked_blocks_on_a_mesh(text):
    config = quick("hybrid", text)
    config.model.update(depth=4, scan=True, remat=True)
    one = twenty_losses(config, "")
    assert_same_run(twenty_losses(config, "fsdp=4,sequence=2"), one)


def numbers(workdir):
    """Return every loss, gradient norm and held-out result of a run, in order."""
    names = ("step", "loss", "gradient_norm", "heldout_bits_per_byte")
    return [row[name] for row in logs.read_rows(workdir) for name in names if name in row]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_command_trains_on_both_kinds_of_mesh(kind, text, tmp_path):
    """Compare training, evaluation and checkpoints on a mesh with one device."""
    settings = {"steps": 4, "eval_every": 2}
    mesh = {"mesh": "data=2,fsdp=2,tensor=2", "mesh_axis_types": kind}
    train.train(quick("lru", text, **settings), tmp_path / "one")
    train.train(quick("lru", text, **settings, **mesh), tmp_path / "mesh")
    np.testing.assert_allclose(numbers(tmp_path / "mesh"), numbers(tmp_path / "one"), rtol=5e-4)


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_one(text, tmp_path, monkeypatch):
    """Stop a run by SIGTERM on a mesh, resume on one device, compare with an uninterrupted run."""
    settings = {"steps": 10, "data": {"streams": 2}}
    train.train(quick("lru", text, **settings), tmp_path / "one")
    step = logs.Progress.step

    def stopping(self):
        step(self)
        if self.steps_taken() == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        count = iter(range(1, 100))
        patch.setattr(logs.Progress, "steps_taken", lambda self: next(count), raising=False)
        patch.setattr(logs.Progress, "step", stopping)
        mesh = quick("lru", text, mesh="data=2,fsdp=2,sequence=2", **settings)
        stopped = train.train(mesh, tmp_path / "moved")
    assert stopped == {"exit_code": 128 + signal.SIGTERM, "step": 5}
    summary = train.train(quick("lru", text, **settings), tmp_path / "moved")
    np.testing.assert_allclose(numbers(tmp_path / "moved"), numbers(tmp_path / "one"), rtol=2e-5)
    assert summary["step"] == 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh": "dta=2"}, r"config\.mesh='dta=2': mesh: unknown axis 'dta'"),
        ({"mesh": "data=8", "mesh_axis_types": "x"}, r"mesh_axis_types='x' must be auto or exp"),
        ({"mesh": "data=8"}, r"the batch 4 .* data \* fsdp = 8; take 8"),
        (
            {
                "mesh": "data=4,tensor=2",
                "model": {"mixers": "attention", "options": {"attention": {"heads": 1}}},
            },
            "SlidingWindowAttention: heads 1",
        ),
        (
            {"data": {"streams": 3}},
            r"config\.data\.streams=3 must divide config\.data\.batch_size=4",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, message, text, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(quick("lru", text, **overrides), tmp_path)


def test_streams_do_not_depend_on_who_reads_them(text):
    """Check that a batch does not depend on the number of processes that read it."""
    data = quick("lru", text).data
    documents = pipeline.load_corpus(data).train
    settings = {"length": 16, "batch_size": 4, "seed": 3, "shuffle_windows": 8, "streams": 2}
    whole = pipeline.train_batches(documents, **settings)
    halves = [pipeline.train_batches(documents, rows=rows, **settings) for rows in ([0, 1], [2, 3])]
    for _ in range(3):
        batch, parts = next(whole), [next(half) for half in halves]
        for name, rows in batch.items():
            np.testing.assert_array_equal(rows[:2], parts[0][name][:2])
            np.testing.assert_array_equal(rows[2:], parts[1][name][2:])
            assert not parts[0][name][2:].any()
    assert whole.get_state() == halves[0].get_state() | halves[1].get_state()
    pipeline.resume(halves[1], whole.get_state())
    np.testing.assert_array_equal(next(halves[1])["targets"][2:], next(whole)["targets"][2:])
