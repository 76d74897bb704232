"""LinOSS: linear oscillatory state spaces."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import complex_dense, gelu_glu, real_of_dense
from seqjax.layers.context import Context
from seqjax.ops.elementwise.block_scan import block_scan


@dataclasses.dataclass(frozen=True)
class LinOSS(Layer):
    """Linear oscillatory state space LinOSS (arXiv 2410.03943).

        A = relu(A_diag),   s = sigmoid(step),   u_t = x_t B         [state_dim], u complex

        implicit, with Q = 1 / (1 + s^2 A):
          z_t = Q (z_{t-1} + s u_t - s A w_{t-1})
          w_t = w_{t-1} + s z_t
        implicit-explicit:
          z_t = z_{t-1} - s A w_{t-1} + s u_t
          w_t = w_{t-1} + s z_t

        y_t = Re(w_t C) + D * x_t

    z and w are the velocities and positions of state_dim oscillators. The implicit form damps them:
    its eigenvalues have |lambda|^2 = Q. The implicit-explicit form keeps their energy, and grows
    if s^2 A > 4, which does not happen at the start. Each oscillator is a block of 2 x 2 numbers,
    because it has no stable diagonal form for small A.

    A_diag and step start uniform in [0, 1], B and C uniform in +-dim^-0.5 and +-state_dim^-0.5 per
    part, D standard normal.

    Departures: `output_glu` makes the gelu and gated linear unit after the layer optional.

    Parameters: A_diag, step [state_dim]; B [2, dim, state_dim], C [2, state_dim, dim], real and
    imaginary part first; D [dim]; out_proj [dim, 2 dim] with `output_glu`.
    State: [B, state_dim, 2, 2]: z and w, each with its real and imaginary part.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LinOSS(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8, 2, 2))

    Attributes:
      dim: features of input and output.
      state_dim: number of oscillators; by default dim.
      discretization: "im" (implicit) or "imex" (implicit-explicit).
      output_glu: whether a gelu and a gated linear unit follow.
    """

    dim: int
    state_dim: int | None = None
    discretization: Literal["im", "imex"] = "im"
    output_glu: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.states)
        _checks.one_of(self, "discretization", self.discretization, ("im", "imex"))

    @property
    def states(self) -> int:
        """Number of oscillators: `state_dim`, by default `dim`."""
        return self.dim if self.state_dim is None else self.state_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, states = self.dim, self.states
        unit = _init.uniform(0.0, 1.0)
        inward, outward = (_init.uniform(-(size**-0.5), size**-0.5) for size in (dim, states))
        params = {
            "A_diag": Param((states,), ("state",), "recurrence", unit),
            "step": Param((states,), ("state",), "recurrence", unit),
            "B": Param((2, dim, states), (None, "embed", "state"), "weight", inward),
            "C": Param((2, states, dim), (None, "state", "embed"), "weight", outward),
            "D": Param((dim,), ("embed",), "bias", _init.normal(1.0)),
        }
        if self.output_glu:
            params["out_proj"] = Param(
                (dim, 2 * dim), ("embed", "mlp"), "weight", _init.fan_in_normal
            )
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.states, 2, 2), dtype)

    def state_flops(self) -> int:
        return 16 * self.states  # two products of a 2 x 2 block

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        A = jax.nn.relu(params["A_diag"].astype(wide))
        step = jax.nn.sigmoid(params["step"].astype(wide))
        damping = 1 / (1 + step**2 * A) if self.discretization == "im" else jnp.ones_like(A)
        # Rows z, w; w_t = w_{t-1} + s z_t adds s times the first row to the second one.
        first = jnp.stack([damping, -step * A * damping], axis=-1)
        second = step[:, None] * first + jnp.array([0, 1], wide)
        transition = jnp.stack([first, second], axis=-2)
        # The input enters as the velocity s u does, through the first column.
        u = jnp.stack(complex_dense(x, params["B"]), axis=-1)  # [B, T, P, 2]
        weight = step[:, None] * transition[..., 0]  # [P, 2]
        h, state = block_scan(
            transition,
            weight[..., None] * u[..., None, :],
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        position = jax.lax.complex(h[..., 1, 0], h[..., 1, 1])
        y = real_of_dense(position, params["C"], x.dtype) + params["D"].astype(x.dtype) * x
        return gelu_glu(y, params["out_proj"]) if self.output_glu else y, state
