"""MinGRU and MinLSTM: the GRU and the LSTM without dependence of the gates on the state."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._gated import Gated, project, project_out, recur
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class MinGRU(Gated):
    """Minimal GRU (arXiv 2410.01201).

        z_t = sigmoid(x_t W_z)
        h_t = (1 - z_t) * h_{t-1} + z_t * g(x_t W_h)
        y_t = h_t W_out                                    y_t = h_t if state_dim = dim

    with g(u) = u + 0.5 for u >= 0 and sigmoid(u) below, or the identity if `positive` is False.

    Departures: the authors compute logarithms of positive states with a cumulative logsumexp. Here
    the recurrence runs on the states themselves, which keeps more digits and needs no positive g.
    The state starts at 0. Projections start normal with variance 1/fan_in.

    Parameters: gate_proj, hidden_proj [dim, N]; out_proj [N, dim] if N != dim. State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MinGRU(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim: features of input and output.
      state_dim: channels N; by default dim.
      positive: whether g keeps the states positive, as in the authors' parallel form.
    """

    positive: bool = True

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = self._inward()
        return {"gate_proj": inward, "hidden_proj": inward, **self._outward_if_needed()}

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        gate = project(x, params["gate_proj"])
        candidate = _candidate(project(x, params["hidden_proj"]), self.positive)
        h, state = recur(jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * candidate, state, context)
        return project_out(h, params, x), state


@dataclasses.dataclass(frozen=True)
class MinLSTM(Gated):
    """Minimal LSTM (arXiv 2410.01201), with gates that add up to 1.

        f_t, i_t = sigmoid(x_t W_f), sigmoid(x_t W_i)
        h_t = f_t / (f_t + i_t) * h_{t-1} + i_t / (f_t + i_t) * g(x_t W_h)
        y_t = h_t W_out                                    y_t = h_t if state_dim = dim

    with g as in `MinGRU`.

    Departures: those of `MinGRU`. The authors' parallel form applies g to a state that continues an
    earlier call once more; here a continued call computes the same numbers as a single call.

    Parameters: forget_proj, input_proj, hidden_proj [dim, N]; out_proj [N, dim] if N != dim.
    State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MinLSTM(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim: features of input and output.
      state_dim: channels N; by default dim.
      positive: whether g keeps the states positive, as in the authors' parallel form.
    """

    positive: bool = True

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = self._inward()
        return {
            "forget_proj": inward,
            "input_proj": inward,
            "hidden_proj": inward,
            **self._outward_if_needed(),
        }

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        log_forget, log_input = (
            jax.nn.log_sigmoid(project(x, params[name])) for name in ("forget_proj", "input_proj")
        )
        candidate = _candidate(project(x, params["hidden_proj"]), self.positive)
        gate = log_forget - log_input  # f / (f + i) = sigmoid(log f - log i)
        h, state = recur(jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate) * candidate, state, context)
        return project_out(h, params, x), state


def _candidate(u: jax.Array, positive: bool) -> jax.Array:
    return jnp.where(u >= 0, u + 0.5, jax.nn.sigmoid(u)) if positive else u
