"""HGRN: the hierarchically gated recurrent network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init, _lower_bound
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._gated import Gated, project, project_out, recur
from seqjax.layers._math import dense, rms_normalize
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class HGRN(Gated):
    """Hierarchically gated recurrent network (arXiv 2311.04823), in its real form.

        f_t = b + (1 - b) * sigmoid(x_t W_f)                         b: the block's lower bound
        h_t = f_t * h_{t-1} + (1 - f_t) * silu(x_t W_i)
        y_t = (rmsnorm(h_t) * silu(x_t W_g)) W_out

    In a `Backbone` the lower bounds of the forget gates grow with depth, so that later blocks
    remember longer:

        b_l = s_1 + ... + s_l,    s = softmax(p) over blocks         block l of L, b_0 = 0

    b_l starts at l / L. Outside a backbone, or without `lower_bound`, b is 0. The backbone hands
    the parameters p of all blocks to each block.

    Departures: the paper's state is complex with a learned phase per channel; the real form is that
    of flash-linear-attention and of HGRN2's ablation. Projections start normal with variance
    1/fan_in.

    Parameters: forget_proj, input_proj, gate_proj [dim, N]; with `lower_bound` lower_bound [N]
    (p_l); norm [N]; out_proj [N, dim]. State: h [B, N].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = HGRN(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim: features of input and output.
      state_dim: channels N; by default dim.
      lower_bound: whether the forget gates have lower bounds.
      norm_eps: constant added to the mean square in the norm.
    """

    lower_bound: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.above_zero(self, norm_eps=self.norm_eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = self._inward()
        bound = {"lower_bound": _lower_bound.declare(self.states)} if self.lower_bound else {}
        return {
            "forget_proj": inward,
            "input_proj": inward,
            "gate_proj": inward,
            **bound,
            "norm": Param((self.states,), ("state",), "norm", _init.ones),
            "out_proj": self._outward(),
        }

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        return _lower_bound.initial_values(self.states) if self.lower_bound else {}

    def visible_params(self, params: Params) -> dict[str, list[jax.Array]]:
        return _lower_bound.visible_params(params["lower_bound"]) if self.lower_bound else {}

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        forget = project(x, params["forget_proj"])
        room = jnp.ones((), forget.dtype)
        if self.lower_bound:
            room = _lower_bound.room_above(self.states, forget.dtype, context)
        h, state = recur(
            (1 - room) + room * jax.nn.sigmoid(forget),
            # 1 - f as a product: a difference has no digits left for f near 1.
            room * jax.nn.sigmoid(-forget) * jax.nn.silu(project(x, params["input_proj"])),
            state,
            context,
        )
        y = rms_normalize(h, params["norm"], self.norm_eps).astype(x.dtype)
        return project_out(y * jax.nn.silu(dense(x, params["gate_proj"])), params, x), state
