"""SRU: the simple recurrent unit."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from seqjax import cells
from seqjax.layers import _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._gated import project, project_out
from seqjax.layers._rnn import RNN
from seqjax.layers.context import Context
from seqjax.layers.token_shift import shift
from seqjax.ops.nonlinear.nonlinear_scan import nonlinear_scan


@dataclasses.dataclass(frozen=True)
class SRU(RNN):
    """Simple recurrent unit (arXiv 1709.02755).

        f_t = sigmoid(x_t W_f + v_f * c_{t-1} + b_f)
        c_t = f_t * c_{t-1} + (1 - f_t) * x_t W
        r_t = sigmoid(x_t W_r + v_r * c_{t-1} + b_r)
        h_t = r_t * c_t + (1 - r_t) * s * x_t                  s = sqrt(1 + 2 exp(highway_bias))
        y_t = h_t

    If N = state_dim is not dim, x_t W_skip takes the place of s * x_t in h_t, and y_t = h_t W_out.

    The recurrence of c is the cell `seqjax.cells.SRU`. Starts are those of the authors' code. W
    starts uniform in +-sqrt(3/dim), W_f and W_r with sqrt(0.5) times this bound. v_f and v_r start
    uniform in +-sqrt(1.5), b_f at 0 and b_r at `highway_bias`. W_skip starts like s * W.

    Departures: the authors have no W_out.

    Parameters: in_proj, forget_proj, reset_proj [dim, N]; forget_bias, reset_bias, v_f, v_r [N]; if
    N != dim skip_proj [dim, N] and out_proj [N, dim]. State: c [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = SRU(dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 4))

    Attributes:
      dim, state_dim, algorithm, solver, implementation: see `seqjax.layers.RNN`.
      highway_bias: start of b_r. Negative values favor the highway connection.
    """

    highway_bias: float = 0.0

    @property
    def cell(self) -> cells.SRU:
        """`seqjax.cells.SRU`."""
        return cells.SRU(self.states)

    @property
    def _highway_scale(self) -> float:
        return math.sqrt(1 + 2 * math.exp(self.highway_bias))

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, states = self.dim, self.states
        bound = (3 / dim) ** 0.5

        def inward(bound: float) -> Param:
            start = _init.uniform(-bound, bound)
            return Param((dim, states), ("embed", "state"), "weight", start)

        def vector(initializer: _init.Initializer) -> Param:
            return Param((states,), ("state",), "recurrence", initializer)

        peephole = _init.uniform(-(1.5**0.5), 1.5**0.5)
        params: dict[str, Param | Layer] = {
            "in_proj": inward(bound),
            "forget_proj": inward(bound * 0.5**0.5),
            "reset_proj": inward(bound * 0.5**0.5),
            "forget_bias": vector(_init.zeros),
            "reset_bias": vector(jax.nn.initializers.constant(self.highway_bias)),
            "v_f": vector(peephole),
            "v_r": vector(peephole),
        }
        if states != dim:
            params["skip_proj"] = inward(bound * self._highway_scale)
            params["out_proj"] = Param(
                (states, dim), ("state", "embed"), "weight", _init.fan_in_normal
            )
        return params

    def state_flops(self) -> int:
        return 16 * self.states

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        forget = project(x, params["forget_proj"], params["forget_bias"])
        c, new_state, info = nonlinear_scan(
            self.cell,
            {"v_f": params["v_f"].astype(wide)},
            jnp.stack([project(x, params["in_proj"]), forget], axis=2),
            state,
            reset=context.reset,
            algorithm=self.algorithm,
            implementation=self.implementation,
            solver=self.solver,
            sequence_axis=context.sequence_axis,
        )
        context.record("solve", info)
        previous, _ = shift(c, state[:, None], context)
        reset_gate = project(x, params["reset_proj"], params["reset_bias"])
        r = jax.nn.sigmoid(reset_gate + params["v_r"].astype(wide) * previous)
        if "skip_proj" in params:
            skip = project(x, params["skip_proj"])
        else:
            skip = self._highway_scale * x.astype(wide)
        return project_out(r * c + (1 - r) * skip, params, x), new_state
