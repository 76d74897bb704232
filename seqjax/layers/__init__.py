"""Sequence layers: frozen dataclasses with `init`, `apply`, `step` and `initial_state`."""

from seqjax.layers._base import Layer as Layer
from seqjax.layers._base import Param as Param
from seqjax.layers._rnn import RNN as RNN
from seqjax.layers.attention import SlidingWindowAttention as SlidingWindowAttention
from seqjax.layers.block_linear import BlockLinear as BlockLinear
from seqjax.layers.context import Context as Context
from seqjax.layers.conv import ShortConv as ShortConv
from seqjax.layers.deltanet import DeltaNet as DeltaNet
from seqjax.layers.gateloop import GateLoop as GateLoop
from seqjax.layers.gla import GLA as GLA
from seqjax.layers.legs import LegS as LegS
from seqjax.layers.linoss import LinOSS as LinOSS
from seqjax.layers.lmu import LMU as LMU
from seqjax.layers.longhorn import Longhorn as Longhorn
from seqjax.layers.lru import LRU as LRU
from seqjax.layers.mamba import Mamba as Mamba
from seqjax.layers.mega import DampedEMA as DampedEMA
from seqjax.layers.mlp import GatedMLP as GatedMLP
from seqjax.layers.norm import LayerNorm as LayerNorm
from seqjax.layers.norm import RMSNorm as RMSNorm
from seqjax.layers.registry import REGISTRY as REGISTRY
from seqjax.layers.registry import Entry as Entry
from seqjax.layers.rnn import GRU as GRU
from seqjax.layers.rnn import LEM as LEM
from seqjax.layers.rnn import LSTM as LSTM
from seqjax.layers.rnn import LTC as LTC
from seqjax.layers.rnn import SLSTM as SLSTM
from seqjax.layers.rnn import Elman as Elman
from seqjax.layers.rnn import ParaGRU as ParaGRU
from seqjax.layers.rnn import ParaLSTM as ParaLSTM
from seqjax.layers.s4d import GSS as GSS
from seqjax.layers.s4d import S4D as S4D
from seqjax.layers.s5 import S5 as S5
from seqjax.layers.unitary import UnitaryRNN as UnitaryRNN

__all__ = [
    "GLA",
    "GRU",
    "GSS",
    "LEM",
    "LMU",
    "LRU",
    "LSTM",
    "LTC",
    "REGISTRY",
    "RNN",
    "S4D",
    "S5",
    "SLSTM",
    "BlockLinear",
    "Context",
    "DampedEMA",
    "DeltaNet",
    "Elman",
    "Entry",
    "GateLoop",
    "GatedMLP",
    "Layer",
    "LayerNorm",
    "LegS",
    "LinOSS",
    "Longhorn",
    "Mamba",
    "ParaGRU",
    "ParaLSTM",
    "Param",
    "RMSNorm",
    "ShortConv",
    "SlidingWindowAttention",
    "UnitaryRNN",
]
