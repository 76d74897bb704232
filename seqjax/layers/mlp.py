"""GatedMLP: the position-wise half of a residual block."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._math import dense
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class GatedMLP(Layer):
    """Gated MLP with SiLU, known as SwiGLU (arXiv 2002.05202).

        y = (silu(x W_gate) * (x W_up)) W_down

    The layer acts on one position at a time: its state is the empty tuple and `reset` has no
    effect.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GatedMLP(dim=4)
      >>> y, state = layer.apply(layer.init(jax.random.key(0)), jnp.ones((1, 2, 4)))
      >>> y.shape, layer.inner_dim, state
      ((1, 2, 4), 16, ())

    Attributes:
      dim: features of input and output.
      hidden_dim: features between the two products; by default 8/3 dim (as many parameters as a
        plain MLP of 4 dim), rounded up to a multiple of 8.
    """

    dim: int
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)
        _checks.positive(self, hidden_dim=self.inner_dim)

    @property
    def inner_dim(self) -> int:
        """Features between the two products: `hidden_dim`, or its default."""
        return -(-self.dim // 3) * 8 if self.hidden_dim is None else self.hidden_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inward = Param((self.dim, self.inner_dim), ("embed", "mlp"), "weight", _init.fan_in_normal)
        return {
            "gate_proj": inward,
            "up_proj": inward,
            "down_proj": Param(
                (self.inner_dim, self.dim), ("mlp", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return ()

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        hidden = jax.nn.silu(dense(x, params["gate_proj"])) * dense(x, params["up_proj"])
        return dense(hidden, params["down_proj"]), state
