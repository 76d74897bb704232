"""RWKV, Mamba-3 and Gated DeltaNet-2 against numbers of the authors' or widely used code.

Parameters and inputs are drawn by `drawn`. The numbers were computed on CPU with the same arrays,
in float64 where the code allows it: the NumPy form of RWKV-7 and the step of RWKV-6 in RWKV-LM, the
reference steps in the tests of state-spaces/mamba, and the reference recurrence of Gated DeltaNet-2
in flash-linear-attention.
"""

import jax
import numpy as np
import pytest

from seqjax.layers import RWKV6, RWKV7, GatedDeltaNet2, Mamba3, RWKVChannelMix
from seqjax.models import Backbone, Block
from tests.contract.harness import assert_close

RANKS = {"decay_rank": 3, "a_rank": 3, "value_rank": 3, "gate_rank": 3}
# The NumPy form of RWKV-7 has the eps of heads with 64 features.
TIME_MIX = RWKV7(dim=8, heads=2, **RANKS, norm_eps=64e-5 / 4)
LAYERS = {
    "rwkv7": Backbone(
        Block(TIME_MIX, RWKVChannelMix(dim=8), norm="layer", norm_eps=1e-5),
        depth=2,
        norm="layer",
        norm_eps=1e-5,
    ),
    "rwkv6": RWKV6(dim=8, heads=2, mix_rank=2, decay_rank=3),
    "mamba3": Mamba3(dim=4, state_dim=4, head_dim=4),
    "mamba3-mimo": Mamba3(dim=4, state_dim=4, head_dim=4, mimo_rank=2, norm=True),
    "gated_deltanet2": GatedDeltaNet2(dim=8, heads=2, negative_eigenvalues=True),
}


def drawn(layer):
    """Return parameters in the order of their sorted names, and x [1, 5, dim]."""
    rng = np.random.default_rng(0)
    shapes, tree = jax.tree.flatten(layer.param_shapes(), is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.unflatten(tree, [0.5 * rng.standard_normal(shape) for shape in shapes])
    return params, rng.standard_normal((1, 5, layer.dim))


# y[0] of each layer.
REFERENCE = {
    "rwkv7": [
        [
            -0.911211872575,
            -0.42829056729,
            -2.93593394437,
            0.291814072215,
            -0.39709281513,
            0.117398783429,
            0.402349021622,
            -0.411041458778,
        ],
        [
            -0.88993615289,
            -1.25608984729,
            -2.91885200846,
            -0.0814309335433,
            -0.41498018741,
            0.190568897515,
            -0.171625020969,
            -0.191171486764,
        ],
        [
            -0.91720509796,
            -0.443271517055,
            -2.50194798321,
            0.369459297376,
            -0.342708753399,
            0.11916541577,
            0.348801985687,
            -0.453286155616,
        ],
        [
            -0.904593853078,
            -0.94006239948,
            -2.92211803012,
            0.0286227600214,
            -0.459423563511,
            -0.0336689802067,
            0.239904546941,
            -0.606841671844,
        ],
        [
            -0.918867812452,
            -0.757303830562,
            -1.76400035126,
            0.191667000529,
            -0.279706943644,
            0.316536911136,
            0.0888597406995,
            -0.358076591336,
        ],
    ],
    "rwkv6": [
        [
            -0.202330557282,
            0.3138212922,
            -0.159802512312,
            0.182966038602,
            0.188730805392,
            -0.187131882068,
            -0.0852613422527,
            -0.158837837145,
        ],
        [
            -0.0858143440481,
            0.2910639359,
            -0.275407939467,
            0.340739116363,
            0.201937997029,
            -0.0741242275096,
            -0.248330031119,
            -0.154109934068,
        ],
        [
            -1.03192835313,
            2.02385615535,
            1.67110958825,
            -0.179741271391,
            -1.42325791795,
            -1.49863271594,
            -0.485473593728,
            -0.510603328977,
        ],
        [
            0.993440694281,
            1.28767632145,
            -2.06947870894,
            1.54981909549,
            -0.492015272275,
            0.337207613789,
            -2.34805528235,
            -0.658781102233,
        ],
        [
            -0.984283186237,
            1.00660105971,
            0.552860472291,
            0.269908661478,
            -0.0336842863312,
            -0.812338845754,
            -0.250848427193,
            0.206940207663,
        ],
    ],
    "mamba3": [
        [0.0408051751459, -0.0449014636068, -0.173266321741, -0.252887126072],
        [-0.993353827955, -0.580185385899, 0.009294856754, -1.57430423461],
        [-0.398321743422, -0.0874646151694, -0.183924310292, 0.210320294909],
        [-0.00690137034921, -0.0170335723927, -0.0975973772688, -0.130522891658],
        [0.129902287259, -0.0493391036908, -0.259421289594, -0.424009790601],
    ],
    "mamba3-mimo": [
        [2.40161525605e-05, 0.195624592578, 0.321842394088, -0.351590531749],
        [0.000408547067599, 0.00836348714973, 0.0222436283416, -0.019619066339],
        [-0.0192167768471, 0.301842089547, 0.531178072432, -0.596966536146],
        [0.00110346891782, 0.0180408719789, -0.0225097656563, -0.0529455988637],
        [-0.00564197894168, 0.0116926733468, 0.010334474629, -0.0266065796797],
    ],
    "gated_deltanet2": [
        [
            0.322025562241,
            -0.476569911588,
            0.139455069327,
            0.22317065624,
            -0.488246043788,
            0.0870557366569,
            0.142221183349,
            -0.110290982993,
        ],
        [
            -0.222706363933,
            0.275431018188,
            -0.131171319937,
            0.0919307832545,
            0.0118150591715,
            0.179035498025,
            0.088746087212,
            0.0108860891929,
        ],
        [
            0.147015791459,
            -0.29317419281,
            0.0209621828886,
            0.185989801701,
            -0.126340036242,
            -0.0693899671741,
            -0.0267024988835,
            0.0102589827361,
        ],
        [
            -0.0267487460518,
            -0.078805330441,
            -0.0404775919259,
            0.117570996971,
            0.026211967643,
            -0.0714063335184,
            -0.0161109904227,
            0.0568595349645,
        ],
        [
            0.214610047674,
            -0.354238510401,
            0.0259646222278,
            0.215680674151,
            -0.226691579931,
            -0.0222213607146,
            0.0874268167277,
            0.0105496618851,
        ],
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_match_the_reference(name, x64, compiled_quickly):
    params, x = drawn(LAYERS[name])
    y, _ = jax.jit(LAYERS[name].apply)(params, x)
    assert_close(y[0], np.array(REFERENCE[name]), 1e-10)
