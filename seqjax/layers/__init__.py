"""Sequence layers: frozen dataclasses with `init`, `apply`, `step` and `initial_state`."""

from seqjax.layers._base import Layer as Layer
from seqjax.layers._base import Param as Param
from seqjax.layers._rnn import RNN as RNN
from seqjax.layers.attention import SlidingWindowAttention as SlidingWindowAttention
from seqjax.layers.context import Context as Context
from seqjax.layers.conv import ShortConv as ShortConv
from seqjax.layers.deltanet import DeltaNet as DeltaNet
from seqjax.layers.ffm import FFM as FFM
from seqjax.layers.gateloop import GateLoop as GateLoop
from seqjax.layers.gla import GLA as GLA
from seqjax.layers.hgrn import HGRN as HGRN
from seqjax.layers.lru import LRU as LRU
from seqjax.layers.mamba import Mamba as Mamba
from seqjax.layers.minrnn import MinGRU as MinGRU
from seqjax.layers.minrnn import MinLSTM as MinLSTM
from seqjax.layers.mlp import GatedMLP as GatedMLP
from seqjax.layers.norm import LayerNorm as LayerNorm
from seqjax.layers.norm import RMSNorm as RMSNorm
from seqjax.layers.qrnn import QRNN as QRNN
from seqjax.layers.qrnn import QuasiLSTM as QuasiLSTM
from seqjax.layers.registry import REGISTRY as REGISTRY
from seqjax.layers.registry import Entry as Entry
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
from seqjax.layers.s5 import S5 as S5
from seqjax.layers.sru import SRU as SRU
from seqjax.layers.token_shift import TokenShift as TokenShift

__all__ = [
    "FFM",
    "GLA",
    "GRU",
    "HGRN",
    "LEM",
    "LRU",
    "LSTM",
    "LTC",
    "MGU",
    "QRNN",
    "REGISTRY",
    "RGLRU",
    "RNN",
    "S5",
    "SLSTM",
    "SRU",
    "CoRNN",
    "Context",
    "DeltaNet",
    "Elman",
    "Entry",
    "GateLoop",
    "GatedMLP",
    "IndRNN",
    "Layer",
    "LayerNorm",
    "LeakyRNN",
    "Mamba",
    "MinGRU",
    "MinLSTM",
    "ParaGRU",
    "ParaLSTM",
    "Param",
    "QuasiLSTM",
    "RMSNorm",
    "ShortConv",
    "SlidingWindowAttention",
    "TokenShift",
    "UnICORNN",
]
