"""Layers against numbers of public repositories.

Parameters and inputs are drawn by `drawn`. The numbers were computed in float64 on CPU with the
same arrays, by

- OpenNLPLab/fairseq-evo, by the authors: the NormAttention of TransNormer, without LRPE;
- claCase/Attention-as-RNN, which is not by the authors: the recurrence of Aaren, with NumPy in
  place of TensorFlow. No public implementation by the authors was found (searched in November
  2026);
- tinghanf/RegluarLRNN, by the authors: the block-diagonal RNN, with its loop and with its scan;
- GU-CLASP/unitary-recurrent-network, by the authors of URN: its generated TensorFlow program,
  transcribed to NumPy and PyTorch;
- NX-AI/mlstm_kernels, by the authors: the parallel form of mLSTMsig in JAX, with the gates, norm
  and projections of the layer of xLSTM 7B around it;
- ag1988/dss, by the authors: the form "exp" of DSS, without gelu and output projection;
- lucidrains/gated-state-spaces-pytorch, which is not by the authors: GSS, with the gelu by tanh;
- state-spaces/s4, by the authors: LSSL, with the gelu by tanh. The dense LegS transition of the
  same repository replaced its transition in CUDA;
- radarFudan/StableSSM, by the authors: S4D with stable reparameterizations, with the gelu by tanh.

The code of DSS, GSS and StableSSM has B = 1. DSS and GSS share Lambda among the channels, and GSS
has a step of 1.
"""

import jax
import numpy as np
import pytest

from seqjax.layers import GSS, LSSL, MLSTM, S4D, Aaren, BlockLinear, LinearAttention, UnitaryRNN
from tests.contract.harness import assert_close
from tests.oracles import ssm_oracles

LAYERS = {
    "transnormer": LinearAttention(dim=4, heads=2, normalizer="rms", eps=1e-300),
    "aaren": Aaren(dim=4, heads=2),
    "block_linear": BlockLinear(dim=6, block_size=3),
    "unitary": UnitaryRNN(dim=4, heads=1, head_dim=4),
    "mlstm_sig": MLSTM(dim=8, heads=2, variant="sig"),
    "mlstm_sig-normalizer": MLSTM(
        dim=8, heads=2, variant="sig", normalizer=True, denominator_eps=1e-6
    ),
    "dss": S4D(dim=4, state_dim=6, spectrum="dss"),
    "stable-best": S4D(dim=4, state_dim=6, output_glu=True, reparameterization="best"),
    "stable-softplus": S4D(dim=4, state_dim=6, output_glu=True, reparameterization="softplus"),
    "gss": GSS(dim=4, state_dim=6, inner=3, expand=2, inner_norm=True),
    "lssl": LSSL(dim=4, state_dim=5, outputs=2),
}
# Deviations from the drawn parameters.
SHARED = {"dss", "gss"}
UNIT_STEP = {"gss"}


