"""One row per layer; `tests.contract.cases` defines rows and has those of the ops."""

import seqjax
from tests.contract.exponential_cases import EXPONENTIAL
from tests.contract.layer_case import layer_case as _layer
from tests.oracles import layer_oracles, rnn_oracles

LAYERS = [
    _layer(seqjax.layers.LRU(dim=4, state_dim=6), layer_oracles.lru),
    _layer(seqjax.layers.S5(dim=4, state_dim=8, blocks=2), layer_oracles.s5),
    _layer(
        seqjax.layers.S5(dim=4, state_dim=4, blocks=1, bidirectional=True),
        layer_oracles.s5,
        "S5-bidirectional",
    ),
    _layer(seqjax.layers.GateLoop(dim=4, heads=2), layer_oracles.gateloop),
    _layer(seqjax.layers.Mamba(dim=4, state_dim=3), layer_oracles.mamba),
    _layer(
        seqjax.layers.Mamba(dim=4, state_dim=3, negative_eigenvalues=True),
        layer_oracles.mamba,
        "Mamba-negative",
    ),
    *EXPONENTIAL,
    _layer(seqjax.layers.DeltaNet(dim=4, heads=2), layer_oracles.deltanet),
    _layer(
        seqjax.layers.DeltaNet(dim=4, heads=2, gated=True, negative_eigenvalues=True),
        layer_oracles.deltanet,
        "DeltaNet-gated",
    ),
    # Several values per head: with two, the norm of an output near zero bends sharply, and
    # differences of gradients are no judge of second derivatives.
    _layer(
        seqjax.layers.GLA(dim=4, heads=2, gate_rank=3, expand_k=1, expand_v=2), layer_oracles.gla
    ),
    _layer(
        seqjax.layers.GLA(dim=4, heads=2, gate_rank=3, expand_k=1, expand_v=2, conv_size=3),
        layer_oracles.gla,
        "GLA-conv",
    ),
    _layer(
        seqjax.layers.SlidingWindowAttention(dim=4, heads=2, window=5),
        layer_oracles.sliding_window_attention,
    ),
    _layer(seqjax.layers.Elman(dim=4, state_dim=3), rnn_oracles.elman),
    _layer(seqjax.layers.GRU(dim=4, state_dim=3), rnn_oracles.gru),
    _layer(seqjax.layers.LSTM(dim=4, state_dim=3), rnn_oracles.lstm),
    _layer(seqjax.layers.ParaGRU(dim=4, state_dim=3), rnn_oracles.paragru),
    _layer(seqjax.layers.ParaLSTM(dim=4, state_dim=3), rnn_oracles.paralstm),
    _layer(seqjax.layers.SLSTM(dim=4, state_dim=3), rnn_oracles.slstm),
    _layer(seqjax.layers.LEM(dim=4, state_dim=3, dt=0.5), rnn_oracles.lem),
    _layer(seqjax.layers.LTC(dim=4, state_dim=3, dt=0.5), rnn_oracles.ltc),
    _layer(seqjax.layers.ShortConv(dim=4), layer_oracles.short_conv),
    _layer(seqjax.layers.RMSNorm(dim=4), layer_oracles.rms_norm),
    _layer(seqjax.layers.RMSNorm(dim=4, offset=True), layer_oracles.rms_norm, "RMSNorm-offset"),
    _layer(seqjax.layers.LayerNorm(dim=4), layer_oracles.layer_norm),
    _layer(seqjax.layers.GatedMLP(dim=4), layer_oracles.gated_mlp),
]
