"""Gated layers against numbers of the authors' or widely used implementations.

Parameters and inputs are drawn by `drawn`. The numbers were computed in float64 on CPU with the
same arrays, by transformers 5.24 (RecurrentGemma's recurrent block), minGRU-pytorch (minGRU and
minLSTM, in log space), sru 2.6.0 (its loop in Python) and ffm (its torch module).
"""

import jax
import numpy as np
import pytest

from seqjax.layers import FFM, RGLRU, SRU, MinGRU, MinLSTM
from tests.contract.harness import assert_close

LAYERS = {
    "rglru": RGLRU(dim=4, heads=2, unit_first_step=True),
    "mingru": MinGRU(dim=4, state_dim=8),
    "minlstm": MinLSTM(dim=4),
    "sru": SRU(dim=4, highway_bias=-1.0),
    "sru-projected": SRU(dim=4, state_dim=3),
    "ffm": FFM(dim=4, memory_dim=3, contexts=2),
}


def drawn(layer):
    """Return parameters in the order of their sorted names, and x [1, 5, dim]."""
    rng = np.random.default_rng(0)
    shapes = jax.tree_util.tree_leaves_with_path(
        layer.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    tree = jax.tree.structure(layer.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    params = jax.tree.unflatten(tree, [rng.standard_normal(shape) for _, shape in shapes])
    if "log_decay" in params:
        params["log_decay"] = params["log_decay"] - 3  # ffm clips faster decays
    return params, rng.standard_normal((1, 5, layer.dim))


# y[0] of each layer.
REFERENCE = {
    "rglru": [
        [-0.421526699699, -0.864435933811, -1.9258008645, -2.06344637361],
        [2.33287638013, -6.37197776202, -4.3482429793, -10.6221860082],
        [-1.42155969866, 1.04303036834, 0.286838812193, 3.20157928981],
        [-0.626394189569, 0.99912438374, 0.029646728491, 1.92120741305],
        [-1.50689963485, 2.59787337039, 1.39781594703, 5.23522687995],
    ],
    "mingru": [
        [-0.430914010238, 0.4949229514, 1.1601949656, 1.57272787074],
        [-0.761834549698, -0.700319977047, 4.53845494783, 4.10602026244],
        [-1.62064730624, 2.41838954867, 2.83726766808, 6.28971477294],
        [-1.3014942693, 1.48217191152, 1.91257370783, 4.20337766848],
        [-0.774674631093, -1.14877568125, 4.35468315074, 3.16958670366],
    ],
    "minlstm": [
        [0.0544819150592, 0.931999237623, 0.46466716152, 1.12514000736],
        [0.145892017836, 0.978523848613, 0.513149992703, 1.50896044384],
        [0.192081085527, 0.992960857363, 0.66272183701, 1.74444894386],
        [0.762017568012, 0.258633467883, 0.47829275071, 1.15604344212],
        [1.14225690349, 0.475999932833, 0.121192305615, 0.38196009269],
    ],
    "sru": [
        [-0.945034294559, 0.868248150757, 0.87455829466, 1.01358282387],
        [0.358090746221, -0.131706481992, 0.0504340351305, 0.882654064722],
        [-0.976138113741, 0.727776766718, -1.05224444629, -1.51818997647],
        [0.0409361898345, 1.0266766219, 0.0359395087911, 0.118378863917],
        [0.253174065793, -0.610219241415, -0.683828107851, -0.433416727034],
    ],
    "sru-projected": [
        [0.948538969847, -0.934956209562, -1.30819268753, 0.857091959417],
        [-1.08085013007, 0.538790525092, 0.302315390957, -1.70689252513],
        [-0.330288671467, -0.137990167207, 0.521789679232, -0.000960804137796],
        [-1.12662305577, -0.13572203552, -0.031692314368, -1.70909815662],
        [-1.78720207798, 0.133801211134, 0.42708014591, -2.48953399952],
    ],
    "ffm": [
        [-1.0279951999, -1.52586008975, 0.85489444305, 0.779587722486],
        [1.81546222929, -0.383202910106, 1.59687798004, 0.114835019665],
        [4.05098571986, 0.865550447052, 3.66943956894, 4.24867681077],
        [0.20691788604, -0.587120437363, 0.910579156239, -0.0584130403735],
        [-0.658195030972, -0.727351430203, 1.58980604918, 1.99563582114],
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_match_the_reference(name, x64, compiled_quickly):
    layer = LAYERS[name]
    params, x = drawn(layer)
    y, _ = jax.jit(layer.apply)(params, x)
    # transformers scans in float32.
    tolerance = 2e-7 if name == "rglru" else 1e-10
    assert_close(y[0], np.array(REFERENCE[name]), tolerance)
