"""Registry of the layers that mix over time: one row per architecture.

Commands, tests and the tables of the documentation derive from `REGISTRY`. Adding a row makes
`experiments/configs/lm.py:NAME` train the layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from seqjax.layers._base import Layer
from seqjax.layers._rnn import RNN
from seqjax.layers.attention import SlidingWindowAttention
from seqjax.layers.block_linear import BlockLinear
from seqjax.layers.deltanet import DeltaNet
from seqjax.layers.gateloop import GateLoop
from seqjax.layers.gla import GLA
from seqjax.layers.legs import LegS
from seqjax.layers.linoss import LinOSS
from seqjax.layers.lmu import LMU
from seqjax.layers.longhorn import Longhorn
from seqjax.layers.lru import LRU
from seqjax.layers.mamba import Mamba
from seqjax.layers.mega import DampedEMA
from seqjax.layers.rnn import GRU, LEM, LSTM, LTC, SLSTM, Elman, ParaGRU, ParaLSTM
from seqjax.layers.s4d import GSS, S4D
from seqjax.layers.s5 import S5
from seqjax.layers.unitary import UnitaryRNN

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
      layer: the class.
      title: the architecture's name, spelled as in its paper.
      paper: arXiv number or citation.
      op: the function of `seqjax` that computes the recurrence; empty for attention.
      defaults: (dim, heads) -> keywords of the class for a small model. Configurations show them as
        fields that users may change.
      fixed: keywords that define this row, such as `gated=True`.
    """

    layer: type[Layer]
    title: str
    paper: str
    op: str
    defaults: Callable[[int, int], Options]
    fixed: Options = dataclasses.field(default_factory=dict)

    def make(self, dim: int, **options: Any) -> Layer:
        """Return the layer with `fixed` and the given keywords."""
        made: Any = self.layer
        return made(dim=dim, **self.fixed, **options)

    @property
    def fields(self) -> list[str]:
        """Names of the keywords that `make` takes."""
        names = [field.name for field in dataclasses.fields(self.layer) if field.init]  # type: ignore[arg-type]
        return [name for name in names if name != "dim" and name not in self.fixed]


def _states(dim: int, heads: int) -> Options:
    del heads
    return {"state_dim": dim}


def _states_and_dt(dim: int, heads: int) -> Options:
    return _states(dim, heads) | {"dt": 1.0}


def _heads(dim: int, heads: int) -> Options:
    del dim
    return {"heads": heads}


def _lru(dim: int, heads: int) -> Options:
    return _states(dim, heads) | {"r_min": 0.0, "r_max": 1.0}


def _s5(dim: int, heads: int) -> Options:
    del heads
    # The paper's steps of 1e-3 to 1e-1 and its few blocks suit slowly changing signals. On text
    # they reach 2.7 bits per byte.
    return {"state_dim": 2 * dim, "blocks": max(dim // 4, 1), "dt_min": 1e-2, "dt_max": 2.0}


def _mamba(dim: int, heads: int) -> Options:
    del dim, heads
    return {"state_dim": 16, "expand": 2, "conv_size": 4, "negative_eigenvalues": False}


def _deltanet(dim: int, heads: int) -> Options:
    return _heads(dim, heads) | {"conv_size": 4, "negative_eigenvalues": False}


def _attention(dim: int, heads: int) -> Options:
    del dim
    return {"heads": max(heads // 2, 1), "window": 64}


def _averages(dim: int, heads: int) -> Options:
    del dim, heads
    return {"state_dim": 16}


def _s4d(dim: int, heads: int) -> Options:
    del dim, heads
    # Steps of 1e-3 to 1e-1, the paper's, suit slowly changing signals and not text.
    return {"state_dim": 32, "dt_min": 1e-2, "dt_max": 2.0}


def _longhorn(dim: int, heads: int) -> Options:
    del dim, heads
    return {"state_dim": 16, "expand": 2, "conv_size": 4}


def _memory(dim: int, heads: int) -> Options:
    del dim
    return {"state_dim": 16, "channels": 2 * heads}


def _lmu(dim: int, heads: int) -> Options:
    return _memory(dim, heads) | {"window": 64.0}


def _blocks(dim: int, heads: int) -> Options:
    del dim, heads
    return {"block_size": 4}


def _rotations(dim: int, heads: int) -> Options:
    # Heads of 8 states: the exponential of a matrix costs the cube of its size.
    return {"heads": max(dim // 8, 1), "head_dim": 8}


def _rnn(layer: type[RNN], title: str, paper: str, defaults: Any = _states) -> Entry:
    return Entry(layer, title, paper, "nonlinear_scan", defaults)


REGISTRY: Mapping[str, Entry] = MappingProxyType(
    {
        "lru": Entry(LRU, "LRU", "2303.06349", "linear_scan", _lru),
        "s5": Entry(S5, "S5", "2208.04933", "linear_scan", _s5),
        "mamba": Entry(Mamba, "Mamba", "2312.00752", "selective_scan", _mamba),
        "longhorn": Entry(Longhorn, "Longhorn", "2407.14207", "selective_scan", _longhorn),
        "s4d": Entry(S4D, "S4D", "2206.11893", "ssm_scan", _s4d),
        "dss": Entry(S4D, "DSS", "2203.14343", "ssm_scan", _s4d, {"spectrum": "dss"}),
        "gss": Entry(GSS, "GSS", "2206.13947", "ssm_scan", _s4d),
        "damped_ema": Entry(DampedEMA, "Damped EMA of MEGA", "2209.10655", "ssm_scan", _averages),
        "linoss": Entry(LinOSS, "LinOSS", "2410.03943", "block_scan", _states),
        "lmu": Entry(LMU, "LMU", "2102.11417", "block_scan", _lmu),
        "legs": Entry(LegS, "HiPPO-LegS", "2008.07669", "block_scan", _memory),
        "block_linear": Entry(
            BlockLinear, "Block-diagonal linear RNN", "2309.07412", "block_scan", _blocks
        ),
        "unitary": Entry(UnitaryRNN, "URN", "2208.05719", "block_scan", _rotations),
        "gateloop": Entry(GateLoop, "GateLoop", "2311.01927", "linear_attention", _heads),
        "gla": Entry(GLA, "GLA", "2312.06635", "linear_attention", _heads),
        "deltanet": Entry(DeltaNet, "DeltaNet", "2406.06484", "delta_rule", _deltanet),
        "gated_deltanet": Entry(
            DeltaNet, "Gated DeltaNet", "2412.06464", "delta_rule", _deltanet, {"gated": True}
        ),
        "attention": Entry(
            SlidingWindowAttention, "Sliding-window attention", "2004.05150", "", _attention
        ),
        "elman": _rnn(Elman, "Elman network", "Elman 1990"),
        "gru": _rnn(GRU, "GRU", "1406.1078"),
        "lstm": _rnn(LSTM, "LSTM", "Hochreiter and Schmidhuber 1997"),
        "paragru": _rnn(ParaGRU, "ParaGRU", "2510.21450"),
        "paralstm": _rnn(ParaLSTM, "ParaLSTM", "2510.21450"),
        "slstm": _rnn(SLSTM, "sLSTM", "2405.04517"),
        "lem": _rnn(LEM, "LEM", "2110.04744", _states_and_dt),
        "ltc": _rnn(LTC, "LTC", "2006.04439", _states_and_dt),
    }
)
"""All architectures by the name that configurations use."""
