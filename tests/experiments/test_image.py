"""Tasks on images: arrow pointing, the classifier, and small runs."""

import json

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

import jax

from experiments import train
from experiments.base.errors import UserError
from experiments.configs import image
from experiments.objectives import protocol
from experiments.tasks import arrows

pytestmark = pytest.mark.usefixtures("quick_compilation")


def quick(task="arrows", layer="plstm_2d"):
    return image.get_config(f"{task},{layer},quicktest")


def test_arrows_point_to_the_circle_if_the_label_says_so():
    images, labels = arrows.generate(np.random.default_rng(0), 400, 7)
    assert labels.sum() == 200
    np.testing.assert_array_equal(images.sum(axis=(1, 2)), np.ones((400, 3)))
    on_other_rays = 0
    for picture, label in zip(images, labels, strict=True):
        circle, tail, head = (np.argwhere(picture[..., i])[0] for i in range(3))
        step, toward = head - tail, circle - tail
        assert np.abs(step).max() == 1
        distance = np.abs(toward).max()
        assert distance > 1
        assert label == (toward == distance * step).all()
        aligned = set(np.abs(toward).tolist()) <= {0, int(distance)}
        on_other_rays += aligned and not label
    # About half of the images with label 0 are on a ray on purpose.
    assert on_other_rays > 80


def test_the_classifier_takes_images_of_any_size():
    for layer, grid in (("plstm_2d", True), ("chimera", True), ("s5", False)):
        model = protocol.make(quick(layer=layer)).model
        assert model.reads_grids == grid
        params = jax.eval_shape(model.init, jax.random.key(0))
        for side in (4, 6):
            pictures = jax.ShapeDtypeStruct((2, side, side + 1, 3), np.float32)
            logits, _ = jax.eval_shape(model.apply, params, pictures)
            assert logits.shape == (2, 2)
    with pytest.raises(ValueError, match=r"`x` must have shape \[B, X, Y, 3\], got \[2, 4, 3\]"):
        jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((2, 4, 3), np.float32))


@pytest.mark.parametrize("layer", ["plstm_2d", "s5"])
def test_the_dtype_of_the_config_is_that_of_the_activations(layer):
    config = quick(layer=layer)
    model = protocol.make(config).model
    params = model.init(jax.random.key(0))
    params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape)
    pictures = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    exact, _ = jax.jit(model.apply)(params, pictures)
    config.model.dtype = "bfloat16"
    narrow, _ = jax.jit(protocol.make(config).model.apply)(params, pictures)
    assert narrow.dtype == np.float32
    assert 0 < np.abs(narrow - exact).max() < 0.05 * np.abs(exact).max()
    config.model.dtype = "int8"
    with pytest.raises(UserError, match=r"config\.model\.dtype: must be one of .*, got 'int8'"):
        protocol.make(config)


def test_a_mesh_is_refused():
    config = quick()
    config.mesh = "data=2"
    with pytest.raises(UserError, match=r"config\.mesh: runs on images have one device"):
        protocol.make(config)


@pytest.mark.slow
@pytest.mark.parametrize("task", image.TASKS)
def test_runs_train_and_evaluate_every_size(task, tmp_path):
    if task == "image_digits":
        pytest.importorskip("sklearn")
    config = quick(task, "plstm_2d" if task == "arrows" else "s5")
    config.update({"steps": 2, "eval_every": 2, "save_every": 2, "log_every": 1})
    assert set(image.get_config(task).to_dict()) == set(config.to_dict())
    summary = train.train(config, tmp_path)
    sides = (4, 6) if task == "arrows" else (8,)
    assert {f"accuracy_{side}" for side in sides} <= set(summary)
    assert summary["accuracy"] == summary[f"accuracy_{sides[-1]}"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
