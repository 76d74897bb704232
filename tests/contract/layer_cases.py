"""One row per layer; `tests.contract.cases` defines rows and has those of the ops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from tests.contract.cases import Arrays, Case, normal
from tests.oracles import layer_oracles, rnn_oracles, ssm_oracles


def _layer(layer: Any, oracle: Callable[..., Any], name: str | None = None) -> Case:
    init = jax.jit(lambda key: layer.init(key, jnp.float64))

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        with jax.enable_x64(True):
            params = init(jax.random.key(rng.integers(2**31)))
        params = jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.standard_normal(p.shape), params)
        return {"params": params, "x": normal(rng, batch, length, layer.dim)}

    def run(inputs: Arrays, state: Any, reset: Any) -> Any:
        return layer.apply(inputs["params"], inputs["x"], state, reset)

    def judge(inputs: Arrays, state: None, reset: Any) -> tuple[Any, None]:
        return oracle(layer, inputs["params"], inputs["x"], reset), None

    return Case(
        name=name or type(layer).__name__,
        inputs=make,
        run=run,
        oracle=judge,
        algorithms=(None,),
        timed=("x",),
        split_axis=False,
        layer=layer,
    )


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
    _layer(seqjax.layers.Longhorn(dim=4, state_dim=3), ssm_oracles.longhorn),
    _layer(seqjax.layers.S4D(dim=4, state_dim=6), ssm_oracles.s4d),
    _layer(
        seqjax.layers.S4D(dim=4, state_dim=6, spectrum="legs", output_glu=True),
        ssm_oracles.s4d,
        "S4D-legs",
    ),
    _layer(seqjax.layers.S4D(dim=4, state_dim=3, spectrum="real"), ssm_oracles.s4d, "S4D-real"),
    _layer(seqjax.layers.GSS(dim=4, state_dim=4, inner=3, expand=2), ssm_oracles.gss),
    _layer(seqjax.layers.DampedEMA(dim=4, state_dim=3), ssm_oracles.damped_ema),
    _layer(seqjax.layers.LinOSS(dim=4, state_dim=3), ssm_oracles.linoss),
    _layer(
        seqjax.layers.LinOSS(dim=4, state_dim=3, discretization="imex", output_glu=True),
        ssm_oracles.linoss,
        "LinOSS-imex",
    ),
    _layer(seqjax.layers.LMU(dim=4, state_dim=5, channels=2, window=8.0), ssm_oracles.lmu),
    _layer(seqjax.layers.LegS(dim=4, state_dim=5, channels=2), ssm_oracles.legs),
    _layer(seqjax.layers.BlockLinear(dim=6, block_size=3), ssm_oracles.block_linear),
    _layer(seqjax.layers.UnitaryRNN(dim=4, heads=2, head_dim=3), ssm_oracles.unitary),
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
