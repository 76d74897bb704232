"""Block-diagonal linear RNN whose transition matrices depend on the input."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _fresh, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense
from seqjax.layers.context import Context
from seqjax.ops.elementwise.block_recurrence import apply_blocks
from seqjax.ops.elementwise.block_scan import block_scan

POWER = 1.2  # the exponent of the norm of a column


@dataclasses.dataclass(frozen=True)
class BlockLinear(Layer):
    """Block-diagonal linear RNN with input-dependent transitions (arXiv 2309.07412).

        R_t = reshape(relu(x_t W_1) W_2)                  [G, K, K], G = dim / K blocks
        P_t = R_t - mean of each column of R_t
        A_t = P_t / max(largest column norm of P_t's block, 1e-30)
        h_t = A_t h_{t-1} + relu(x_t V_1) V_2             h_0 learned
        y_t = h_t

    The norm of a column is (sum |p|^1.2)^(1/1.2). No column of A_t has a norm above 1. The lower
    bound 1e-30 matters only for a block with equal rows, whose A_t is zero.

    Departures: weights start normal with variance 1/fan_in. The authors' code has biases, and does
    not have the bound 1e-30. The norm and MLP after the layer are not part of it; the backbone
    provides them.

    Parameters: transition_in, transition_out [dim, dim * K], [dim * K, dim * K]; input_in,
    input_out [dim, dim]; initial [dim], which starts standard normal.
    State: {"hidden": [B, dim], "fresh": [B] bool}. "fresh" is True until the first step, which
    starts from the learned h_0, as does every reset.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = BlockLinear(dim=4, block_size=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state["hidden"].shape
      ((2, 5, 4), (2, 4), (2, 4))

    Attributes:
      dim: features of input and output, and size of the state.
      block_size: size K of a block, a divisor of dim.
    """

    dim: int
    block_size: int = 8

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, block_size=self.block_size)
        _checks.require(
            self,
            self.dim % self.block_size == 0,
            f"`block_size` must divide dim={self.dim}, got {self.block_size}.",
        )

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, wide = self.dim, self.dim * self.block_size
        weight = _init.fan_in_normal
        return {
            "transition_in": Param((dim, wide), ("embed", "mlp"), "weight", weight),
            "transition_out": Param((wide, wide), ("mlp", None), "weight", weight),
            "input_in": Param((dim, dim), ("embed", "mlp"), "weight", weight),
            "input_out": Param((dim, dim), ("mlp", None), "weight", weight),
            "initial": Param((dim,), (None,), "recurrence", _init.normal(1.0)),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return {
            "hidden": jnp.zeros((batch_size, self.dim), dtype),
            "fresh": jnp.ones((batch_size,), jnp.bool_),
        }

    def state_flops(self) -> int:
        return 2 * self.dim * self.block_size

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        wide, size = state_dtype(x.dtype), self.block_size
        blocks = self.dim // size, size
        raw = dense(jax.nn.relu(dense(x, params["transition_in"])), params["transition_out"])
        transition = _normalized(raw.reshape(*x.shape[:2], *blocks, size).astype(wide))
        added = dense(jax.nn.relu(dense(x, params["input_in"])), params["input_out"])
        starts, fresh = _fresh.starts(state["fresh"], reset, x.shape[1], sequence_axis)
        initial = params["initial"].astype(wide).reshape(*blocks, 1)
        begun = apply_blocks(transition, initial)[..., 0]
        begun = jnp.where(starts[..., None, None], begun, jnp.zeros_like(begun))
        h, hidden = block_scan(
            transition,
            added.reshape(*x.shape[:2], *blocks).astype(wide) + begun,
            state["hidden"].reshape(-1, *blocks),
            reset=reset,
            sequence_axis=sequence_axis,
        )
        state = {
            "hidden": hidden.reshape(state["hidden"].shape),
            "fresh": fresh,
        }
        return h.reshape(x.shape).astype(x.dtype), state


def _normalized(blocks: jax.Array) -> jax.Array:
    """Return blocks [..., K, K] with centered columns, over the block's largest column norm."""
    centered = blocks - jnp.mean(blocks, axis=-2, keepdims=True)
    largest = jnp.max(jnp.sum(jnp.abs(centered) ** POWER, axis=-2), axis=-1)[..., None, None]
    # The bound is inside the root, whose derivative at zero is infinite.
    return centered / jnp.maximum(largest, 1e-30**POWER) ** (1 / POWER)
