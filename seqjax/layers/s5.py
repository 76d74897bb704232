"""S5: a diagonal state space with many inputs and outputs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks, _halo, _init, _reparameterize
from seqjax.layers._base import Layer, Param, Params, State, complex_dtype, state_dtype
from seqjax.layers._math import complex_dense, real_of_dense
from seqjax.layers._reparameterize import Reparameterization
from seqjax.layers.context import Context
from seqjax.ops.elementwise.linear_scan import linear_scan


@dataclasses.dataclass(frozen=True)
class S5(Layer):
    """Simplified state space layer S5 (arXiv 2208.04933).

        Lambda = -exp(log_A_real) + i A_imag,   Delta = exp(log_step)
        Abar = exp(Lambda Delta),   Bbar = (Abar - 1) / Lambda * B           (zero-order hold)
        h_t = Abar * h_{t-1} + Bbar x_t                 h complex [state_dim / 2]
        y_t = 2 Re(C h_t) + D * x_t

    `state_dim` real states are stored as state_dim/2 complex ones; the other half are their
    conjugates. Lambda starts as the eigenvalues of the normal part of HiPPO-LegS of size
    state_dim/blocks, repeated over `blocks`. B and C start as real normal matrices (variance
    1/fan_in) transformed to that eigenbasis, Delta log-uniform in [dt_min, dt_max] per state, and D
    standard normal.

    `reparameterization` selects the rate -Re(Lambda) as a function of log_A_real (StableSSM, arXiv
    2311.14495): "exp" as above, "softplus", or "best", 1 / (log_A_real^2 + 0.1).

    With `bidirectional=True` a second scan with the same Lambda and B runs backwards, with a
    separate C. Such a layer has no state: `step`, `initial_state` and a given `state` raise
    NotImplementedError and `apply` returns `()`. `reset` then marks segment starts, and neither
    direction crosses a border.

    Departures: Re(Lambda) is stored as the logarithm of its negative, so that it cannot become
    positive (the authors' code clips it). The paper's nonlinearity after the layer (GELU, gate) is
    not part of the layer; the backbone's MLP replaces it.

    Parameters: log_A_real, A_imag, log_step [N]; B [2, dim, N]; C [2, N, dim] ([2, 2N, dim] if
    bidirectional, forward half first), real and imaginary part first; D [dim]; N = state_dim/2.
    State: h [B, N], complex64 (complex128).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = S5(dim=4, state_dim=8, blocks=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 4))

    Attributes:
      dim: features of input and output.
      state_dim: number of real states, a multiple of 2 * blocks; by default dim.
      blocks: number of HiPPO blocks at initialization.
      dt_min: smallest step size at initialization.
      dt_max: largest step size at initialization.
      bidirectional: whether to add the scan from right to left.
      reparameterization: "exp", "softplus" or "best".
    """

    dim: int
    state_dim: int | None = None
    blocks: int = 1
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bidirectional: bool = False
    reparameterization: Reparameterization = "exp"

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.states, blocks=self.blocks)
        _checks.require(
            self,
            self.states % (2 * self.blocks) == 0,
            f"`state_dim` must be a multiple of 2 * blocks = {2 * self.blocks}, got"
            f" {self.states}; pass another state_dim or blocks.",
        )
        _checks.require(
            self,
            0 < self.dt_min < self.dt_max,
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {self.dt_min} and"
            f" {self.dt_max}.",
        )
        _checks.one_of(self, "reparameterization", self.reparameterization, _reparameterize.KINDS)

    @property
    def states(self) -> int:
        """Number of real states: `state_dim`, by default `dim`."""
        return self.dim if self.state_dim is None else self.state_dim

    @property
    def causal(self) -> bool:
        """False for the bidirectional layer."""
        return not self.bidirectional

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, states = self.dim, self.states // 2
        out_states = 2 * states if self.bidirectional else states
        state_axis = ("state",)
        return {
            "log_A_real": Param((states,), state_axis, "recurrence", self._draw_real),
            "A_imag": Param((states,), state_axis, "recurrence", self._draw_imag),
            "log_step": Param(
                (states,),
                state_axis,
                "recurrence",
                _init.uniform(math.log(self.dt_min), math.log(self.dt_max)),
            ),
            "B": Param((2, dim, states), (None, "embed", "state"), "recurrence", self._draw_input),
            "C": Param((2, out_states, dim), (None, "state", "embed"), "weight", self._draw_output),
            "D": Param((dim,), ("embed",), "bias", _init.normal(1.0)),
        }

    def _draw_real(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        weight = _reparameterize.weight_of_rate(0.5, self.reparameterization)
        return jnp.full(shape, float(weight), dtype)

    def _draw_imag(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        imag, _ = _init.hippo_eigen(self.states // self.blocks)
        return jnp.asarray(np.tile(imag, self.blocks), dtype)

    def _draw_input(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draw V^H B for a real B, as [2, dim, N]."""
        _, vectors = _init.hippo_eigen(self.states // self.blocks)
        real = jax.random.normal(
            key, (self.blocks, self.states // self.blocks, self.dim), dtype
        ) * (self.dim**-0.5)
        return jnp.stack(
            [
                jnp.einsum("pn,jpd->djn", jnp.asarray(part, dtype), real).reshape(shape[1:])
                for part in (vectors.real, -vectors.imag)
            ]
        )

    def _draw_output(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draw C V for a real C, as [2, N, dim], one direction after the other."""
        _, vectors = _init.hippo_eigen(self.states // self.blocks)
        sets = self.blocks * (2 if self.bidirectional else 1)
        real = jax.random.normal(key, (sets, self.states // self.blocks, self.dim), dtype) * (
            self.states**-0.5
        )
        return jnp.stack(
            [
                jnp.einsum("pn,jpd->jnd", jnp.asarray(part, dtype), real).reshape(shape[1:])
                for part in (vectors.real, vectors.imag)
            ]
        )

    def make_state(self, batch_size: int, dtype: Any) -> State:
        if self.bidirectional:
            return ()
        return jnp.zeros((batch_size, self.states // 2), complex_dtype(dtype))

    def state_flops(self) -> int:
        directions = 2 if self.bidirectional else 1
        return 8 * (self.states // 2) * directions  # one complex product and sum

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        wide = state_dtype(x.dtype)
        rate = _reparameterize.rate(params["log_A_real"].astype(wide), self.reparameterization)
        eigenvalues = jax.lax.complex(-rate, params["A_imag"].astype(wide))
        step = jnp.exp(params["log_step"].astype(wide))
        exponent = eigenvalues * jax.lax.complex(step, jnp.zeros_like(step))
        # The factor 2 of y = 2 Re(C h) accounts for the conjugate half of the states.
        driven = jax.lax.complex(*complex_dense(x, params["B"])) * (
            jnp.expm1(exponent) / eigenvalues
        )
        decay = jnp.exp(exponent)
        if self.bidirectional:
            forward, _ = linear_scan(decay, driven, reset=reset, sequence_axis=sequence_axis)
            backward, _ = linear_scan(
                decay,
                driven,
                reset=_segment_ends(reset, sequence_axis),
                reverse=True,
                sequence_axis=sequence_axis,
            )
            hidden = jnp.concatenate([forward, backward], axis=-1)
        else:
            hidden, state = linear_scan(
                decay, driven, state, reset=reset, sequence_axis=sequence_axis
            )
        y = 2 * real_of_dense(hidden, params["C"], x.dtype) + params["D"].astype(x.dtype) * x
        return y, state


def _segment_ends(reset: jax.Array | None, sequence_axis: str | None) -> jax.Array | None:
    """Return where a segment ends, which is where the scan from right to left must restart."""
    if reset is None:
        return None
    if sequence_axis is None:
        return jnp.pad(reset[:, 1:], ((0, 0), (0, 1)))
    return jnp.concatenate([reset[:, 1:], _halo.first_after(reset, sequence_axis)], axis=1)
