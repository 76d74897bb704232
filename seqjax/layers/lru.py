"""LRU: the linear recurrent unit."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init, _reparameterize
from seqjax.layers._base import Layer, Param, Params, State, complex_dtype, state_dtype
from seqjax.layers._math import complex_dense, real_of_dense
from seqjax.layers.context import Context
from seqjax.ops.elementwise.linear_scan import linear_scan


@dataclasses.dataclass(frozen=True)
class LRU(Layer):
    """Linear recurrent unit (arXiv 2303.06349).

        lambda = exp(-exp(nu_log) + i exp(theta_log))
        h_t = lambda * h_{t-1} + exp(gamma_log) * (B x_t)        h complex [state_dim]
        y_t = Re(C h_t) + D * x_t

    Eigenvalues start uniform on the ring r_min <= |lambda| <= r_max with phases in [0, max_phase].
    exp(gamma_log) starts as sqrt(1 - |lambda|^2), which makes |h| of the order of |x|. B and C are
    drawn normal with variances 1/(2 dim) and 1/state_dim per part, D standard normal. The defaults
    are those of the paper, which uses a narrower ring for long ranges, e.g. r_min=0.9,
    r_max=0.999.

    With reparameterization="best" the modulus is the stable reparameterization of StableSSM for
    discrete time (arXiv 2311.14495), with the weight w in place of nu_log:

        lambda = (1 - 1 / (w^2 + 0.5)) exp(i exp(theta_log))

    The first factor is in [-1, 1). It starts as the |lambda| drawn above, and is negative if
    w^2 < 0.5.

    Departures: the uniform draws stay 1e-6 away from 0 and 1, where the logarithms are infinite.
    The paper's block (norm, gated unit, skip) is not part of the layer; the backbone provides it.

    Parameters: nu_log, theta_log, gamma_log [N]; B [2, dim, N] and C [2, N, dim] with real and
    imaginary part first; D [dim]. State: h [B, N], complex64 (complex128).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = LRU(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 8))

    Attributes:
      dim: features of input and output.
      state_dim: number of complex states N; by default dim.
      r_min: smallest |lambda| at initialization.
      r_max: largest |lambda| at initialization.
      max_phase: largest phase at initialization.
      reparameterization: "exp" or "best", the function from nu_log to the modulus.
    """

    dim: int
    state_dim: int | None = None
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi
    reparameterization: Literal["exp", "best"] = "exp"

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.states)
        _checks.require(
            self,
            0 <= self.r_min < self.r_max <= 1,
            f"`r_min` and `r_max` must satisfy 0 <= r_min < r_max <= 1, got {self.r_min} and"
            f" {self.r_max}.",
        )
        _checks.above_zero(self, max_phase=self.max_phase)
        _checks.one_of(self, "reparameterization", self.reparameterization, ("exp", "best"))

    @property
    def states(self) -> int:
        """Number of complex states N: `state_dim`, by default `dim`."""
        return self.dim if self.state_dim is None else self.state_dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, states = self.dim, self.states
        return {
            "nu_log": Param((states,), ("state",), "recurrence", self._draw_nu_log),
            "theta_log": Param(
                (states,),
                ("state",),
                "recurrence",
                _init.log_uniform_of(1e-6 * self.max_phase, self.max_phase),
            ),
            # Set by `init` from nu_log.
            "gamma_log": Param((states,), ("state",), "recurrence", _init.zeros),
            "B": Param(
                (2, dim, states),
                (None, "embed", "state"),
                "weight",
                _init.normal((2 * dim) ** -0.5),
            ),
            "C": Param((2, states, dim), (None, "state", "embed"), "weight", _init.fan_in_normal),
            "D": Param((dim,), ("embed",), "bias", _init.normal(1.0)),
        }

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Draw the parameters; see `Layer.init`."""
        params = super().init(key, dtype)
        if self.reparameterization == "best":
            below_one = _reparameterize.one_minus_decay(params["nu_log"])
            square = below_one * (2 - below_one)
        else:
            # |lambda|^2 = exp(-2 exp(nu_log)); expm1 keeps 1 - |lambda|^2 exact near 0.
            square = -jnp.expm1(-2 * jnp.exp(params["nu_log"]))
        params["gamma_log"] = 0.5 * jnp.log(square)
        return params

    def _draw_nu_log(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        u = jax.random.uniform(key, shape, dtype, 1e-6, 1 - 1e-6)
        square = u * (self.r_max**2 - self.r_min**2) + self.r_min**2
        if self.reparameterization == "best":
            return _reparameterize.weight_of_decay(jnp.sqrt(square))
        return jnp.log(-0.5 * jnp.log(square))

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.states), complex_dtype(dtype))

    def state_flops(self) -> int:
        return 8 * self.states  # one complex product and sum

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        wide = state_dtype(x.dtype)
        nu_log = params["nu_log"].astype(wide)
        theta, gamma = (jnp.exp(params[name].astype(wide)) for name in ("theta_log", "gamma_log"))
        if self.reparameterization == "best":
            modulus = 1 - _reparameterize.one_minus_decay(nu_log)
            decay = jax.lax.complex(modulus * jnp.cos(theta), modulus * jnp.sin(theta))
        else:
            decay = jnp.exp(jax.lax.complex(-jnp.exp(nu_log), theta))
        real, imag = complex_dense(x, params["B"])
        hidden, state = linear_scan(
            decay,
            jax.lax.complex(gamma * real, gamma * imag),
            state,
            reset=reset,
            sequence_axis=sequence_axis,
        )
        return real_of_dense(hidden, params["C"], x.dtype) + params["D"].astype(x.dtype) * x, state
