"""sLSTM: the LSTM with an exponential input gate and a normaliser."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.cells._base import Bounds, Cell, Params, Recurrent, Structure


@dataclasses.dataclass(frozen=True)
class SLSTM(Cell):
    """The sLSTM of xLSTM (arXiv 2405.04517), with its stabiliser m.

        log i = u_i + R_i * h
        log f = log(sigmoid(u_f + R_f * h))
        z = tanh(u_z + R_z * h)
        o = sigmoid(u_o + R_o * h)
        m' = max(log f + m, log i)
        c' = exp(log f + m - m') * c + exp(log i - m') * z
        n' = exp(log f + m - m') * n + exp(log i - m')
        h' = o * c' / n'

    c and n are the sums of the paper times exp(-m), so that no exponential overflows. h does not
    depend on m. n = 0 marks the initial state, where nothing has been summed yet. Then m' = log i,
    independent of m, as in the authors' code. After the first step n >= 1 and |c| <= n.

    Departures: R is a vector, with one head per channel; the paper has one full matrix per head:
    `Headwise(DenseSLSTM(D // H), H)`. A vector makes the Jacobian block-diagonal. The paper's
    forget gate is exp or sigmoid; this cell uses the sigmoid, as in the authors' code. The block
    around the cell (convolution, group norm, gated projection) is not part of it.

    Parameters: R_i, R_f, R_z, R_o [D]. u [4, D] in the order i, f, z, o. State: (c, n, h, m) as
    [D, 4]; a layer reads h. Jacobian: blocks of 4 x 4. Bounds: n >= 0 and |h| <= 1. The latter
    holds after any step from a state with |c| <= n, which includes the zero state. c and m are
    unbounded.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = SLSTM(dim=3)
      >>> params = dict.fromkeys(("R_i", "R_f", "R_z", "R_o"), jnp.ones(3))
      >>> cell(params, jnp.zeros((3, 4)), jnp.ones((4, 3))).shape
      (3, 4)

    Attributes:
      dim: channels D.
    """

    dim: int
    gates: ClassVar[int] = 4
    width: ClassVar[int] = 4
    structure: ClassVar[Structure] = "block"
    recurrent: ClassVar[Recurrent] = dict.fromkeys(("R_i", "R_f", "R_z", "R_o"), "vector")

    def __call__(self, params: Params, h: jax.Array, u: jax.Array) -> jax.Array:
        """Return the next state, from (c, n, h, m) [D, 4] and u [4, D]."""
        c, n, h, m = (h[:, j] for j in range(4))
        log_i = u[0] + self._product(h, params["R_i"])
        log_f = jax.nn.log_sigmoid(u[1] + self._product(h, params["R_f"]))
        z = jnp.tanh(u[2] + self._product(h, params["R_z"]))
        o = jax.nn.sigmoid(u[3] + self._product(h, params["R_o"]))
        # The logarithm of the weight of the earlier sums; -inf if nothing has been summed.
        kept = jnp.where(n == 0, -jnp.inf, log_f + m)
        m = jnp.maximum(kept, log_i)
        keep, add = jnp.exp(kept - m), jnp.exp(log_i - m)
        c, n = keep * c + add * z, keep * n + add
        return jnp.stack([c, n, o * c / n, m], axis=-1)

    def _product(self, h: jax.Array, R: jax.Array) -> jax.Array:
        return R * h

    def bounds(self, params: Params) -> Bounds:
        """Return n >= 0, h in [-1, 1], and no bounds for c and m."""
        inf, dtype = np.inf, params["R_i"].dtype  # NumPy, because of `jax.debug_infs`
        return np.array([-inf, 0, -1, -inf], dtype), np.array([inf, inf, 1, inf], dtype)

    def output(self, h: jax.Array) -> jax.Array:
        """Return h from (c, n, h, m)."""
        return h[..., 2]


@dataclasses.dataclass(frozen=True)
class DenseSLSTM(SLSTM):
    """The sLSTM of xLSTM (arXiv 2405.04517) with full recurrent matrices: one head of the paper.

    The equations are those of `SLSTM` with h R in place of R * h.

    Parameters: R_i, R_f, R_z, R_o [D, D]. u [4, D] in the order i, f, z, o. State: (c, n, h, m) as
    [D, 4]. Jacobian: dense. Bounds: those of `SLSTM`.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = DenseSLSTM(dim=3)
      >>> params = dict.fromkeys(("R_i", "R_f", "R_z", "R_o"), jnp.eye(3))
      >>> cell(params, jnp.zeros((3, 4)), jnp.ones((4, 3))).shape
      (3, 4)

    Attributes:
      dim: channels D.
    """

    structure: ClassVar[Structure] = "dense"
    recurrent: ClassVar[Recurrent] = dict.fromkeys(("R_i", "R_f", "R_z", "R_o"), "matrix")

    def _product(self, h: jax.Array, R: jax.Array) -> jax.Array:
        return h @ R
