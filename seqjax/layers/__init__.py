"""Sequence layers: frozen dataclasses with `init`, `apply`, `step` and `initial_state`."""

from seqjax.layers._base import Layer as Layer
from seqjax.layers._base import Param as Param
from seqjax.layers._rnn import RNN as RNN
from seqjax.layers.aaren import Aaren as Aaren
from seqjax.layers.atlas import Atlas as Atlas
from seqjax.layers.attention import Attention as Attention
from seqjax.layers.attention import SlidingWindowAttention as SlidingWindowAttention
from seqjax.layers.based import Based as Based
from seqjax.layers.block_linear import BlockLinear as BlockLinear
from seqjax.layers.block_recurrent import BlockRecurrent as BlockRecurrent
from seqjax.layers.chimera import Chimera as Chimera
from seqjax.layers.comba import Comba as Comba
from seqjax.layers.context import Context as Context
from seqjax.layers.conv import ShortConv as ShortConv
from seqjax.layers.delta_rnn import DeltaRNN as DeltaRNN
from seqjax.layers.deltanet import DeltaNet as DeltaNet
from seqjax.layers.deltanet import DeltaProduct as DeltaProduct
from seqjax.layers.ffm import FFM as FFM
from seqjax.layers.gated_conv import GatedConv as GatedConv
from seqjax.layers.gated_deltanet2 import GatedDeltaNet2 as GatedDeltaNet2
from seqjax.layers.gateloop import GateLoop as GateLoop
from seqjax.layers.gla import GLA as GLA
from seqjax.layers.gsa import GSA as GSA
from seqjax.layers.hgrn import HGRN as HGRN
from seqjax.layers.hgrn2 import HGRN2 as HGRN2
from seqjax.layers.kda import KDA as KDA
from seqjax.layers.legs import LegS as LegS
from seqjax.layers.lightnet import LightNet as LightNet
from seqjax.layers.lightning import LightningAttention as LightningAttention
from seqjax.layers.linear_attention import LinearAttention as LinearAttention
from seqjax.layers.linoss import LinOSS as LinOSS
from seqjax.layers.lmu import LMU as LMU
from seqjax.layers.loglinear import LogLinearAttention as LogLinearAttention
from seqjax.layers.longhorn import Longhorn as Longhorn
from seqjax.layers.lru import LRU as LRU
from seqjax.layers.lssl import LSSL as LSSL
from seqjax.layers.mamba import Mamba as Mamba
from seqjax.layers.mamba2 import Mamba2 as Mamba2
from seqjax.layers.mamba3 import Mamba3 as Mamba3
from seqjax.layers.mega import CEMA as CEMA
from seqjax.layers.mega import DampedEMA as DampedEMA
from seqjax.layers.mesanet import MesaNet as MesaNet
from seqjax.layers.minrnn import MinGRU as MinGRU
from seqjax.layers.minrnn import MinLSTM as MinLSTM
from seqjax.layers.mla import MLA as MLA
from seqjax.layers.mlp import MLP as MLP
from seqjax.layers.mlp import GatedMLP as GatedMLP
from seqjax.layers.mlstm import MLSTM as MLSTM
from seqjax.layers.moe import MoE as MoE
from seqjax.layers.norm import LayerNorm as LayerNorm
from seqjax.layers.norm import RMSNorm as RMSNorm
from seqjax.layers.plstm import PLSTM as PLSTM
from seqjax.layers.plstm_2d import PLSTM2D as PLSTM2D
from seqjax.layers.qrnn import QRNN as QRNN
from seqjax.layers.qrnn import QuasiLSTM as QuasiLSTM
from seqjax.layers.recurrent_deltanet import RecurrentDeltaNet as RecurrentDeltaNet
from seqjax.layers.registry import GRID_REGISTRY as GRID_REGISTRY
from seqjax.layers.registry import REGISTRY as REGISTRY
from seqjax.layers.registry import Entry as Entry
from seqjax.layers.retnet import RetNet as RetNet
from seqjax.layers.rglru import RGLRU as RGLRU
from seqjax.layers.rnn import GRU as GRU
from seqjax.layers.rnn import LEM as LEM
from seqjax.layers.rnn import LSTM as LSTM
from seqjax.layers.rnn import LTC as LTC
from seqjax.layers.rnn import SLSTM as SLSTM
from seqjax.layers.rnn import Elman as Elman
from seqjax.layers.rnn import ParaGRU as ParaGRU
from seqjax.layers.rnn import ParaLSTM as ParaLSTM
from seqjax.layers.rnn_variants import MGU as MGU
from seqjax.layers.rnn_variants import PLRNN as PLRNN
from seqjax.layers.rnn_variants import CoRNN as CoRNN
from seqjax.layers.rnn_variants import IndRNN as IndRNN
from seqjax.layers.rnn_variants import LeakyRNN as LeakyRNN
from seqjax.layers.rnn_variants import UnICORNN as UnICORNN
from seqjax.layers.rwkv4 import RWKV4 as RWKV4
from seqjax.layers.rwkv6 import RWKV6 as RWKV6
from seqjax.layers.rwkv7 import RWKV7 as RWKV7
from seqjax.layers.rwkv_channel_mix import RWKVChannelMix as RWKVChannelMix
from seqjax.layers.s4d import GSS as GSS
from seqjax.layers.s4d import S4D as S4D
from seqjax.layers.s5 import S5 as S5
from seqjax.layers.scaled import Scaled as Scaled
from seqjax.layers.shared_transformer import SharedTransformer as SharedTransformer
from seqjax.layers.sru import SRU as SRU
from seqjax.layers.srwm import SRWM as SRWM
from seqjax.layers.titans import Titans as Titans
from seqjax.layers.token_shift import TokenShift as TokenShift
from seqjax.layers.ttt import TTTMLP as TTTMLP
from seqjax.layers.ttt import TTTLinear as TTTLinear
from seqjax.layers.unitary import UnitaryRNN as UnitaryRNN

