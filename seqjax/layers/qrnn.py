"""QRNN and QuasiLSTM: LSTM-like gates from the input, and from the previous input for the QRNN."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._gated import Gated, project, project_out, recur
from seqjax.layers.context import Context
from seqjax.layers.token_shift import initial_shift, shift


@dataclasses.dataclass(frozen=True)
class QRNN(Gated):
    """Quasi-recurrent neural network with fo-pooling and a window of two (arXiv 1611.01576).

        u_z, u_f, u_o = x_t W + x_{t-1} W_previous + bias                 x_0 = 0
        c_t = sigmoid(u_f) * c_{t-1} + (1 - sigmoid(u_f)) * tanh(u_z)
        h_t = sigmoid(u_o) * c_t
        y_t = h_t W_out                                    y_t = h_t if state_dim = dim

    x_{t-1} is zero where `reset` is true.

    Departures: the published code exchanges the roles of f and 1 - f. The paper's zoneout is not
    part of the layer. Projections start normal with variance 1/fan_in, where fan_in = 2 dim for W
    and W_previous; biases start at 0.

    Parameters: in_proj, previous_proj [dim, 3 N], bias [3 N], in the order z, f, o; out_proj
    [N, dim] if N != dim. State: {"shift": [B, 1, dim], the last input, "hidden": c [B, N]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = QRNN(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state["hidden"].shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim: features of input and output.
      state_dim: channels N; by default dim.
    """

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param(
            (self.dim, 3 * self.states),
            ("embed", "state"),
            "weight",
            _init.normal((2 * self.dim) ** -0.5),
        )
        return {
            "in_proj": inward,
            "previous_proj": inward,
            "bias": Param((3 * self.states,), ("state",), "recurrence", _init.zeros),
            **self._outward_if_needed(),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return {
            "shift": initial_shift(batch_size, self.dim, dtype),
            "hidden": super().make_state(batch_size, dtype),
        }

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        previous, last = shift(x, state["shift"], context)
        u = project(x, params["in_proj"], params["bias"]) + project(
            previous, params["previous_proj"]
        )
        candidate, forget, out = jnp.split(u, 3, axis=-1)
        c, hidden = recur(
            jax.nn.sigmoid(forget),
            jax.nn.sigmoid(-forget) * jnp.tanh(candidate),
            state["hidden"],
            context,
        )
        y = project_out(jax.nn.sigmoid(out) * c, params, x)
        return y, {"shift": last, "hidden": hidden}


@dataclasses.dataclass(frozen=True)
class QuasiLSTM(Gated):
    """Quasi-LSTM of the Languini Kitchen (arXiv 2309.11197): an LSTM with gates from the input.

        u_f, u_i, u_z, u_o = x_t W + bias
        c_t = sigmoid(u_f) * c_{t-1} + sigmoid(u_i) * tanh(u_z)
        h_t = sigmoid(u_o) * tanh(c_t)
        y_t = h_t W_out + out_bias

    The gates i and f are independent, so |c| can grow with the number of steps.

    Departures: the authors' heads only reshape the channels, so there are none here. The bias of f
    starts at 1 in place of a constant 1 added to it; the other biases start at 0. Projections start
    normal with variance 1/fan_in; the authors use a standard deviation of 0.02.

    Parameters: in_proj [dim, 4 N], bias [4 N], in the order f, i, z, o; out_proj [N, dim],
    out_bias [dim]. State: c [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = QuasiLSTM(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim: features of input and output.
      state_dim: channels N; by default dim.
    """

    def declare_params(self) -> Mapping[str, Param | Layer]:
        width = 4 * self.states
        return {
            "in_proj": Param((self.dim, width), ("embed", "state"), "weight", _init.fan_in_normal),
            "bias": Param((width,), ("state",), "recurrence", self._draw_bias),
            "out_proj": self._outward(),
            "out_bias": Param((self.dim,), ("embed",), "bias", _init.zeros),
        }

    def _draw_bias(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        return jnp.zeros(shape, dtype).at[: self.states].set(1)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        u = project(x, params["in_proj"], params["bias"])
        forget, write, candidate, out = jnp.split(u, 4, axis=-1)
        c, state = recur(
            jax.nn.sigmoid(forget), jax.nn.sigmoid(write) * jnp.tanh(candidate), state, context
        )
        y = project_out(jax.nn.sigmoid(out) * jnp.tanh(c), params, x)
        return y + params["out_bias"].astype(x.dtype), state
