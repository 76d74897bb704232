"""LMU: a memory of the last steps as coefficients of Legendre polynomials."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from seqjax.layers import _checks
from seqjax.layers._base import State
from seqjax.layers._legendre import LegendreLayer
from seqjax.layers.context import Context
from seqjax.ops.elementwise.block_scan import block_scan


@dataclasses.dataclass(frozen=True)
class LMU(LegendreLayer):
    """Legendre memory unit in its parallel form (arXiv 2102.11417; LMUFormer, 2402.04882).

        u_t = relu(x_t W_u + b_u)                         [channels]
        m_t = Abar m_{t-1} + Bbar u_t                     [state_dim] for each channel
        y_t = relu([m_t, x_t] W_y + b_y)

        A_ij = (2i + 1) / window * (-1 if i < j else (-1)^(i - j + 1))
        B_i = (2i + 1) / window * (-1)^i

    m holds the coefficients of Legendre polynomials that approximate u over the last `window`
    steps. Abar and Bbar are the zero-order hold of A and B for a step of 1. They are constants, and
    are computed once in float64. A is never diagonalized: its eigenvectors are too close to
    dependent, with a condition of 3e15 at state_dim=32.

    Departures: the first LMU (Voelker et al. 2019) feeds y back into u and has no parallel form.
    Weights start normal with variance 1/fan_in, biases as zeros.

    The US patent application 15/243,223 names the LMU. Check it before commercial use.

    Parameters: in_proj [dim, channels]; in_bias [channels]; out_proj [channels * N + dim, dim];
    out_bias [dim]; N = state_dim. State: [B, channels, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LMU(dim=4, state_dim=8, window=16.0)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 1, 8))

    Attributes:
      dim: features of input and output.
      state_dim: coefficients N of a memory.
      channels: number of memories.
      window: the steps that a memory covers.
    """

    window: float = 128.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.above_zero(self, window=self.window)

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.channels, self.state_dim), dtype)

    def remember(self, u: jax.Array, state: State, context: Context) -> tuple[jax.Array, State]:
        A, B = (jnp.asarray(v, u.dtype) for v in _zero_order_hold(self.state_dim, self.window))
        # The channels are columns that share one block.
        memory, state = block_scan(
            A[None],
            (B[:, None] * u[:, :, None])[:, :, None],
            state.mT[:, None],
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        return memory[:, :, 0].mT, state[:, 0].mT


@functools.lru_cache(maxsize=32)
def _zero_order_hold(size: int, window: float) -> tuple[np.ndarray, np.ndarray]:
    """Return Abar [N, N] and Bbar [N], from exp([[A, B], [0, 0]])."""
    i, j = np.arange(size)[:, None], np.arange(size)
    A = np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    both = np.zeros((size + 1, size + 1))
    both[:size] = np.append(A, (-1.0) ** i, axis=1) * (2 * i + 1) / window
    exact = linalg.expm(both)
    return exact[:size, :size], exact[:size, size]
