"""Sequence layers: frozen dataclasses with `init`, `apply`, `step` and `initial_state`."""

from seqjax.layers._base import Layer as Layer
from seqjax.layers._base import Param as Param
from seqjax.layers._rnn import RNN as RNN
from seqjax.layers.aaren import Aaren as Aaren
from seqjax.layers.attention import Attention as Attention
from seqjax.layers.attention import SlidingWindowAttention as SlidingWindowAttention
from seqjax.layers.context import Context as Context
from seqjax.layers.conv import ShortConv as ShortConv
from seqjax.layers.deltanet import DeltaNet as DeltaNet
from seqjax.layers.deltanet import DeltaProduct as DeltaProduct
from seqjax.layers.ffm import FFM as FFM
from seqjax.layers.gateloop import GateLoop as GateLoop
from seqjax.layers.gla import GLA as GLA
from seqjax.layers.hgrn import HGRN as HGRN
from seqjax.layers.kda import KDA as KDA
from seqjax.layers.lightnet import LightNet as LightNet
from seqjax.layers.lightning import LightningAttention as LightningAttention
from seqjax.layers.lru import LRU as LRU
from seqjax.layers.mamba import Mamba as Mamba
from seqjax.layers.mamba2 import Mamba2 as Mamba2
from seqjax.layers.mesanet import MesaNet as MesaNet
from seqjax.layers.minrnn import MinGRU as MinGRU
from seqjax.layers.minrnn import MinLSTM as MinLSTM
from seqjax.layers.mlp import GatedMLP as GatedMLP
from seqjax.layers.mlstm import MLSTM as MLSTM
from seqjax.layers.norm import LayerNorm as LayerNorm
from seqjax.layers.norm import RMSNorm as RMSNorm
from seqjax.layers.qrnn import QRNN as QRNN
from seqjax.layers.qrnn import QuasiLSTM as QuasiLSTM
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
from seqjax.layers.rnn_variants import CoRNN as CoRNN
from seqjax.layers.rnn_variants import IndRNN as IndRNN
from seqjax.layers.rnn_variants import LeakyRNN as LeakyRNN
from seqjax.layers.rnn_variants import UnICORNN as UnICORNN
from seqjax.layers.rwkv6 import RWKV6 as RWKV6
from seqjax.layers.rwkv7 import RWKV7 as RWKV7
from seqjax.layers.rwkv_channel_mix import RWKVChannelMix as RWKVChannelMix
from seqjax.layers.s5 import S5 as S5
from seqjax.layers.sru import SRU as SRU
from seqjax.layers.srwm import SRWM as SRWM
from seqjax.layers.titans import Titans as Titans
from seqjax.layers.token_shift import TokenShift as TokenShift
from seqjax.layers.ttt import TTTMLP as TTTMLP
from seqjax.layers.ttt import TTTLinear as TTTLinear

__all__ = [
    "FFM",
    "GLA",
    "GRU",
    "HGRN",
    "KDA",
    "LEM",
    "LRU",
    "LSTM",
    "LTC",
    "MGU",
    "MLSTM",
    "QRNN",
    "REGISTRY",
    "RGLRU",
    "RNN",
    "RWKV6",
    "RWKV7",
    "S5",
    "SLSTM",
    "SRU",
    "SRWM",
    "TTTMLP",
    "Aaren",
    "Attention",
    "CoRNN",
    "Context",
    "DeltaNet",
    "DeltaProduct",
    "Elman",
    "Entry",
    "GateLoop",
    "GatedMLP",
    "IndRNN",
    "Layer",
    "LayerNorm",
    "LeakyRNN",
    "LightNet",
    "LightningAttention",
    "Mamba",
    "Mamba2",
    "MesaNet",
    "MinGRU",
    "MinLSTM",
    "ParaGRU",
    "ParaLSTM",
    "Param",
    "QuasiLSTM",
    "RMSNorm",
    "RWKVChannelMix",
    "RetNet",
    "ShortConv",
    "SlidingWindowAttention",
    "TTTLinear",
    "Titans",
    "TokenShift",
    "UnICORNN",
]
