"""Nonlinear RNN cells: a step, the structure of its Jacobian, and the bounds of its states."""

from seqjax.cells._base import Cell as Cell
from seqjax.cells.cornn import CoRNN as CoRNN
from seqjax.cells.cornn import UnICORNN as UnICORNN
from seqjax.cells.elman import Elman as Elman
from seqjax.cells.gru import GRU as GRU
from seqjax.cells.headwise import Headwise as Headwise
from seqjax.cells.indrnn import IndRNN as IndRNN
from seqjax.cells.leaky import LeakyRNN as LeakyRNN
from seqjax.cells.lem import LEM as LEM
from seqjax.cells.lstm import LSTM as LSTM
from seqjax.cells.ltc import LTC as LTC
from seqjax.cells.mgu import MGU as MGU
from seqjax.cells.paragru import ParaGRU as ParaGRU
from seqjax.cells.paralstm import ParaLSTM as ParaLSTM
from seqjax.cells.plrnn import PLRNN as PLRNN
from seqjax.cells.slstm import SLSTM as SLSTM
from seqjax.cells.slstm import DenseSLSTM as DenseSLSTM
from seqjax.cells.sru import SRU as SRU

__all__ = [
    "GRU",
    "LEM",
    "LSTM",
    "LTC",
    "MGU",
    "PLRNN",
    "SLSTM",
    "SRU",
    "Cell",
    "CoRNN",
    "DenseSLSTM",
    "Elman",
    "Headwise",
    "IndRNN",
    "LeakyRNN",
    "ParaGRU",
    "ParaLSTM",
    "UnICORNN",
]
