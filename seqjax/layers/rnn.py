"""Nonlinear RNNs: a layer around each cell of `seqjax.cells`, solved for all steps at once."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from seqjax import cells
from seqjax.cells.lstm import Variant
from seqjax.layers import _init
from seqjax.layers._base import Initializer, Layer, Param, Params
from seqjax.layers._math import layer_normalize
from seqjax.layers._rnn import RNN


@dataclasses.dataclass(frozen=True)
class Elman(RNN):
    """Simple recurrent network (Elman, Finding structure in time, 1990).

        u_t = x_t W_in + bias
        h_t = tanh(u_t + h_{t-1} W)
        y_t = h_t W_out

    Departures: tanh instead of Elman's logistic function. W starts uniform in +-1/sqrt(N), the
    bias at 0.

    Parameters: in_proj [dim, N], bias [N], W [N, N], out_proj [N, dim]. State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Elman(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      heads: number of heads H, by default one that is full. With heads, every recurrent matrix is
        block-diagonal, [H, N / H, N / H], and the state is that of `seqjax.cells.Headwise`.
    """

    heads: int | None = None

    @property
    def cell(self) -> cells.Cell:
        """`seqjax.cells.Elman`, or one per head."""
        return self._in_heads(cells.Elman, self.heads)


@dataclasses.dataclass(frozen=True)
class GRU(RNN):
    """Gated recurrent unit (arXiv 1406.1078), as in PyTorch and cuDNN.

        u_r, u_z, u_n = x_t W_in + bias
        r_t = sigmoid(u_r + h_{t-1} W_r)
        z_t = sigmoid(u_z + h_{t-1} W_z)
        n_t = tanh(u_n + r_t * (h_{t-1} W_n + n_bias))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}
        y_t = h_t W_out

    Departures: the reset gate acts after the product, see `seqjax.cells.GRU`. The matrices start
    uniform in +-1/sqrt(N). The bias of z, the gate that keeps the state, starts at 1, as is common
    for LSTMs (Jozefowicz et al., 2015). The other biases start at 0.

    Parameters: in_proj [dim, 3 N], bias [3 N], W_r, W_z, W_n [N, N], n_bias [N],
    out_proj [N, dim]. State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GRU(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      heads: number of heads H, by default one that is full. With heads, every recurrent matrix is
        block-diagonal, [H, N / H, N / H], and the state is that of `seqjax.cells.Headwise`.
    """

    _bias_start: ClassVar[Mapping[int, tuple[float, float]]] = {1: (1.0, 1.0)}
    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {"n_bias": _init.zeros}

    heads: int | None = None

    @property
    def cell(self) -> cells.Cell:
        """`seqjax.cells.GRU`, or one per head."""
        return self._in_heads(cells.GRU, self.heads)


@dataclasses.dataclass(frozen=True)
class LSTM(RNN):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate by Gers et al., 2000).

        u_i, u_f, u_g, u_o = x_t W_in + bias
        i_t, f_t, o_t = sigmoid(u_i + h_{t-1} W_i), and the same for f and o
        g_t = tanh(u_g + h_{t-1} W_g)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t)
        y_t = h_t W_out

    The matrices start uniform in +-1/sqrt(N), the bias of f at 1 (Jozefowicz et al., 2015), the
    other biases at 0.

    `layer_norm` is the layer-normalized LSTM (arXiv 1607.06450); see `seqjax.cells.LSTM`. It
    normalizes x_t W_in and h_{t-1} W over all gates, each with its own scale. It also normalizes
    c_t before the last tanh, with scale S_c and shift b_c. With heads, each head has its own
    statistics. Scales start at 1, b_c at 0. `bias` replaces the two shifts of the products.

    Parameters: in_proj [dim, 4 N], bias [4 N], W_i, W_f, W_g, W_o [N, N], out_proj [N, dim]; with
    `layer_norm` in_scale [4 N], S_i, S_f, S_g, S_o, S_c, b_c [N]. State: (c, h) as [B, N, 2].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LSTM(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8, 2))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      heads: number of heads H, by default one that is full. With heads, every recurrent matrix is
        block-diagonal, [H, N / H, N / H], and the state is that of `seqjax.cells.Headwise`.
      variant: a variant of A search space odyssey (arXiv 1503.04069); see `seqjax.cells.LSTM`, also
        for its parameters and its state.
      peepholes: whether the gates read the cell c, by vectors P_i, P_f, P_o [N].
      layer_norm: whether the products and the cell are normalized.
      norm_eps: constant added to the variances.
    """

    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {
        "b_c": _init.zeros,
        **dict.fromkeys(("S_i", "S_f", "S_g", "S_o", "S_c"), _init.ones),
    }

    heads: int | None = None
    variant: Variant | None = None
    peepholes: bool = False
    layer_norm: bool = False
    norm_eps: float = 1e-5

    def _gate_bias(self) -> Mapping[int, tuple[float, float]]:
        names = cells.LSTM(1, self.variant).names
        return {names.index("f"): (1.0, 1.0)} if "f" in names else {}

    @property
    def cell(self) -> cells.Cell:
        """`seqjax.cells.LSTM`, or one per head."""
        names = ("variant", "peepholes", "layer_norm", "norm_eps")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return self._in_heads(functools.partial(cells.LSTM, **options), self.heads)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params = dict(super().declare_params())
        if self.layer_norm:
            width = self.cell.gates * self.states
            params["in_scale"] = Param((width,), ("state",), "norm", _init.ones)
        return params

    def _from_input(self, params: Params, u: jax.Array) -> jax.Array:
        if not self.layer_norm:
            return u
        heads, one = self.heads or 1, jnp.ones((), u.dtype)
        # The statistics are those of all gates of a head.
        z = u.reshape(*u.shape[:2], self.cell.gates, heads, -1).swapaxes(2, 3)
        normed = layer_normalize(z.reshape(*z.shape[:3], -1), one, None, self.norm_eps)
        z = normed.reshape(z.shape).swapaxes(2, 3).reshape(u.shape)
        return z * params["in_scale"].astype(u.dtype)


@dataclasses.dataclass(frozen=True)
class ParaGRU(RNN):
    """The GRU of ParaRNN (arXiv 2510.21450), with a diagonal recurrence.

        u_z, u_r, u_n = x_t W_in + bias
        z_t = sigmoid(u_z + A_z * h_{t-1})
        r_t = sigmoid(u_r + A_r * h_{t-1})
        n_t = tanh(u_n + A_n * h_{t-1} * r_t)
        h_t = (1 - z_t) * h_{t-1} + z_t * n_t
        y_t = h_t W_out

    As in the authors' code, A_z, A_r and A_n start normal with standard deviation 2/sqrt(5 N). The
    bias of z, the gate that overwrites the state, starts evenly spaced from 0 down to -1, and the
    other biases at 0.

    Departures: W_in is a full matrix; the authors use a block-diagonal matrix over heads. The
    paper's block around the cell (convolution, gate) is not part of the layer.

    Parameters: in_proj [dim, 3 N], bias [3 N], A_z, A_r, A_n [N], out_proj [N, dim].
    State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = ParaGRU(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
    """

    _bias_start: ClassVar[Mapping[int, tuple[float, float]]] = {0: (0.0, -1.0)}

    @property
    def cell(self) -> cells.ParaGRU:
        """`seqjax.cells.ParaGRU`."""
        return cells.ParaGRU(self.states)


@dataclasses.dataclass(frozen=True)
class ParaLSTM(RNN):
    """The LSTM of ParaRNN (arXiv 2510.21450): diagonal, coupled gates, peepholes.

        u_f, u_g, u_o = x_t W_in + bias
        f_t = sigmoid(u_f + A_f * h_{t-1} + C_f * c_{t-1})
        g_t = tanh(u_g + A_g * h_{t-1})
        c_t = f_t * c_{t-1} + (1 - f_t) * g_t
        o_t = sigmoid(u_o + A_o * h_{t-1} + C_o * c_t)
        h_t = o_t * tanh(c_t)
        y_t = h_t W_out

    As in the authors' code, all A and C start normal with standard deviation 2/sqrt(5 N).

    Departures: the bias of f, the gate that keeps the state, starts evenly spaced from 0 up to 1,
    and the other biases at 0. In the authors' code it goes down to -1, which forgets sooner. W_in
    is a full matrix; the authors use a block-diagonal matrix over heads. The paper's block around
    the cell (convolution, gate) is not part of the layer.

    Parameters: in_proj [dim, 3 N], bias [3 N], A_f, A_g, A_o, C_f, C_o [N], out_proj [N, dim].
    State: (c, h) as [B, N, 2].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = ParaLSTM(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8, 2))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
    """

    _bias_start: ClassVar[Mapping[int, tuple[float, float]]] = {0: (0.0, 1.0)}

    @property
    def cell(self) -> cells.ParaLSTM:
        """`seqjax.cells.ParaLSTM`."""
        return cells.ParaLSTM(self.states)


@dataclasses.dataclass(frozen=True)
class SLSTM(RNN):
    """The sLSTM of xLSTM (arXiv 2405.04517), by default with one head per channel.

        u_i, u_f, u_z, u_o = x_t W_in + bias
        i_t = exp(u_i + R_i * h_{t-1})
        f_t = sigmoid(u_f + R_f * h_{t-1})
        z_t = tanh(u_z + R_z * h_{t-1})
        o_t = sigmoid(u_o + R_o * h_{t-1})
        c_t = f_t * c_{t-1} + i_t * z_t
        n_t = f_t * n_{t-1} + i_t
        h_t = o_t * c_t / n_t
        y_t = h_t W_out

    c and n are stored as multiples of exp(m), see `seqjax.cells.SLSTM`. The bias of f starts evenly
    spaced from 3 up to 6, one of two options of the authors' code, and the other biases at 0. All R
    start normal with standard deviation 2/sqrt(5 N); with `heads` uniform in +-1/sqrt(N / H).

    Departures: without `heads` each R is a vector, while the paper has a matrix per head. R does
    not start at 0 as in the authors' code. The paper's block around the cell (convolution, group
    norm, gated projection) is not part of the layer.

    Parameters: in_proj [dim, 4 N], bias [4 N], R_i, R_f, R_z, R_o [N], with `heads`
    [H, N / H, N / H], out_proj [N, dim].
    State: (c, n, h, m) as [B, N, 4], with `heads` as [B, H, 4 N / H].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = SLSTM(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8, 4))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      heads: number of heads H with a full recurrent matrix each, as in the paper: each R is
        [H, N / H, N / H], and the state is that of `seqjax.cells.Headwise`. By default R is a
        vector.
    """

    _bias_start: ClassVar[Mapping[int, tuple[float, float]]] = {1: (3.0, 6.0)}

    heads: int | None = None

    @property
    def cell(self) -> cells.Cell:
        """`seqjax.cells.SLSTM`, or one `DenseSLSTM` per head."""
        kind = cells.SLSTM if self.heads is None else cells.DenseSLSTM
        return self._in_heads(kind, self.heads)


@dataclasses.dataclass(frozen=True)
class LEM(RNN):
    """Long expressive memory (arXiv 2110.04744): two states, each with learned time steps.

        u_1, u_2, u_z, u_y = x_t W_in + bias
        s_t = dt * sigmoid(u_1 + y_{t-1} W_1)
        r_t = dt * sigmoid(u_2 + y_{t-1} W_2)
        z_t = (1 - s_t) * z_{t-1} + s_t * tanh(u_z + y_{t-1} W_z)
        y_t = (1 - r_t) * y_{t-1} + r_t * tanh(u_y + z_t W_y)
        out_t = y_t W_out

    The matrices start uniform in +-1/sqrt(N), as in the authors' code.

    Departures: biases start at 0; in the authors' code they start uniform like the matrices.

    Parameters: in_proj [dim, 4 N], bias [4 N], W_1, W_2, W_z, W_y [N, N], out_proj [N, dim].
    State: (y, z) as [B, N, 2].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LEM(dim=4, state_dim=8, dt=0.5)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8, 2))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      dt: the largest time step, in (0, 1].
    """

    dt: float = 1.0

    @property
    def cell(self) -> cells.LEM:
        """`seqjax.cells.LEM`."""
        return cells.LEM(self.states, self.dt)


@dataclasses.dataclass(frozen=True)
class LTC(RNN):
    """Liquid time-constant network (arXiv 2006.04439), with one step of its fused solver.

        u_t = x_t W_in + bias
        f_t = sigmoid(u_t + h_{t-1} W)
        h_t = (h_{t-1} + dt * f_t * A) / (1 + dt * (1 / tau + f_t))          tau = exp(log_tau)
        y_t = h_t W_out

    W starts uniform in +-1/sqrt(N), A standard normal, tau uniform in [1, 10], the bias at 0.

    Departures: one solver step per input and a sigmoid, see `seqjax.cells.LTC`. The paper does not
    specify the initialization.

    Parameters: in_proj [dim, N], bias [N], W [N, N], A, log_tau [N], out_proj [N, dim].
    State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LTC(dim=4, state_dim=8, dt=0.5)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      dt: the solver's step, positive.
    """

    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {
        "A": _init.normal(1.0),
        "log_tau": _init.log_uniform_of(1.0, 10.0),
    }

    dt: float = 1.0

    @property
    def cell(self) -> cells.LTC:
        """`seqjax.cells.LTC`."""
        return cells.LTC(self.states, self.dt)
