"""Legendre memories: the base class of `LMU` and `LegS`, and the transition of HiPPO-LegS."""

import abc
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, merge_heads
from seqjax.layers.context import Context
from seqjax.ops.core.linalg import inverse_unit_lower, matmul


@dataclasses.dataclass(frozen=True)
class LegendreLayer(Layer):
    """Channels written to memories of Legendre coefficients, and read by a dense layer."""

    dim: int
    state_dim: int = 32
    channels: int = 1

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.state_dim, channels=self.channels)

    @abc.abstractmethod
    def remember(self, u: jax.Array, state: State, context: Context) -> tuple[jax.Array, State]:
        """Write u [B, T, M] to the memories; return them, [B, T, M, N], and the state."""

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, channels, weight = self.dim, self.channels, _init.fan_in_normal
        read = channels * self.state_dim + dim
        return {
            "in_proj": Param((dim, channels), ("embed", None), "weight", weight),
            "in_bias": Param((channels,), (None,), "bias", _init.zeros),
            "out_proj": Param((read, dim), (None, "embed"), "weight", weight),
            "out_bias": Param((dim,), ("embed",), "bias", _init.zeros),
        }

    def state_flops(self) -> int:
        return 2 * self.channels * self.state_dim**2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        u = jax.nn.relu(dense(x, params["in_proj"]) + params["in_bias"].astype(x.dtype))
        memory, state = self.remember(u.astype(state_dtype(x.dtype)), state, context)
        features = jnp.concatenate([merge_heads(memory).astype(x.dtype), x], axis=-1)
        y = dense(features, params["out_proj"]) + params["out_bias"].astype(x.dtype)
        return jax.nn.relu(y), state


def legs_transition(steps: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Discretize m' = -A m + B u of HiPPO-LegS by the bilinear rule, with a step of 1/k.

    Args:
      steps: k [..., 1], the inverse of the step.
      size: number of coefficients N.

    Returns:
      The transition (I + A/2k)^-1 (I - A/2k), [..., N, N], and the weights of the input
      (I + A/2k)^-1 B / k, [..., N].
    """
    root = np.sqrt(2 * np.arange(size) + 1)
    lower = jnp.asarray(np.tril(np.outer(root, root), -1), steps.dtype)
    diagonal = 1 + jnp.arange(1, size + 1, dtype=steps.dtype) / (2 * steps)
    # I + A/2k is a diagonal times a unit lower triangular matrix. With the inverse M of I + A/2k,
    # the transition is 2 M - I.
    scaled = lower / (2 * steps[..., None] * diagonal[..., None])
    inverse = inverse_unit_lower(scaled) / diagonal[..., None, :]
    weights = matmul(inverse, jnp.asarray(root, steps.dtype)) / steps
    return 2 * inverse - jnp.eye(size, dtype=steps.dtype), weights
