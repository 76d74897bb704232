"""Unitary recurrent network: the input chooses a rotation of the state."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks, _fresh, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, split_heads
from seqjax.layers.context import Context
from seqjax.ops.core.linalg import matmul
from seqjax.ops.elementwise.block_recurrence import apply_blocks
from seqjax.ops.elementwise.block_scan import block_scan

SQUARINGS = 6  # enough for matrices with a norm up to 64


@dataclasses.dataclass(frozen=True)
class UnitaryRNN(Layer):
    """Unitary recurrent network URN, without nonlinearity (arXiv 2208.05719).

        S_t = skew(x_t W_s)                               [K, K], S_t^T = -S_t, for each head
        h_t = exp(S_t) h_{t-1}                            h_0 learned
        y_t = h_t W_y

    skew puts K (K - 1) / 2 numbers below the diagonal, and their negatives above it. exp(S_t) is a
    rotation, so |h_t| = |h_0|, and gradients through time neither grow nor vanish. Equal inputs
    rotate every state in the same way, so a sequence means the product of its matrices.

    exp(S_t) is NaN if the absolute numbers of a row of S_t sum to more than 64.

    Departures: the paper has one head, and a table of S for every word. Here S_t is a linear map of
    x_t, and the states of heads are independent. The authors' code starts from a constant unit
    vector instead of a learned h_0. Rounding changes |h_t| slowly over very long sequences.

    Parameters: skew_proj [dim, H K (K - 1) / 2]; initial [H, K], normal with variance 1/K;
    out_proj [H K, dim]; weights start normal with variance 1/fan_in.
    State: {"hidden": [B, H, K], "fresh": [B] bool}. "fresh" is True until the first step, which
    starts from the learned h_0, as does every reset.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = UnitaryRNN(dim=4, heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state["hidden"].shape
      ((2, 5, 4), (2, 4), (2, 2, 2))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: states K of a head, at least 2; by default dim / heads.
    """

    dim: int
    heads: int
    head_dim: int | None = None

    def __post_init__(self) -> None:
        size = _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.require(self, size >= 2, f"`head_dim` must be at least 2, got {size}.")

    @property
    def size(self) -> int:
        """States K of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, heads, size = self.dim, self.heads, self.size
        angles = heads * (size * (size - 1) // 2)
        weight = _init.fan_in_normal
        return {
            "skew_proj": Param((dim, angles), ("embed", "heads"), "weight", weight),
            "initial": Param(
                (heads, size), ("heads", None), "recurrence", _init.normal(size**-0.5)
            ),
            "out_proj": Param((heads * size, dim), ("heads", "embed"), "weight", weight),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return {
            "hidden": jnp.zeros((batch_size, self.heads, self.size), dtype),
            "fresh": jnp.ones((batch_size,), jnp.bool_),
        }

    def state_flops(self) -> int:
        return 2 * self.heads * self.size**2

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        wide = state_dtype(x.dtype)
        angles = split_heads(dense(x, params["skew_proj"]).astype(wide), self.heads)
        rotation = _rotation(angles, self.size)
        starts, fresh = _fresh.starts(state["fresh"], reset, x.shape[1], sequence_axis)
        begun = apply_blocks(rotation, params["initial"].astype(wide)[..., None])[..., 0]
        h, hidden = block_scan(
            rotation,
            jnp.where(starts[..., None, None], begun, jnp.zeros_like(begun)),
            state["hidden"],
            reset=reset,
            sequence_axis=sequence_axis,
        )
        y = dense(h.reshape(*h.shape[:2], -1).astype(x.dtype), params["out_proj"])
        return y, {"hidden": hidden, "fresh": fresh}


def _rotation(angles: jax.Array, size: int) -> jax.Array:
    """Return exp of the skew-symmetric matrices with these entries: [..., K (K-1)/2] -> [K, K]."""
    below = np.tril_indices(size, -1)
    place = np.zeros((size, size), int)
    place[below] = np.arange(len(below[0])) + 1
    place = np.where(place.T > 0, place.T + len(below[0]), place)
    entries = jnp.concatenate([jnp.zeros_like(angles[..., :1]), angles, -angles], axis=-1)
    return _exp(jnp.take(entries, place, axis=-1))


def _exp(A: jax.Array) -> jax.Array:
    """Return the exponential of matrices [..., K, K] by scaling and squaring.

    `jax.scipy.linalg.expm` chooses among five approximations, and computes all of them for a batch.
    Here every matrix is halved until its norm is at most 1, where 16 terms of the series are exact
    to 3e-15. Matrices of a batch differ in their number of halvings, so each squaring selects the
    matrices that still need it.
    """
    norm = jax.lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(A), axis=-2), axis=-1))
    halvings = jnp.ceil(jnp.log2(jnp.maximum(norm, 1)))[..., None, None]
    A = A * jnp.exp2(-halvings)
    powers = [jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape), A]
    while len(powers) < 5:
        powers.append(matmul(powers[-1], A))
    # Terms 4 i .. 4 i + 3 of the series, times the fourth power of A for the terms above them.
    total = powers[0] * (1 / math.factorial(16))
    for i in (12, 8, 4, 0):
        total = matmul(powers[4], total)
        for j in range(4):
            total = total + powers[j] * (1 / math.factorial(i + j))
    for i in range(SQUARINGS):
        total = jnp.where(halvings > i, matmul(total, total), total)
    return jnp.where(halvings > SQUARINGS, jnp.nan, total)
