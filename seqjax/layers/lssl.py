"""LSSL: a dense state space for each channel, constant in time."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._legendre import legs_transition
from seqjax.layers._math import dense, merge_heads
from seqjax.layers.context import Context
from seqjax.ops.core.linalg import matmul
from seqjax.ops.elementwise.block_scan import block_scan


@dataclasses.dataclass(frozen=True)
class LSSL(Layer):
    """Linear state-space layer LSSL with HiPPO-LegS (arXiv 2110.13985).

        h_t = (I + s/2 A)^-1 ((I - s/2 A) h_{t-1} + s B x_t)              [N] for each channel
        z_t = C h_t + D x_t                                               [outputs] for each channel
        y_t = gelu(z_t) W_o + b_o

        A_ij = sqrt((2i + 1)(2j + 1)) for i > j,  i + 1 for i = j,  0 otherwise
        B_i = sqrt(2i + 1)

    s = exp(log_step) is the step of a channel in the bilinear rule, log-uniform in [dt_min, dt_max]
    at the start. C and D start standard normal, W_o normal with variance 1/fan_in, b_o at zero.

    A is not diagonalized, because its eigenvectors are nearly linearly dependent. Their condition
    number is 8e10 at state_dim=16. A step costs dim * N^2 operations, and the states of all steps
    take B * T * dim * N numbers of memory. `S4D(spectrum="legs")` is a cheaper diagonal
    approximation.

    Departures: A and B are constants, as in the paper's LSSL-fixed, but the steps s are trained.
    The paper also trains A. The paper computes a convolution; this layer computes the recurrence,
    so that it has a state.

    Parameters: log_step [dim]; C [dim, outputs, N]; D [dim, outputs]; out_proj [dim * outputs,
    dim]; out_bias [dim]; N = state_dim. State: [B, dim, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LSSL(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 4, 8))

    Attributes:
      dim: features of input and output.
      state_dim: states N per channel.
      outputs: features that are read from the states of a channel.
      dt_min: smallest step size at initialization.
      dt_max: largest step size at initialization.
    """

    dim: int
    state_dim: int = 64
    outputs: int = 1
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.state_dim, outputs=self.outputs)
        _checks.require(
            self,
            0 < self.dt_min < self.dt_max,
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {self.dt_min} and"
            f" {self.dt_max}.",
        )

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, outputs = self.dim, self.outputs
        step = _init.uniform(math.log(self.dt_min), math.log(self.dt_max))
        return {
            "log_step": Param((dim,), ("embed",), "recurrence", step),
            "C": Param(
                (dim, outputs, self.state_dim),
                ("embed", None, "state"),
                "recurrence",
                _init.normal(1.0),
            ),
            "D": Param((dim, outputs), ("embed", None), "bias", _init.normal(1.0)),
            "out_proj": Param(
                (dim * outputs, dim), ("mlp", "embed"), "weight", _init.fan_in_normal
            ),
            "out_bias": Param((dim,), ("embed",), "bias", _init.zeros),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.dim, self.state_dim), dtype)

    def state_flops(self) -> int:
        # For each state: 2 N for the transition, 2 for the input, and 2 for each output.
        return 2 * self.dim * self.state_dim * (self.state_dim + 1 + self.outputs)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        inverse_step = jnp.exp(-params["log_step"].astype(wide))[:, None]
        transition, weights = legs_transition(inverse_step, self.state_dim)
        u = x.astype(wide)[..., None]
        h, state = block_scan(
            transition,
            weights * u,
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        z = matmul(params["C"].astype(wide), h[..., None])[..., 0] + params["D"].astype(wide) * u
        z = jax.nn.gelu(merge_heads(z)).astype(x.dtype)
        return dense(z, params["out_proj"], params["out_bias"]), state
