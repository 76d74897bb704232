"""Layers with a matrix state against numbers of transformers 5.24.

Parameters and inputs are drawn by `drawn`. The numbers were computed on CPU with the same arrays,
with modules in float64: the mixers of Mamba-2, Qwen3-Next, Kimi-Linear and MiniMax.
"""

import jax
import numpy as np
import pytest

from seqjax.layers import KDA, DeltaNet, LightningAttention, Mamba2
from tests.contract.harness import assert_close

LAYERS = {
    "mamba2": Mamba2(dim=4, state_dim=3, head_dim=2, groups=2, dt_limit=(0.1, 1.5)),
    "gated_deltanet": DeltaNet(
        dim=4, heads=1, head_dim=4, expand_v=0.5, gated=True, value_heads=2, norm_eps=1e-6
    ),
    "kda": KDA(dim=4, heads=2, gate_bias=False, norm_eps=1e-5),
    "lightning": LightningAttention(dim=4, heads=2, gate_rank=0),
}


def drawn(layer):
    """Return parameters in the order of their sorted names, and x [1, 5, dim]."""
    rng = np.random.default_rng(0)
    shapes = layer.param_shapes()
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    params = jax.tree.unflatten(tree, [rng.standard_normal(shape) for shape in leaves])
    return params, rng.standard_normal((1, 5, layer.dim))


# y[0] of each layer.
REFERENCE = {
    "mamba2": [
        [-4.2668515038, -2.58841727786, -8.17012014363, -4.52618142573],
        [4.59295007319, 4.29231013277, 10.8197000609, -6.86053486522],
        [4.83888831243, 4.34628272413, 10.7236231764, -7.22943597162],
        [-3.98902619925, -4.33962721645, -8.32920060875, -5.37273691718],
        [-4.56286007914, -0.494559174881, -5.87408976509, -0.321198839102],
    ],
    "gated_deltanet": [
        [0.852862941315, -0.631215394428, -0.849210216498, 0.635610109808],
        [-1.07771413218, -3.24434198871, -3.33629844771, 1.7131149546],
        [-1.17075810981, -5.4032318508, -3.91786030512, 2.55748889949],
        [-0.671915845779, 1.19538931322, 0.948958604672, -0.769187803118],
        [-4.60102187629, -1.26873649576, -3.14124360748, 0.430019462741],
    ],
    "kda": [
        [0.335606960528, -0.562920839854, -0.156766399255, -0.0504621206582],
        [0.87281637371, 0.140437842622, -0.41624755662, -1.25351096581],
        [-0.27955412138, 0.247498533535, 0.145355409958, 0.171415120493],
        [0.827761554656, -0.0301680555991, -0.385680398336, -1.16350002492],
        [2.36381166897, 0.145644123144, -1.15566384167, -3.28769489621],
    ],
    "lightning": [
        [0.530004281606, -0.365849808663, -0.431914048523, -0.38904675219],
        [-0.707212064909, 0.904837094614, 0.694873048381, 0.318633951619],
        [0.113806110389, -0.102126533498, -0.127333967917, -0.102735938557],
        [-0.267299846612, 0.597736096154, 0.293999816425, -0.117846746829],
        [-0.109710384298, 0.405814210446, 0.0571124675779, -0.29299234418],
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_match_the_reference(name, x64, compiled_quickly):
    layer = LAYERS[name]
    params, x = drawn(layer)
    y, _ = jax.jit(layer.apply)(params, x)
    # transformers computes norms and recurrences in float32, also in a float64 module.
    assert_close(y[0], np.array(REFERENCE[name]), 5e-7)
