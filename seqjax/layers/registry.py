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
from seqjax.layers.aaren import Aaren
from seqjax.layers.atlas import Atlas
from seqjax.layers.attention import SlidingWindowAttention
from seqjax.layers.based import Based
from seqjax.layers.block_linear import BlockLinear
from seqjax.layers.block_recurrent import BlockRecurrent
from seqjax.layers.chimera import Chimera
from seqjax.layers.comba import Comba
from seqjax.layers.delta_rnn import DeltaRNN
from seqjax.layers.deltanet import DeltaNet, DeltaProduct
from seqjax.layers.ffm import FFM
from seqjax.layers.gated_deltanet2 import GatedDeltaNet2
from seqjax.layers.gateloop import GateLoop
from seqjax.layers.gla import GLA
from seqjax.layers.gsa import GSA
from seqjax.layers.hgrn import HGRN
from seqjax.layers.hgrn2 import HGRN2
from seqjax.layers.kda import KDA
from seqjax.layers.legs import LegS
from seqjax.layers.lightnet import LightNet
from seqjax.layers.lightning import LightningAttention
from seqjax.layers.linear_attention import LinearAttention
from seqjax.layers.linoss import LinOSS
from seqjax.layers.lmu import LMU
from seqjax.layers.loglinear import LogLinearAttention
from seqjax.layers.longhorn import Longhorn
from seqjax.layers.lru import LRU
from seqjax.layers.lssl import LSSL
from seqjax.layers.mamba import Mamba
from seqjax.layers.mamba2 import Mamba2
from seqjax.layers.mamba3 import Mamba3
from seqjax.layers.mega import CEMA, DampedEMA
from seqjax.layers.mesanet import MesaNet
from seqjax.layers.minrnn import MinGRU, MinLSTM
from seqjax.layers.mlstm import MLSTM
from seqjax.layers.plstm import PLSTM
from seqjax.layers.plstm_2d import PLSTM2D
from seqjax.layers.qrnn import QRNN, QuasiLSTM
from seqjax.layers.recurrent_deltanet import RecurrentDeltaNet
from seqjax.layers.retnet import RetNet
from seqjax.layers.rglru import RGLRU
from seqjax.layers.rnn import GRU, LEM, LSTM, LTC, SLSTM, Elman, ParaGRU, ParaLSTM
from seqjax.layers.rnn_variants import MGU, PLRNN, CoRNN, IndRNN, LeakyRNN, UnICORNN
from seqjax.layers.rwkv4 import RWKV4
from seqjax.layers.rwkv6 import RWKV6
from seqjax.layers.rwkv7 import RWKV7
from seqjax.layers.s4d import GSS, S4D
from seqjax.layers.s5 import S5
from seqjax.layers.sru import SRU
from seqjax.layers.srwm import SRWM
from seqjax.layers.titans import Titans
from seqjax.layers.ttt import TTTMLP, TTTLinear
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


def _chimera(dim: int, heads: int) -> Options:
    del dim, heads
    return {"state_dim": 16, "expand": 2}


def _heads(dim: int, heads: int) -> Options:
    del dim
    return {"heads": heads}


def _nothing(dim: int, heads: int) -> Options:
    del dim, heads
    return {}


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


