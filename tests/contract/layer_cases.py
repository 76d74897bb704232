"""One row per layer; `tests.contract.cases` defines rows and has those of the ops."""

import seqjax
from tests.contract.expert_cases import EXPERTS
from tests.contract.exponential_cases import EXPONENTIAL
from tests.contract.layer_case import layer_case as _layer
from tests.contract.memory_cases import MEMORIES
from tests.oracles import (
    attention_oracles,
    feature_oracles,
    gated_oracles,
    latent_oracles,
    layer_oracles,
    rnn_oracles,
    rwkv_oracles,
    ssm_oracles,
)

LAYERS = [
    _layer(seqjax.layers.LRU(dim=4, state_dim=6), layer_oracles.lru),
    _layer(
        seqjax.layers.LRU(dim=2, state_dim=3, reparameterization="best"),
        layer_oracles.lru,
        "LRU-best",
    ),
    _layer(seqjax.layers.S5(dim=4, state_dim=8, blocks=2), layer_oracles.s5),
    _layer(
        seqjax.layers.S5(dim=4, state_dim=4, blocks=1, bidirectional=True),
        layer_oracles.s5,
        "S5-bidirectional",
    ),
    _layer(
        seqjax.layers.S5(dim=2, state_dim=4, reparameterization="softplus"),
        layer_oracles.s5,
        "S5-softplus",
    ),
    _layer(seqjax.layers.GateLoop(dim=4, heads=2), layer_oracles.gateloop),
    _layer(seqjax.layers.Mamba(dim=4, state_dim=3), layer_oracles.mamba),
    _layer(
        seqjax.layers.Mamba(dim=4, state_dim=3, negative_eigenvalues=True),
        layer_oracles.mamba,
        "Mamba-negative",
    ),
    *EXPONENTIAL,
    _layer(
        seqjax.layers.Mamba(
            dim=4, state_dim=3, dt_rank=3, bias=True, conv_bias=False, inner_norm_eps=1e-3
        ),
        layer_oracles.mamba,
        "Mamba-falcon",
    ),
    _layer(
        seqjax.layers.Mamba(
            dim=4, state_dim=3, inner_norm_eps=1e-3, inner_norm_scales=True, groups=2
        ),
        layer_oracles.mamba,
        "Mamba-groups",
    ),
    _layer(
        seqjax.layers.Mamba2(dim=4, state_dim=3, head_dim=2, groups=2), attention_oracles.mamba2
    ),
    _layer(
        seqjax.layers.Mamba2(
            dim=4,
            state_dim=3,
            head_dim=4,
            decay_factor=0.9,
            write_factor=0.7,
            state_limit=seqjax.methods.StateNorm(0.02),
        ),
        attention_oracles.mamba2,
        "Mamba2-limited",
    ),
    _layer(
        seqjax.layers.Mamba2(
            dim=4,
            state_dim=3,
            head_dim=4,
            heads=3,
            conv_bias=False,
            in_bias=True,
            out_bias=True,
            norm="norm_first",
            dt_limit=(0.01, 0.05),
        ),
        attention_oracles.mamba2,
        "Mamba2-norm-first",
    ),
    _layer(seqjax.layers.DeltaNet(dim=4, heads=2), attention_oracles.deltanet),
    _layer(seqjax.layers.Mamba3(dim=4, state_dim=4, head_dim=4), rwkv_oracles.mamba3),
    _layer(
        seqjax.layers.Mamba3(
            dim=4,
            state_dim=4,
            head_dim=4,
            groups=2,
            mimo_rank=2,
            rope_fraction=1,
            decay="softplus",
            norm=True,
        ),
        rwkv_oracles.mamba3,
        "Mamba3-mimo",
    ),
    _layer(seqjax.layers.Longhorn(dim=4, state_dim=3), ssm_oracles.longhorn),
    _layer(seqjax.layers.S4D(dim=4, state_dim=6), ssm_oracles.s4d),
    _layer(
        seqjax.layers.S4D(dim=4, state_dim=6, spectrum="legs", output_glu=True),
        ssm_oracles.s4d,
        "S4D-legs",
    ),
    _layer(seqjax.layers.S4D(dim=4, state_dim=3, spectrum="real"), ssm_oracles.s4d, "S4D-real"),
    _layer(
        seqjax.layers.S4D(dim=4, state_dim=6, reparameterization="best"),
        ssm_oracles.s4d,
        "S4D-best",
    ),
    # The variance of three channels can be small. The norm divides bfloat16 rounding errors by it.
    _layer(
        seqjax.layers.GSS(dim=4, state_dim=4, inner=3, expand=2, inner_norm=True, norm_eps=0.1),
        ssm_oracles.gss,
    ),
    _layer(seqjax.layers.DampedEMA(dim=4, state_dim=3), ssm_oracles.damped_ema),
    _layer(seqjax.layers.CEMA(dim=4, state_dim=3), ssm_oracles.cema),
    _layer(seqjax.layers.LinOSS(dim=4, state_dim=3), ssm_oracles.linoss),
    _layer(
        seqjax.layers.LinOSS(dim=4, state_dim=3, discretization="imex", output_glu=True),
        ssm_oracles.linoss,
        "LinOSS-imex",
    ),
    _layer(seqjax.layers.LMU(dim=4, state_dim=5, channels=2, window=8.0), ssm_oracles.lmu),
    _layer(seqjax.layers.LegS(dim=4, state_dim=5, channels=2), ssm_oracles.legs),
    _layer(seqjax.layers.LSSL(dim=3, state_dim=4, outputs=2), ssm_oracles.lssl),
    _layer(seqjax.layers.BlockLinear(dim=6, block_size=3), ssm_oracles.block_linear),
    _layer(seqjax.layers.UnitaryRNN(dim=4, heads=2, head_dim=3), ssm_oracles.unitary),
    *MEMORIES,
    _layer(
        seqjax.layers.DeltaNet(dim=4, heads=2, gated=True, negative_eigenvalues=True),
        attention_oracles.deltanet,
        "DeltaNet-gated",
    ),
    _layer(
        seqjax.layers.DeltaNet(dim=4, heads=1, gated=True, value_heads=2, conv_size=2),
        attention_oracles.deltanet,
        "DeltaNet-value-heads",
    ),
    _layer(
        seqjax.layers.DeltaNet(dim=4, heads=1, conv_size=2, feature_map="dpfp", dpfp_order=2),
        attention_oracles.deltanet,
        "DeltaNet-dpfp",
    ),
    _layer(
        seqjax.layers.DeltaProduct(dim=4, heads=1, value_heads=2, updates=3),
        attention_oracles.deltanet,
    ),
    _layer(seqjax.layers.KDA(dim=4, heads=1, expand_v=0.5, value_heads=2), attention_oracles.kda),
    _layer(
        seqjax.layers.KDA(
            dim=4,
            heads=2,
            head_dim=4,
            negative_eigenvalues=True,
            decay_bound=-5.0,
            low_rank=False,
        ),
        attention_oracles.kda,
        "KDA-bounded",
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
    _layer(seqjax.layers.GSA(dim=4, heads=2, slots=3), layer_oracles.gsa),
    _layer(
        seqjax.layers.GSA(dim=4, heads=1, head_dim=3, conv_size=2), layer_oracles.gsa, "GSA-conv"
    ),
    _layer(seqjax.layers.Comba(dim=4, heads=2, expand_v=2), rwkv_oracles.comba),
    _layer(seqjax.layers.GatedDeltaNet2(dim=4, heads=2, expand_v=2), rwkv_oracles.gated_deltanet2),
    # Four features per head: with two, a layer norm is nearly a sign.
    _layer(
        seqjax.layers.RWKV6(dim=8, heads=2, mix_rank=2, decay_rank=3, layer=1, depth=3),
        rwkv_oracles.rwkv6,
    ),
    _layer(
        seqjax.layers.RWKV6(dim=8, heads=2, data_dependent=False, layer=1, depth=3),
        rwkv_oracles.rwkv6,
        "RWKV6-5",
    ),
    _layer(
        seqjax.layers.RWKV6(dim=8, heads=2, data_dependent=False, present_share=True),
        rwkv_oracles.rwkv6,
        "RWKV6-5_present",
    ),
    _layer(
        seqjax.layers.RWKV7(
            dim=8, heads=2, decay_rank=3, a_rank=3, value_rank=3, gate_rank=3, layer=1, depth=3
        ),
        rwkv_oracles.rwkv7,
    ),
    _layer(seqjax.layers.RWKVChannelMix(dim=4), rwkv_oracles.channel_mix),
    _layer(
        seqjax.layers.RWKVChannelMix(dim=4, version=6), rwkv_oracles.channel_mix, "RWKVChannelMix-6"
    ),
    _layer(
        seqjax.layers.RWKVChannelMix(dim=4, version=4, present_share=True),
        rwkv_oracles.channel_mix,
        "RWKVChannelMix-4_present",
    ),
    _layer(seqjax.layers.RetNet(dim=8, heads=2), attention_oracles.retnet),
    _layer(
        seqjax.layers.RetNet(dim=8, heads=2, expand_k=0.5, expand_v=1),
        attention_oracles.retnet,
        "RetNet-narrow_keys",
    ),
    _layer(
        seqjax.layers.LightningAttention(dim=4, heads=3, head_dim=2),
        attention_oracles.lightning_attention,
    ),
    _layer(
        seqjax.layers.LightningAttention(dim=4, heads=2, slopes="linear", gate_rank=0),
        attention_oracles.lightning_attention,
        "LightningAttention-linear",
    ),
    _layer(
        seqjax.layers.LightningAttention(dim=4, heads=3, head_dim=2, slopes="minimax", gate_rank=0),
        attention_oracles.lightning_attention,
        "LightningAttention-minimax",
    ),
    _layer(seqjax.layers.RGLRU(dim=4, state_dim=6, heads=2), gated_oracles.rglru),
    _layer(
        seqjax.layers.RGLRU(dim=4, unit_first_step=True),
        gated_oracles.rglru,
        "RGLRU-unit-first-step",
    ),
    _layer(seqjax.layers.MinGRU(dim=4, state_dim=6), gated_oracles.mingru),
    _layer(seqjax.layers.MinGRU(dim=4, positive=False), gated_oracles.mingru, "MinGRU-signed"),
    _layer(seqjax.layers.MinLSTM(dim=4), gated_oracles.minlstm),
    _layer(
        seqjax.layers.MinLSTM(dim=4, state_dim=6, positive=False),
        gated_oracles.minlstm,
        "MinLSTM-signed",
    ),
    _layer(seqjax.layers.HGRN(dim=4, state_dim=6), gated_oracles.hgrn),
    _layer(seqjax.layers.QRNN(dim=4, state_dim=6), gated_oracles.qrnn),
    _layer(seqjax.layers.SRU(dim=4), gated_oracles.sru),
    _layer(
        seqjax.layers.SRU(dim=4, state_dim=6, highway_bias=-1.0), gated_oracles.sru, "SRU-projected"
    ),
    _layer(seqjax.layers.QuasiLSTM(dim=4, state_dim=6), gated_oracles.quasi_lstm),
    _layer(seqjax.layers.FFM(dim=4, memory_dim=3, contexts=2), gated_oracles.ffm),
    _layer(seqjax.layers.HGRN2(dim=4, heads=2, head_dim=3), feature_oracles.hgrn2),
    _layer(seqjax.layers.LinearAttention(dim=4, heads=2), feature_oracles.linear_attention),
    _layer(
        seqjax.layers.LinearAttention(dim=4, heads=2, feature_map="performer", map_order=2),
        feature_oracles.linear_attention,
        "LinearAttention-performer",
    ),
    _layer(
        seqjax.layers.LinearAttention(dim=4, heads=2, expand_v=2, normalizer="rms"),
        feature_oracles.linear_attention,
        "LinearAttention-rms",
    ),
    _layer(seqjax.layers.Based(dim=4, heads=2, head_dim=3), feature_oracles.based),
    # Where q . k is near 0, its square is a sum of products that cancel. Relative to the default
    # `eps` of 1e-5 few digits are left of it in float32.
    _layer(
        seqjax.layers.Based(dim=4, heads=2, head_dim=4, rebased=True, eps=0.1),
        feature_oracles.based,
        "Based-rebased",
    ),
    _layer(seqjax.layers.PLSTM(dim=8, heads=2), feature_oracles.plstm),
    _layer(
        seqjax.layers.SlidingWindowAttention(dim=4, heads=2, window=5),
        layer_oracles.attention,
    ),
    _layer(
        seqjax.layers.Attention(
            dim=4,
            heads=4,
            kv_heads=2,
            head_dim=4,
            capacity=64,
            rotary_dim=2,
            qk_norm="rms_offset",
            output_gate=True,
        ),
        layer_oracles.attention,
    ),
    _layer(
        seqjax.layers.Attention(
            dim=4,
            heads=2,
            kv_heads=1,
            window=5,
            rotary_dim=0,
            scale=0.7,
            qk_norm="rms_all_heads",
            bias=True,
            out_bias=True,
        ),
        layer_oracles.attention,
        "Attention-window",
    ),
    _layer(
        seqjax.layers.MLA(
            dim=4,
            heads=2,
            kv_rank=3,
            head_dim=2,
            rotary_dim=2,
            value_dim=3,
            q_rank=3,
            capacity=64,
            scale=0.7,
            bias=True,
        ),
        latent_oracles.mla,
    ),
    # Without biases: a bias of keys that are not rotated changes no output, so that its derivative
    # is rounding.
    _layer(
        seqjax.layers.MLA(
            dim=4, heads=2, kv_rank=2, head_dim=3, rotary_dim=1, capacity=64, rope_base=None
        ),
        latent_oracles.mla,
        "MLA-unrotated",
    ),
    _layer(seqjax.layers.Elman(dim=4, state_dim=3), rnn_oracles.elman),
    _layer(seqjax.layers.GRU(dim=4, state_dim=3), rnn_oracles.gru),
    _layer(seqjax.layers.LSTM(dim=4, state_dim=3), rnn_oracles.lstm),
    _layer(seqjax.layers.Elman(dim=4, state_dim=6, heads=2), rnn_oracles.elman, "Elman-heads"),
    _layer(seqjax.layers.GRU(dim=4, state_dim=6, heads=2), rnn_oracles.gru, "GRU-heads"),
    _layer(seqjax.layers.LSTM(dim=4, state_dim=6, heads=2), rnn_oracles.lstm, "LSTM-heads"),
    _layer(
        seqjax.layers.LSTM(dim=4, state_dim=3, variant="cifg", peepholes=True),
        rnn_oracles.lstm,
        "LSTM-cifg",
    ),
    _layer(
        seqjax.layers.LSTM(dim=4, state_dim=3, variant="fgr", peepholes=True),
        rnn_oracles.lstm,
        "LSTM-fgr",
    ),
    _layer(
        seqjax.layers.LSTM(dim=4, state_dim=6, heads=2, layer_norm=True, norm_eps=1e-2),
        rnn_oracles.lstm,
        "LSTM-norm",
    ),
    _layer(seqjax.layers.SLSTM(dim=4, state_dim=6, heads=2), rnn_oracles.slstm, "SLSTM-heads"),
    _layer(seqjax.layers.ParaGRU(dim=4, state_dim=3), rnn_oracles.paragru),
    _layer(seqjax.layers.ParaLSTM(dim=4, state_dim=3), rnn_oracles.paralstm),
    _layer(seqjax.layers.SLSTM(dim=4, state_dim=3), rnn_oracles.slstm),
    _layer(seqjax.layers.LEM(dim=4, state_dim=3, dt=0.5), rnn_oracles.lem),
    _layer(seqjax.layers.LTC(dim=4, state_dim=3, dt=0.5), rnn_oracles.ltc),
    _layer(seqjax.layers.IndRNN(dim=4, state_dim=3), rnn_oracles.indrnn),
    _layer(
        seqjax.layers.IndRNN(dim=4, state_dim=3, activation="tanh"),
        rnn_oracles.indrnn,
        "IndRNN-tanh",
    ),
    _layer(seqjax.layers.MGU(dim=4, state_dim=3), rnn_oracles.mgu),
    _layer(seqjax.layers.PLRNN(dim=4, state_dim=3), rnn_oracles.plrnn),
    _layer(seqjax.layers.LeakyRNN(dim=4, state_dim=3), rnn_oracles.leakyrnn),
    _layer(seqjax.layers.CoRNN(dim=4, state_dim=3, dt=0.3), rnn_oracles.cornn),
    _layer(seqjax.layers.UnICORNN(dim=4, state_dim=3, alpha=2.0), rnn_oracles.unicornn),
    _layer(seqjax.layers.ShortConv(dim=4), layer_oracles.short_conv),
    _layer(seqjax.layers.TokenShift(dim=4), gated_oracles.token_shift),
    _layer(seqjax.layers.RMSNorm(dim=4), layer_oracles.rms_norm),
    _layer(seqjax.layers.RMSNorm(dim=4, offset=True), layer_oracles.rms_norm, "RMSNorm-offset"),
    _layer(seqjax.layers.LayerNorm(dim=4), layer_oracles.layer_norm),
    _layer(seqjax.layers.GatedMLP(dim=4), layer_oracles.gated_mlp),
    _layer(
        seqjax.layers.GatedMLP(dim=4, activation="gelu_tanh", bias=True),
        layer_oracles.gated_mlp,
        "GatedMLP-gelu",
    ),
    _layer(seqjax.layers.GatedConv(dim=4), layer_oracles.gated_conv),
    _layer(
        seqjax.layers.GatedConv(dim=4, size=2, bias=True),
        layer_oracles.gated_conv,
        "GatedConv-bias",
    ),
    _layer(seqjax.layers.MLP(dim=4), layer_oracles.mlp),
    _layer(seqjax.layers.MLP(dim=4, activation="gelu", bias=True), layer_oracles.mlp, "MLP-gelu"),
    *EXPERTS,
    _layer(
        seqjax.layers.Scaled(
            seqjax.layers.GateLoop(dim=4, heads=2), 0.5, 3.0, {"q_proj": 2.0, "phase_bias": 0.3}
        ),
        layer_oracles.scaled(layer_oracles.gateloop),
    ),
]
