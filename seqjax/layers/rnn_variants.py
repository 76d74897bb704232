"""Nonlinear RNNs with fewer parameters (IndRNN, MGU), and of dynamical systems (the others)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from seqjax import cells
from seqjax.layers import _init
from seqjax.layers._base import Initializer
from seqjax.layers._rnn import RNN


@dataclasses.dataclass(frozen=True)
class IndRNN(RNN):
    """Independently recurrent neural network (arXiv 1803.04831).

        u_t = x_t W_in + bias
        h_t = activation(u_t + w * h_{t-1})
        y_t = h_t W_out

    w starts uniform in [0, 1], as for all but the paper's last layer, and the bias at 0.

    Departures: the paper limits |w| to 2^(1/T) for sequences of T steps; here w is not limited.

    Parameters: in_proj [dim, N], bias [N], w [N], out_proj [N, dim]. State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = IndRNN(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      activation: 'relu' or 'tanh'.
    """

    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {"w": _init.uniform(0.0, 1.0)}

    activation: Literal["relu", "tanh"] = "relu"

    @property
    def cell(self) -> cells.IndRNN:
        """`seqjax.cells.IndRNN`."""
        return cells.IndRNN(self.states, self.activation)


@dataclasses.dataclass(frozen=True)
class MGU(RNN):
    """Minimal gated unit (arXiv 1603.09420).

        u_f, u_n = x_t W_in + bias
        f_t = sigmoid(u_f + h_{t-1} W_f)
        n_t = tanh(u_n + (f_t * h_{t-1}) W_n)
        h_t = (1 - f_t) * h_{t-1} + f_t * n_t
        y_t = h_t W_out

    The matrices start uniform in +-1/sqrt(N) and the biases at 0.

    Departures: the paper does not specify the initialization.

    Parameters: in_proj [dim, 2 N], bias [2 N], W_f, W_n [N, N], out_proj [N, dim]. State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MGU(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
    """

    @property
    def cell(self) -> cells.MGU:
        """`seqjax.cells.MGU`."""
        return cells.MGU(self.states)


@dataclasses.dataclass(frozen=True)
class PLRNN(RNN):
    """Piecewise-linear RNN (Durstewitz, 2017, arXiv 1612.07846).

        u_t = x_t W_in + bias
        h_t = a * h_{t-1} + relu(h_{t-1}) W + u_t
        y_t = h_t W_out

    a starts uniform in [0, 0.5], W normal with standard deviation 0.01, the bias at 0, so that
    states are bounded at the start. States can explode in training on chaotic systems. The layer
    has no teacher forcing: for it wrap the cell `seqjax.cells.PLRNN` in
    `seqjax.methods.TeacherForced`, and run it with `seqjax.nonlinear_scan`.

    Departures: see `seqjax.cells.PLRNN`. The paper does not specify the initialization.

    Parameters: in_proj [dim, N], bias [N], a [N], W [N, N], out_proj [N, dim]. State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = PLRNN(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
    """

    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {
        "a": _init.uniform(0.0, 0.5),
        "W": _init.normal(0.01),
    }

    @property
    def cell(self) -> cells.PLRNN:
        """`seqjax.cells.PLRNN`."""
        return cells.PLRNN(self.states)


@dataclasses.dataclass(frozen=True)
class LeakyRNN(RNN):
    """Leaky integrator units with trained time constants (Jaeger et al., 2007; arXiv 1804.11188).

        u_t = x_t W_in + bias
        a = exp(-1 / tau)                                                  tau = exp(log_tau)
        h_t = a * h_{t-1} + (1 - a) * tanh(u_t + h_{t-1} W)
        y_t = h_t W_out

    W starts uniform in +-1/sqrt(N), tau uniform in [1, 100] steps, the bias at 0.

    Departures: a is the exact solution over one step, see `seqjax.cells.LeakyRNN`.

    Parameters: in_proj [dim, N], bias [N], W [N, N], log_tau [N], out_proj [N, dim].
    State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LeakyRNN(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
    """

    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {
        "log_tau": _init.log_uniform_of(1.0, 100.0)
    }

    @property
    def cell(self) -> cells.LeakyRNN:
        """`seqjax.cells.LeakyRNN`."""
        return cells.LeakyRNN(self.states)


@dataclasses.dataclass(frozen=True)
class CoRNN(RNN):
    """Coupled oscillatory RNN (arXiv 2010.00951).

        u_t = x_t W_in + bias
        z_t = z_{t-1} + dt * (tanh(u_t + y_{t-1} W_y + z_{t-1} W_z) - gamma * y_{t-1}
                              - epsilon * z_{t-1})
        y_t = y_{t-1} + dt * z_t
        out_t = y_t W_out

    The matrices start uniform in +-1/sqrt(N) and the bias at 0.

    Departures: the authors' code starts matrices and bias uniform in +-1/sqrt(dim + 2 N).

    Parameters: in_proj [dim, N], bias [N], W_y, W_z [N, N], out_proj [N, dim]. State: (y, z) as
    [B, N, 2].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = CoRNN(dim=4, state_dim=8, dt=0.1, gamma=1.0, epsilon=2.0)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8, 2))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      dt: time step, positive. The defaults of dt, gamma and epsilon are the authors' values for
        sequential MNIST. For permuted MNIST they use 0.076, 0.4 and 8.
      gamma: squared frequency of the oscillators, not negative.
      epsilon: damping, not negative.
    """

    dt: float = 0.042
    gamma: float = 2.7
    epsilon: float = 4.7

    @property
    def cell(self) -> cells.CoRNN:
        """`seqjax.cells.CoRNN`."""
        return cells.CoRNN(self.states, self.dt, self.gamma, self.epsilon)


@dataclasses.dataclass(frozen=True)
class UnICORNN(RNN):
    """Undamped independent controlled oscillatory RNN (arXiv 2103.05487).

        u_t = x_t W_in + bias
        s = dt * sigmoid(c)
        z_t = z_{t-1} - s * (tanh(u_t + w * y_{t-1}) + alpha * y_{t-1})
        y_t = y_{t-1} + s * z_t
        out_t = y_t W_out

    As in the authors' code, w starts uniform in [0, 1], c uniform in [-0.1, 0.1], and the bias at
    0.

    Departures: projections start normal with variance 1/fan_in; the authors draw them 8 times
    smaller. The authors stack several recurrences without W_out.

    Parameters: in_proj [dim, N], bias [N], w, c [N], out_proj [N, dim]. State: (y, z) as [B, N, 2].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = UnICORNN(dim=4, state_dim=8, dt=0.1, alpha=1.0)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8, 2))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      dt: largest time step, positive. The defaults are those of the authors for permuted MNIST.
      alpha: squared frequency of the oscillators without w, not negative.
    """

    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {
        "w": _init.uniform(0.0, 1.0),
        "c": _init.uniform(-0.1, 0.1),
    }

    dt: float = 0.19
    alpha: float = 30.65

    @property
    def cell(self) -> cells.UnICORNN:
        """`seqjax.cells.UnICORNN`."""
        return cells.UnICORNN(self.states, self.dt, self.alpha)
