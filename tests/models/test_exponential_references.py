"""Layers with exponential gates against numbers of transformers 5.

Parameters and inputs are drawn by `drawn`. The numbers were computed on CPU with the same arrays,
by `RwkvSelfAttention` in float64 and by `xLSTMLayer` in float32, with `eps` in the latter set to 0.
"""

import jax
import numpy as np
import pytest

from seqjax.layers import MLSTM, RWKV4
from tests.contract.harness import assert_close

LAYERS = {"rwkv4": RWKV4(dim=4), "mlstm_7b": MLSTM(dim=8, heads=2, variant="7b")}
TOLERANCE = {"rwkv4": 1e-11, "mlstm_7b": 2e-6}  # of float32 numbers for xLSTM


def drawn(layer):
    """Return parameters in the order of their sorted names, and x [1, 5, dim]."""
    rng = np.random.default_rng(0)
    shapes = layer.param_shapes()
    params = {name: rng.standard_normal(shapes[name]) for name in sorted(shapes)}
    return params, rng.standard_normal((1, 5, layer.dim))


# y[0] of each layer, four numbers in a row.
REFERENCE = {
    "rwkv4": [
        [0.759998509944, 0.693516221614, -0.0955122887936, -0.196277669471],
        [0.0620619386187, -0.264346016724, 4.8972848822, 4.33763682254],
        [-1.22629621565, -0.281746735891, 0.429025425624, 2.75383520655],
        [-2.73331208262, 0.324950999616, -1.08768357115, 2.76809438241],
        [-2.24285091671, 2.04252259465, -3.92362682535, -0.376949554606],
    ],
    "mlstm_7b": [
        [-1.18348436669, 1.82084722849, 3.20841294194, 3.4458535679],
        [-2.30049603537, -0.743359451487, 0.573957697491, -4.37475033684],
        [-1.12237241265, 1.95694764595, 1.04970070536, 1.22621818696],
        [-1.5369181422, -0.77216210505, 0.294197717457, -3.6244936893],
        [3.41629274585, -4.58628478667, -1.84289077981, -2.86060579252],
        [4.03159634199, 2.23581722772, -0.410756917, 8.02830339263],
        [-0.369298906686, 1.3283958401, 3.62960886299, 2.05756467484],
        [-1.79706320235, 0.15937264598, 0.913639951881, -3.75551183929],
        [-0.701865482768, 0.918621076545, 3.61580863794, 2.43836235317],
        [-2.0564724073, 0.0678617552911, 0.543138710664, -3.14133461193],
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_agree_with_transformers(name, x64, compiled_quickly):
    layer = LAYERS[name]
    params, x = drawn(layer)
    y, _ = jax.jit(layer.apply)(params, x)
    assert_close(y[0], np.reshape(REFERENCE[name], (5, layer.dim)), TOLERANCE[name])
