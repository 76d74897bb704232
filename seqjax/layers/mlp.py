"""MLPs: the position-wise half of a residual block, with and without a gate."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._math import dense
from seqjax.layers.context import Context

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu2"]
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "relu2": lambda x: jax.nn.relu(x) ** 2,
    }
)


@dataclasses.dataclass(frozen=True)
class GatedMLP(Layer):
    """Gated MLP, by default with SiLU, known as SwiGLU (arXiv 2002.05202).

        y = (activation(x W_gate) * (x W_up)) W_down

    The layer acts on one position at a time: its state is the empty tuple and `reset` has no
    effect.

    Parameters: gate_proj, up_proj [dim, hidden], down_proj [hidden, dim]; with `bias` gate_bias,
    up_bias [hidden], down_bias [dim].

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
      activation: 'silu', 'gelu' (with erf), 'gelu_tanh' (its approximation) or 'relu2' (the square
        of relu).
      bias: whether the three products have biases.
    """

    dim: int
    hidden_dim: int | None = None
    activation: ActivationName = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)
        _checks.positive(self, hidden_dim=self.inner_dim)
        _checks.one_of(self, "activation", self.activation, ACTIVATIONS)

    @property
    def inner_dim(self) -> int:
        """Features between the two products: `hidden_dim`, or its default."""
        return -(-self.dim // 3) * 8 if self.hidden_dim is None else self.hidden_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return {
            **_product("gate", self.dim, self.inner_dim, ("embed", "mlp"), self.bias),
            **_product("up", self.dim, self.inner_dim, ("embed", "mlp"), self.bias),
            **_product("down", self.inner_dim, self.dim, ("mlp", "embed"), self.bias),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return ()

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        gate = dense(x, params["gate_proj"], params.get("gate_bias"))
        up = dense(x, params["up_proj"], params.get("up_bias"))
        hidden = ACTIVATIONS[self.activation](gate) * up
        return dense(hidden, params["down_proj"], params.get("down_bias")), state


@dataclasses.dataclass(frozen=True)
class MLP(Layer):
    """MLP with one hidden layer, by default with the squared ReLU of Primer (arXiv 2109.08668).

        y = activation(x W_up) W_down

    The layer acts on one position at a time: its state is the empty tuple and `reset` has no
    effect.

    Parameters: up_proj [dim, hidden], down_proj [hidden, dim]; with `bias` up_bias [hidden],
    down_bias [dim].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = MLP(dim=4)
      >>> y, state = layer.apply(layer.init(jax.random.key(0)), jnp.ones((1, 2, 4)))
      >>> y.shape, layer.inner_dim, state
      ((1, 2, 4), 16, ())

    Attributes:
      dim: features of input and output.
      hidden_dim: features between the two products; by default 4 dim.
      activation: see `GatedMLP`.
      bias: whether the two products have biases.
    """

    dim: int
    hidden_dim: int | None = None
    activation: ActivationName = "relu2"
    bias: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim)
        _checks.positive(self, hidden_dim=self.inner_dim)
        _checks.one_of(self, "activation", self.activation, ACTIVATIONS)

    @property
    def inner_dim(self) -> int:
        """Features between the two products: `hidden_dim`, or its default."""
        return 4 * self.dim if self.hidden_dim is None else self.hidden_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return {
            **_product("up", self.dim, self.inner_dim, ("embed", "mlp"), self.bias),
            **_product("down", self.inner_dim, self.dim, ("mlp", "embed"), self.bias),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return ()

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        hidden = ACTIVATIONS[self.activation](dense(x, params["up_proj"], params.get("up_bias")))
        return dense(hidden, params["down_proj"], params.get("down_bias")), state


def _product(
    name: str, inputs: int, outputs: int, axes: tuple[str, str], bias: bool
) -> dict[str, Param]:
    """Return the declarations of a weight [inputs, outputs] and of a bias."""
    params = {f"{name}_proj": Param((inputs, outputs), axes, "weight", _init.fan_in_normal)}
    if bias:
        params[f"{name}_bias"] = Param((outputs,), axes[1:], "bias", _init.zeros)
    return params
