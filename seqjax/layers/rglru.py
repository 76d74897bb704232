"""RGLRU: the recurrent block of Hawk and Griffin."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._gated import Gated, project, project_out, recur
from seqjax.layers._math import block_dense
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv


@dataclasses.dataclass(frozen=True)
class RGLRU(Gated):
    """Real-gated linear recurrent unit in the block of Hawk and Griffin (arXiv 2402.19427).

        u_t = conv(x W_x + b_x)_t                                         [N]
        r_t, i_t = sigmoid(u_t A_r + c_r), sigmoid(u_t A_i + c_i)         A block-diagonal
        log a_t = -8 r_t * softplus(Lambda)
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * u_t
        y_t = (gelu(x_t W_y + b_y) * h_t) W_out + b_out

    The convolution has a bias and no activation; gelu is its tanh approximation. Griffin is a
    `Backbone` of two such layers and one `SlidingWindowAttention` in turn, with gated MLPs.

    As in the authors' code, exp(-softplus(Lambda)) starts uniform by area on the ring from 0.9 to
    0.999 and the taps of the convolution normal with variance 0.01 / conv_size. Other projections
    start normal with variance 1/fan_in, biases at 0.

    Departures: in the authors' code the first step of a document has 1 in place of
    sqrt(1 - a_t^2). Set `unit_first_step` for weights that were trained this way, such as those of
    RecurrentGemma. The authors bound the derivative of the square root for bfloat16; here it is
    computed in float32 and not bounded.

    Parameters: in_proj, gate_proj [dim, N], in_bias, gate_bias [N] (of W_x and W_y); conv (a
    `ShortConv`); recurrence_gate, input_gate [heads, N / heads, N / heads];
    recurrence_gate_bias, input_gate_bias, Lambda [N]; out_proj [N, dim]; out_bias [dim].
    State: {"conv": [B, conv_size - 1, N], "hidden": [B, N]}, with `unit_first_step` also
    {"started": [B] bool}, False before the first step.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = RGLRU(dim=4, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state["hidden"].shape
      ((2, 5, 4), (2, 4), (2, 4))

    Attributes:
      dim: features of input and output.
      state_dim: channels of the recurrence N; by default dim.
      heads: blocks of the gates' projections A_r and A_i, a divisor of N.
      conv_size: taps of the short convolution.
      unit_first_step: whether the input has weight 1 at the first step and at resets.
    """

    heads: int = 1
    conv_size: int = 4
    unit_first_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive(self, heads=self.heads, conv_size=self.conv_size)
        _checks.require(
            self,
            self.states % self.heads == 0,
            f"`state_dim` must be a multiple of `heads`, got state_dim={self.states},"
            f" heads={self.heads}.",
        )

    @property
    def _conv(self) -> ShortConv:
        return ShortConv(self.states, self.conv_size, bias=True, channel_axis="state")

    def declare_params(self) -> Mapping[str, Param | Layer]:
        size = self.states // self.heads
        gate = Param((self.heads, size, size), ("heads", None, None), "weight", _init.fan_in_normal)
        bias = Param((self.states,), ("state",), "bias", _init.zeros)
        return {
            "in_proj": self._inward(),
            "in_bias": bias,
            "gate_proj": self._inward(),
            "gate_bias": bias,
            "conv": self._conv,
            "recurrence_gate": gate,
            "recurrence_gate_bias": self._bias(),
            "input_gate": gate,
            "input_gate_bias": self._bias(),
            "Lambda": self._bias(_ring),
            "out_proj": self._outward(),
            "out_bias": Param((self.dim,), ("embed",), "bias", _init.zeros),
        }

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Draw the parameters; see `Layer.init`."""
        params = super().init(key, dtype)
        taps = params["conv"]["weight"]
        key = jax.random.fold_in(key, 1)
        draw = _init.normal(0.1 * self.conv_size**-0.5)
        params["conv"]["weight"] = draw(key, taps.shape, taps.dtype)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = {
            "conv": self._conv.make_state(batch_size, dtype),
            "hidden": super().make_state(batch_size, dtype),
        }
        if self.unit_first_step:
            state["started"] = jnp.zeros((batch_size,), jnp.bool_)
        return state

    def state_flops(self) -> int:
        return 10 * self.states  # decay 3, weight of the input 4, recurrence 2, output gate 1

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide, new_state = state_dtype(x.dtype), {}
        u = project(x, params["in_proj"], params["in_bias"]).astype(x.dtype)
        u, new_state["conv"] = self._conv.forward(params["conv"], u, state["conv"], context)
        r, i = (
            jax.nn.sigmoid(
                block_dense(u, params[name]).astype(wide) + params[f"{name}_bias"].astype(wide)
            )
            for name in ("recurrence_gate", "input_gate")
        )
        log_decay = -8 * r * jax.nn.softplus(params["Lambda"].astype(wide))
        # expm1 keeps 1 - a^2 exact for a near 1.
        weight = jnp.sqrt(-jnp.expm1(2 * log_decay))
        if self.unit_first_step:
            first = _first_steps(state["started"], x.shape[1], context)
            weight = jnp.where(first[..., None], jnp.ones_like(weight), weight)
            # Always True, but not a constant, which would not be sharded like the batch.
            started = jnp.any(first, axis=1) | state["started"]
            new_state["started"] = (
                started if context.sequence_axis is None else jnp.ones_like(state["started"])
            )
        h, new_state["hidden"] = recur(
            jnp.exp(log_decay), weight * i * u.astype(wide), state["hidden"], context
        )
        gate = project(x, params["gate_proj"], params["gate_bias"])
        y = project_out(jax.nn.gelu(gate, approximate=True) * h, params, x)
        return y + params["out_bias"].astype(x.dtype), new_state


def _first_steps(started: jax.Array, length: int, context: Context) -> jax.Array:
    """Return [B, T] bool: the first step of a sequence that has not started, and all resets."""
    fresh = ~started
    if context.sequence_axis is not None:
        fresh = fresh & (lax.axis_index(context.sequence_axis) == 0)
    first = fresh[:, None] & (jnp.arange(length) == 0)
    return first if context.reset is None else first | context.reset


def _ring(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw Lambda with exp(-softplus(Lambda)) uniform by area on the ring from 0.9 to 0.999."""
    low, high = 0.9**2, 0.999**2
    softplus = -0.5 * jnp.log(jax.random.uniform(key, shape, dtype, low, high))
    return jnp.log(jnp.expm1(softplus))