def drawn(name):
    """Return parameters in the order of their sorted names, and x [1, 5, dim]."""
    layer, rng = LAYERS[name], np.random.default_rng(0)
    shapes, tree = jax.tree.flatten(layer.param_shapes(), is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.unflatten(tree, [0.5 * rng.standard_normal(shape) for shape in shapes])
    x = rng.standard_normal((1, 5, layer.dim))
    ssm = params.get("ssm", params)
    if "A_imag" in ssm:
        ssm["B"][0], ssm["B"][1] = 1, 0
    if name in SHARED:
        for part in ("log_A_real", "A_imag"):
            ssm[part][:] = ssm[part][:1]
    if name in UNIT_STEP:
        ssm["log_step"][:] = 0
    return params, x


# y[0] of each layer.
REFERENCE = {
    "transnormer": [
        [0.0812785085024, 0.232181075265, -0.203066512817, -0.0621958692679],
        [0.0198248316935, -0.132471671056, -0.256292708109, -0.175854227252],
        [0.084675755877, 0.170832099601, -0.250638513486, -0.106953486555],
        [0.0515659013359, 0.0963610777086, -0.303412991287, -0.125807037193],
        [0.0773446061847, 0.202966155572, -0.262735844896, -0.0884016836613],
    ],
    "aaren": [
        [0.0920034243975, 0.533583988916, 0.423902177951, 0.378753099824],
        [0.149123244381, 0.448410995643, 0.123271426963, -0.0408303963092],
        [0.0401217737869, 0.102662443414, 0.0387160936779, -0.0795326679433],
        [0.0217355551477, 0.123872698593, -0.13310411087, -0.0272577936124],
        [-0.107271280776, -0.133710618544, 0.160450386987, 0.200590597887],
    ],
    "block_linear": [
        [0.796071061291, 0.781471455432, 0.211643844007],
        [-1.16396074375, -0.078944969633, 0.500463013826],
        [-0.0280830473202, -0.732024899457, 0.770877982621],
        [0.597220196506, -0.422013566619, -0.179675775563],
        [-0.271424269467, -0.511457659439, 1.82140114916],
        [-1.39114426302, -0.0227143911481, 0.220954864128],
        [0.536209870725, -0.458421068952, 1.4480030609],
        [-1.35607234092, -0.706980283314, 1.17744007364],
        [1.36968584346, 1.92282104631, 0.918420216832],
        [-1.45798873843, 0.638926428302, 2.65224458891],
    ],
    "unitary": [
        [0.261307326376, 0.0461704773297, -0.0987130501323, -0.184305081091],
        [0.228001667138, -0.0858415837363, -0.137241448471, -0.115664058344],
        [0.16463846511, -0.0753036910756, -0.200153604039, -0.173699880625],
        [-0.205267962896, -0.182814530825, -0.304197056062, -0.153764105846],
        [-0.106050841832, -0.0660349068887, -0.291431881298, -0.200111860092],
    ],
    "mlstm_sig": [
        [-0.191210191993, 0.259506167515, 0.711265059255, 0.755698470619],
        [-0.403256549398, -0.12115508676, 0.129037258505, -0.765113941314],
        [-0.3168811564, 0.453328108702, 0.282160762957, 0.351594656621],
        [-0.416915681894, -0.202728167839, 0.0464970525436, -0.876066707984],
        [0.554132752515, -0.702677876936, -0.380451652799, -0.50412817022],
        [0.652209300473, 0.326729312715, -0.292788014508, 1.36302965798],
        [-0.0702191237619, 0.360226114568, 0.869265259689, 0.460156793915],
        [-0.402152356086, 0.0519766120083, 0.42220125603, -1.00833819317],
        [-0.187021305506, 0.174792836486, 0.71935982235, 0.524527244972],
        [-0.429623804933, -0.00946992992418, 0.170737439978, -0.647597168577],
    ],
    "mlstm_sig-normalizer": [
        [-0.19121016664, 0.259506076638, 0.711264915715, 0.755698342353],
        [-0.403256473566, -0.121155063913, 0.129037210494, -0.765113729019],
        [-0.316880891462, 0.453327706033, 0.282160590282, 0.351594425953],
        [-0.41691534151, -0.202727996547, 0.046497003622, -0.876065975663],
        [0.554132752509, -0.702677876927, -0.380451652802, -0.50412817022],
        [0.652209300466, 0.326729312711, -0.292788014505, 1.36302965797],
        [-0.0702191417641, 0.360226098063, 0.869265268748, 0.460156829234],
        [-0.402152370097, 0.0519766001571, 0.422201215645, -1.00833816485],
        [-0.18702129217, 0.174792847346, 0.719359829166, 0.524527244954],
        [-0.429623793623, -0.00946993065323, 0.170737420256, -0.647597176024],
    ],
    "dss": [
        [-0.0633859903411, -0.0369090644477, -0.873213618592, -1.9806561024],
        [0.406205501463, 0.0825797860004, 1.1608974783, 2.24685676297],
        [0.400068863593, 0.0746024422693, -0.448309753564, 2.97286581369],
        [0.316512530087, -0.180172927988, 0.515220658374, 2.02914732463],
        [0.0814685541095, -0.0438071115488, -3.00259034233, -2.43568774771],
    ],
    "stable-best": [
        [-0.0307814818803, -0.0010783881117, -0.228674878485, -0.177725204269],
        [0.0639928831308, -0.540425964014, -0.531582211892, 0.308224001362],
        [-0.191501237094, 0.395845258034, -0.121164667162, 0.558904358523],
        [0.0813329833604, -0.180246559179, -0.0272042106571, -0.0132505514119],
        [0.0683858283216, -0.129456964347, -0.00883766259113, 0.052391662877],
    ],
    "stable-softplus": [
        [0.052646727393, -0.283360890901, -0.588614269602, -0.338409743763],
        [0.037361206392, -2.03321713723, -0.752939852522, 0.00515377067664],
        [-0.294221807732, 0.560011043192, -0.446613567885, 0.478774614059],
        [-0.042409281064, 0.0641112178977, 0.0328937658011, 0.00683094263218],
        [0.113945699355, -0.353465971891, -0.133622732716, 0.107521922379],
    ],
    "gss": [
        [-0.0122333550083, -0.0120741239602, -0.0140193214019, 0.0210637642398],
        [0.000385872478346, 0.00781722228203, 7.13057734681e-05, -0.00637352532909],
        [-0.101637693401, -0.0273752755002, 0.0177158035279, 0.0421351278958],
        [0.54955301464, 0.51832243796, 0.231454834393, -0.769720780109],
        [-0.214279290214, -0.0356468529021, 0.0425871268489, 0.0532745398715],
    ],
    "lssl": [
        [-0.698585051034, 0.858337101316, -0.37525631416, 1.06422648126],
        [-0.0942724190629, 0.0246942045379, -0.255091653393, 0.672101371902],
        [-0.260772656089, 0.761270920656, -0.771931254703, 0.780613983109],
        [0.317610929168, -0.271899233744, 0.963156744388, 0.788428690562],
        [-0.227767912336, -0.436367654967, -0.121211875121, 0.518307535492],
    ],
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.quick("aaren", "lssl")
def test_outputs_match_the_reference(name, x64, compiled_quickly):
    params, x = drawn(name)
    y, _ = jax.jit(LAYERS[name].apply)(params, x)
    assert_close(y[0], np.reshape(REFERENCE[name], y[0].shape), 1e-10)


@pytest.mark.slow
def test_gss_without_its_norm(x64, compiled_quickly):
    """Compare the paper's layer with the float64 loop: the code above always has the norm."""
    layer = GSS(dim=4, state_dim=4, inner=3, expand=2)
    params, x = layer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 9, 4))
    assert_close(jax.jit(layer.apply)(params, x)[0], ssm_oracles.gss(layer, params, x), 1e-10)