def _mamba2(dim: int, heads: int) -> Options:
    return {"state_dim": 64, "head_dim": dim // heads, "conv_size": 4}


def _mamba3(dim: int, heads: int) -> Options:
    return {"state_dim": 64, "head_dim": dim // heads, "mimo_rank": 1}


def _deltanet(dim: int, heads: int) -> Options:
    return _heads(dim, heads) | {"conv_size": 4, "negative_eigenvalues": False}


def _deltaproduct(dim: int, heads: int) -> Options:
    return _deltanet(dim, heads) | {"updates": 2, "negative_eigenvalues": True}


def _comba(dim: int, heads: int) -> Options:
    return _heads(dim, heads) | {"conv_size": 4, "correction": 1.0}


def _performer(dim: int, heads: int) -> Options:
    return _heads(dim, heads) | {"map_order": 4}


def _based(dim: int, heads: int) -> Options:
    return _heads(dim, heads) | {"head_dim": 16}


def _rglru(dim: int, heads: int) -> Options:
    return _states(dim, heads) | _heads(dim, heads)


def _ffm(dim: int, heads: int) -> Options:
    del dim, heads
    return {"memory_dim": 32, "contexts": 4}


def _sru(dim: int, heads: int) -> Options:
    return _states(dim, heads) | {"highway_bias": 0.0}


def _cornn(dim: int, heads: int) -> Options:
    # The authors' steps suit signals of hundreds of steps. On text a step must change the state.
    return _states(dim, heads) | {"dt": 0.5, "gamma": 1.0, "epsilon": 1.0}


def _unicornn(dim: int, heads: int) -> Options:
    return _states(dim, heads) | {"dt": 1.0, "alpha": 1.0}


def _ttt(dim: int, heads: int) -> Options:
    return _heads(dim, heads) | {"mini_batch": 16}


def _atlas(dim: int, heads: int) -> Options:
    # Heads of 8 features: the memory grows with their cube, the step with a higher power.
    return {"heads": max(dim // 8, heads), "window": 8}


def _block_recurrent(dim: int, heads: int) -> Options:
    del dim
    return {"heads": max(heads // 2, 1), "window": 64, "states": 32}


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


def _lssl(dim: int, heads: int) -> Options:
    # The cost of a step grows with the square of state_dim, so the state is small.
    return _s4d(dim, heads) | {"state_dim": 8}


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
        "mamba2": Entry(Mamba2, "Mamba-2", "2405.21060", "linear_attention", _mamba2),
        "mamba3": Entry(Mamba3, "Mamba-3", "2603.15569", "linear_attention", _mamba3),
        "longhorn": Entry(Longhorn, "Longhorn", "2407.14207", "selective_scan", _longhorn),
        "s4d": Entry(S4D, "S4D", "2206.11893", "ssm_scan", _s4d),
        "dss": Entry(S4D, "DSS", "2203.14343", "ssm_scan", _s4d, {"spectrum": "dss"}),
        "gss": Entry(GSS, "GSS", "2206.13947", "ssm_scan", _s4d),
        "damped_ema": Entry(DampedEMA, "Damped EMA of MEGA", "2209.10655", "ssm_scan", _averages),
        "cema": Entry(CEMA, "Complex EMA of Megalodon", "2404.08801", "ssm_scan", _averages),
        "linoss": Entry(LinOSS, "LinOSS", "2410.03943", "block_scan", _states),
        "lmu": Entry(LMU, "LMU", "2102.11417", "block_scan", _lmu),
        "legs": Entry(LegS, "HiPPO-LegS", "2008.07669", "block_scan", _memory),
        "lssl": Entry(LSSL, "LSSL", "2110.13985", "block_scan", _lssl),
        "block_linear": Entry(
            BlockLinear, "Block-diagonal linear RNN", "2309.07412", "block_scan", _blocks
        ),
        "unitary": Entry(UnitaryRNN, "URN", "2208.05719", "block_scan", _rotations),
        "gateloop": Entry(GateLoop, "GateLoop", "2311.01927", "linear_attention", _heads),
        "gla": Entry(GLA, "GLA", "2312.06635", "linear_attention", _heads),
        "gsa": Entry(GSA, "Gated slot attention", "2409.07146", "linear_attention", _heads),
        "lightnet": Entry(LightNet, "LightNet", "2405.21022", "linear_attention", _heads),
        "mlstm": Entry(MLSTM, "mLSTM", "2405.04517", "linear_attention", _heads),
        "mlstm_7b": Entry(
            MLSTM, "xLSTM 7B", "2503.13427", "linear_attention", _heads, {"variant": "7b"}
        ),
        "mlstm_sig": Entry(
            MLSTM, "mLSTMsig", "2503.14376", "linear_attention", _heads, {"variant": "sig"}
        ),
        "aaren": Entry(Aaren, "Aaren", "2405.13956", "linear_scan", _heads),
        "srwm": Entry(SRWM, "SRWM", "2202.05780", "step_scan", _heads),
        "recurrent_deltanet": Entry(
            RecurrentDeltaNet, "Recurrent Delta Net", "2106.06295", "step_scan", _heads
        ),
        "delta_rnn": Entry(DeltaRNN, "Delta RNN", "2106.06295", "step_scan", _heads),
        "ttt_linear": Entry(TTTLinear, "TTT-Linear", "2407.04620", "", _ttt),
        "ttt_mlp": Entry(TTTMLP, "TTT-MLP", "2407.04620", "", _ttt),
        "titans": Entry(Titans, "Titans (memory)", "2501.00663", "", _ttt),
        "atlas": Entry(Atlas, "Atlas (memory)", "2505.23735", "step_scan", _atlas),
        "block_recurrent": Entry(
            BlockRecurrent, "Block-Recurrent Transformer", "2203.07852", "", _block_recurrent
        ),
        "mesanet": Entry(MesaNet, "MesaNet", "2506.05233", "linear_attention", _heads),
        "loglinear": Entry(
            LogLinearAttention, "Log-linear attention", "2506.04761", "linear_attention", _heads
        ),
        "retnet": Entry(RetNet, "RetNet", "2307.08621", "linear_attention", _heads),
        "lightning": Entry(
            LightningAttention, "Lightning attention", "2307.14995", "linear_attention", _heads
        ),
        "hgrn2": Entry(HGRN2, "HGRN2", "2404.07904", "linear_attention", _heads),
        "linear_attention": Entry(
            LinearAttention, "Linear attention", "2006.16236", "linear_attention", _heads
        ),
        "performer": Entry(
            LinearAttention,
            "Performer",
            "2009.14794",
            "linear_attention",
            _performer,
            {"feature_map": "performer"},
        ),
        "transnormer": Entry(
            LinearAttention,
            "TransNormer",
            "2210.10340",
            "linear_attention",
            _heads,
            {"normalizer": "rms"},
        ),
        "based": Entry(Based, "Based", "2402.18668", "linear_attention", _based),
        "rebased": Entry(
            Based, "ReBased", "2402.10644", "linear_attention", _based, {"rebased": True}
        ),
        "plstm": Entry(PLSTM, "pLSTM", "2506.11997", "linear_attention", _heads),
        "deltanet": Entry(DeltaNet, "DeltaNet", "2406.06484", "delta_rule", _deltanet),
        "gated_deltanet": Entry(
            DeltaNet, "Gated DeltaNet", "2412.06464", "delta_rule", _deltanet, {"gated": True}
        ),
        "rglru": Entry(RGLRU, "Hawk (RG-LRU)", "2402.19427", "linear_scan", _rglru),
        "rwkv4": Entry(RWKV4, "RWKV-4", "2305.13048", "linear_scan", _nothing),
        "deltaproduct": Entry(
            DeltaProduct, "DeltaProduct", "2502.10297", "delta_rule", _deltaproduct
        ),
        "kda": Entry(KDA, "Kimi Delta Attention", "2510.26692", "delta_rule", _deltanet),
        "comba": Entry(Comba, "Comba", "2506.02475", "generalized_delta_rule", _comba),
        "gated_deltanet2": Entry(
            GatedDeltaNet2, "Gated DeltaNet-2", "2605.22791", "generalized_delta_rule", _deltanet
        ),
        "rwkv5": Entry(
            RWKV6, "RWKV-5", "2404.05892", "linear_attention", _heads, {"data_dependent": False}
        ),
        "rwkv6": Entry(
            RWKV6, "RWKV-6", "2404.05892", "linear_attention", _heads, {"data_dependent": True}
        ),
        "rwkv7": Entry(RWKV7, "RWKV-7", "2503.14456", "generalized_delta_rule", _heads),
        "mingru": Entry(MinGRU, "minGRU", "2410.01201", "linear_scan", _states),
        "minlstm": Entry(MinLSTM, "minLSTM", "2410.01201", "linear_scan", _states),
        "hgrn": Entry(HGRN, "HGRN", "2311.04823", "linear_scan", _states),
        "qrnn": Entry(QRNN, "QRNN", "1611.01576", "linear_scan", _states),
        "sru": _rnn(SRU, "SRU", "1709.02755", _sru),
        "quasi_lstm": Entry(QuasiLSTM, "Quasi-LSTM", "2309.11197", "linear_scan", _states),
        "ffm": Entry(FFM, "FFM", "2310.04128", "linear_scan", _ffm),
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
        "indrnn": _rnn(IndRNN, "IndRNN", "1803.04831"),
        "mgu": _rnn(MGU, "MGU", "1603.09420"),
        "plrnn": _rnn(PLRNN, "PLRNN", "1612.07846"),
        "leaky": _rnn(LeakyRNN, "Leaky RNN", "1804.11188"),
        "cornn": _rnn(CoRNN, "coRNN", "2010.00951", _cornn),
        "unicornn": _rnn(UnICORNN, "UnICORNN", "2103.05487", _unicornn),
    }
)
"""All architectures by the name that configurations use."""

GRID_REGISTRY: Mapping[str, Entry] = MappingProxyType(
    {
        "plstm_2d_p": Entry(
            PLSTM2D, "pLSTM in 2-D (P)", "2506.11997", "plstm_2d", _heads, {"mode": "P"}
        ),
        "plstm_2d_d": Entry(
            PLSTM2D, "pLSTM in 2-D (D)", "2506.11997", "plstm_2d", _heads, {"mode": "D"}
        ),
        "chimera": Entry(Chimera, "Chimera", "2406.04320", "selective_scan_2d", _chimera),
    }
)
"""The layers over grids, which only models of images use."""
