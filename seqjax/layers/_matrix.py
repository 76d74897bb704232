"""Base class of layers with a matrix state per head: projections, convolutions and the state."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Initializer, Layer, Param, Params, State
from seqjax.layers._math import dense, split_heads
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv
from seqjax.ops.matrix_state.input_maps import SoftplusGate


class MatrixLayer(Layer):
    """Base class of layers that project to q, k and v and keep a matrix [K, V] per head.

    A subclass is a dataclass with the fields `dim` and `heads` and the properties `key_dim` and
    `value_dim`. With a field `conv_size` that is not None, short convolutions with silu follow the
    projections. The state is then a dict with their states and the matrices, under "memory".
    """

    heads: int
    conv_size: int | None = None
    value_heads: int | None = None
    updates: int = 1  # keys and values for one token

    @property
    def key_dim(self) -> int:
        """Key features per head K, by default dim / heads."""
        return self.dim // self.heads

    @property
    def value_dim(self) -> int:
        """Value features per head V, by default K."""
        return self.key_dim

    @property
    def memory_heads(self) -> int:
        """Number of matrices: `value_heads`, by default `heads`."""
        return self.heads if self.value_heads is None else self.value_heads

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Shape of the matrices of one sequence: heads, rows, columns."""
        return self.memory_heads, self.key_dim, self.value_dim

    def _check_heads(self) -> None:
        """Check `heads`, `value_heads` and `conv_size`."""
        _checks.positive(self, dim=self.dim, heads=self.heads)
        if self.conv_size is not None:
            _checks.positive(self, conv_size=self.conv_size)
        if self.value_heads is not None:
            _checks.positive(self, value_heads=self.value_heads)
            _checks.require(
                self,
                self.value_heads % self.heads == 0,
                f"`value_heads` must be a multiple of heads={self.heads}, got {self.value_heads}.",
            )

    def _check_width(self, name: str, size: float) -> None:
        """Check that a number of features per head, made from a factor, is an integer."""
        _checks.require(
            self,
            is_integer(size),
            f"`{name}` must give an integer >= 1 as features per head, got {size:g} for"
            f" {name}={getattr(self, name)}, dim={self.dim}, heads={self.heads}.",
        )

    def _check_positive(self, *names: str) -> None:
        """Check that the fields are > 0."""
        _checks.above_zero(self, **{name: getattr(self, name) for name in names})

    def _inward(
        self, width: int, axis: str | None = "heads", initializer: Initializer | None = None
    ) -> Param:
        return Param((self.dim, width), ("embed", axis), "weight", initializer or _FAN)

    def _low_rank(self, name: str, rank: int, width: int) -> dict[str, Param | Layer]:
        """Return two factors of a projection of the input, `name`_down and `name`_up."""
        return {
            f"{name}_down": self._inward(rank, None),
            f"{name}_up": Param((rank, width), (None, "heads"), "weight", _FAN),
        }

    def _outward(self, initializer: Initializer | None = None) -> Param:
        width = self.memory_heads * self.value_dim
        return Param((width, self.dim), ("heads", "embed"), "weight", initializer or _FAN)

    def _qkv(self, initializer: Initializer | None = None) -> dict[str, Param | Layer]:
        """Return the projections to q, k and v and their convolutions."""
        return {
            **{
                f"{name}_proj": self._inward(width, initializer=initializer)
                for name, width in self._widths().items()
            },
            **self._convs(),
        }

    def _widths(self) -> dict[str, int]:
        """Return the features of all heads and updates of q, k and v."""
        keys, values = self.heads * self.key_dim, self.memory_heads * self.value_dim
        return {"q": keys, "k": self.updates * keys, "v": self.updates * values}

    def _head_norm(self) -> Param:
        return Param((self.value_dim,), ("head_dim",), "norm", _init.ones)

    def _wide_norm(self) -> Param:
        return Param((self.memory_heads * self.value_dim,), ("heads",), "norm", _init.ones)

    def _convs(self) -> dict[str, ShortConv]:
        if self.conv_size is None:
            return {}
        return {
            f"{name}_conv": ShortConv(
                width, self.conv_size, activation=self._activation(name), channel_axis="heads"
            )
            for name, width in self._widths().items()
        }

    def _activation(self, name: str) -> Literal["silu"] | None:
        """Return the activation of the convolution of "q", "k" or "v"."""
        return "silu"

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = {name: conv.make_state(batch_size, dtype) for name, conv in self._convs().items()}
        return state | {"memory": jnp.zeros((batch_size, *self.memory_shape), dtype)}

    def state_flops(self) -> int:
        heads, keys, values = self.memory_shape
        return 5 * heads * keys * values  # decay 1, write 2, read 2

    def _project(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array, State]:
        """Return q, k, v by head and update, and the states of the convolutions.

        The shapes are q [B, T, heads, K], k [B, T, updates * heads, K] and
        v [B, T, updates * memory_heads, V].
        """
        convs, new_state, made = self._convs(), {}, []
        heads_of = {
            "q": self.heads,
            "k": self.updates * self.heads,
            "v": self.updates * self.memory_heads,
        }
        for name, heads in heads_of.items():
            y, conv = dense(x, params[f"{name}_proj"]), f"{name}_conv"
            if conv in convs:
                y, new_state[conv] = convs[conv].forward(params[conv], y, state[conv], context)
            made.append(split_heads(y, heads))
        q, k, v = made
        return q, k, v, new_state


_FAN = _init.fan_in_normal


def is_integer(size: float) -> bool:
    """Return whether a size is an integer >= 1, up to the rounding of a quotient of sizes."""
    return size >= 1 - 1e-9 and math.isclose(size, round(size))


def decay_params(heads: int, width: int | None = None) -> dict[str, Param | Layer]:
    """Return A_log [heads] and dt_bias [width], which start as in Mamba-2."""
    dt = _init.inverse_softplus_log_uniform(1e-3, 1e-1)
    return {
        "A_log": Param((heads,), ("heads",), "recurrence", _init.log_uniform_of(1.0, 16.0)),
        "dt_bias": Param((heads if width is None else width,), ("heads",), "recurrence", dt),
    }


def decay_gate(params: Params, by_channel: bool = False) -> SoftplusGate:
    """Return the gate of decays per head, or per channel for a dt_bias [H * K]."""
    heads, bias = params["A_log"].shape[0], params["dt_bias"]
    return SoftplusGate(params["A_log"], bias.reshape(heads, -1) if by_channel else bias)
