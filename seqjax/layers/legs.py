"""HiPPO-LegS: a memory of the whole past as coefficients of Legendre polynomials."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers._base import State
from seqjax.layers._legendre import LegendreLayer, legs_transition
from seqjax.layers.context import Context
from seqjax.ops.elementwise.block_scan import block_scan
from seqjax.ops.elementwise.linear_scan import linear_scan


@dataclasses.dataclass(frozen=True)
class LegS(LegendreLayer):
    """Scaled Legendre memory HiPPO-LegS, which varies in time (arXiv 2008.07669).

        u_t = relu(x_t W_u + b_u)                                         [channels]
        m_t = (I + A/2k)^-1 ((I - A/2k) m_{t-1} + B u_t / k)              [state_dim] per channel
        y_t = relu([m_t, x_t] W_y + b_y)

        A_ij = sqrt((2i + 1)(2j + 1)) for i > j,  i + 1 for i = j,  0 else
        B_i = sqrt(2i + 1)

    k is the number of the step since the start or the last reset, from 1. m holds the coefficients
    of Legendre polynomials that approximate u over all those steps. The memory has no time scale:
    a slower input gives the same coefficients.

    The transition is a matrix [state_dim, state_dim] for every step of every sequence, which takes
    B * T * state_dim^2 numbers of memory. A constant approximation is `S4D(spectrum="legs")`.

    Departures: the paper puts the memory into a nonlinear gated RNN. Here it stands alone, with the
    input and output maps of the parallel LMU. k is exact up to 2^24 steps in float32.

    Parameters: in_proj [dim, channels]; in_bias [channels]; out_proj [channels * N + dim, dim];
    out_bias [dim]; N = state_dim. State: {"memory": [B, channels, N], "steps": [B, 1]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LegS(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 4), (2, 4), (2, 1, 8))

    Attributes:
      dim: features of input and output.
      state_dim: coefficients N of a memory.
      channels: number of memories.
    """

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return {
            "memory": jnp.zeros((batch_size, self.channels, self.state_dim), dtype),
            "steps": jnp.zeros((batch_size, 1), dtype),
        }

    def remember(self, u: jax.Array, state: State, context: Context) -> tuple[jax.Array, State]:
        options: dict[str, Any] = {"reset": context.reset, "sequence_axis": context.sequence_axis}
        one = jnp.ones((1,), u.dtype)
        steps, last = linear_scan(one, jnp.ones_like(u[..., :1]), state["steps"], **options)
        A, B = legs_transition(jax.lax.stop_gradient(steps), self.state_dim)
        memory, found = block_scan(
            A[:, :, None],
            (B[..., None] * u[:, :, None])[:, :, None],
            state["memory"].mT[:, None],
            **options,
        )
        return memory[:, :, 0].mT, {"memory": found[:, 0].mT, "steps": last}