__all__ = [
    "CEMA",
    "FFM",
    "GLA",
    "GRID_REGISTRY",
    "GRU",
    "GSA",
    "GSS",
    "HGRN",
    "HGRN2",
    "KDA",
    "LEM",
    "LMU",
    "LRU",
    "LSSL",
    "LSTM",
    "LTC",
    "MGU",
    "MLA",
    "MLP",
    "MLSTM",
    "PLRNN",
    "PLSTM",
    "PLSTM2D",
    "QRNN",
    "REGISTRY",
    "RGLRU",
    "RNN",
    "RWKV4",
    "RWKV6",
    "RWKV7",
    "S4D",
    "S5",
    "SLSTM",
    "SRU",
    "SRWM",
    "TTTMLP",
    "Aaren",
    "Atlas",
    "Attention",
    "Based",
    "BlockLinear",
    "BlockRecurrent",
    "Chimera",
    "CoRNN",
    "Comba",
    "Context",
    "DampedEMA",
    "DeltaNet",
    "DeltaProduct",
    "DeltaRNN",
    "Elman",
    "Entry",
    "GateLoop",
    "GatedConv",
    "GatedDeltaNet2",
    "GatedMLP",
    "IndRNN",
    "Layer",
    "LayerNorm",
    "LeakyRNN",
    "LegS",
    "LightNet",
    "LightningAttention",
    "LinOSS",
    "LinearAttention",
    "LogLinearAttention",
    "Longhorn",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MesaNet",
    "MinGRU",
    "MinLSTM",
    "MoE",
    "ParaGRU",
    "ParaLSTM",
    "Param",
    "QuasiLSTM",
    "RMSNorm",
    "RWKVChannelMix",
    "RecurrentDeltaNet",
    "RetNet",
    "Scaled",
    "SharedTransformer",
    "ShortConv",
    "SlidingWindowAttention",
    "TTTLinear",
    "Titans",
    "TokenShift",
    "UnICORNN",
    "UnitaryRNN",
]
