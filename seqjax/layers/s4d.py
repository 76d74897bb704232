"""S4D: diagonal state spaces that are constant in time, one for each channel."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers import _checks, _init, _reparameterize
from seqjax.layers._base import Layer, Param, Params, State, complex_dtype, state_dtype
from seqjax.layers._math import dense, gelu_glu, layer_normalize
from seqjax.layers._reparameterize import Reparameterization
from seqjax.layers.context import Context
from seqjax.ops.elementwise.ssm_scan import ssm_scan

Init = Literal["lin", "inv", "legs", "real", "dss"]
INITS = ("lin", "inv", "legs", "real", "dss")


@dataclasses.dataclass(frozen=True)
class S4D(Layer):
    """Diagonal state space layer S4D (arXiv 2206.11893).

        Lambda = -exp(log_A_real) + i A_imag,   s = exp(log_step)           per channel
        h_t = exp(s Lambda) * h_{t-1} + (exp(s Lambda) - 1) / Lambda * B x_t     (zero-order hold)
        y_t = 2 Re(C . h_t) + D * x_t                                       h complex [N/2]

    Every channel has its own N = `state_dim` real states, stored as N/2 complex ones whose
    conjugates are the other half. `spectrum` chooses how Lambda and B start; n
    counts from 0:

    | spectrum | Lambda | B |
    |---|---|---|
    | "lin" | -1/2 + i pi n | 1 |
    | "inv" | -1/2 + i (N / pi) (N / (2n + 1) - 1) | 1 |
    | "legs" | eigenvalues of the normal part of HiPPO-LegS | HiPPO's in that basis |
    | "dss" | as "legs" (DSS, arXiv 2203.14343, its form "exp") | 1 |
    | "real" | -(n + 1), with N real states and no factor 2 | 1 |

    `reparameterization` selects the rate -Re(Lambda) as a function of log_A_real (StableSSM, arXiv
    2311.14495): "exp" as above, "softplus", or "best", 1 / (log_A_real^2 + 0.1). With "best"
    the ratio of gradient to weight is bounded. Rates are at most 10, too small for "real".

    The imaginary parts of HiPPO's B are limited to [-2, 2], as in the authors' repository, which
    also halves B.

    C starts complex normal with variance 1/2 per part (real normal for "real"), D standard normal,
    s log-uniform in [dt_min, dt_max] per channel. `GSS` (arXiv 2206.13947) gates this layer.

    Departures: Re(Lambda) is stored as the logarithm of its negative. There is no bilinear rule.
    DSS's form "softmax" normalizes its kernel over a fixed length, which no recurrence computes.
    DSS shares Lambda among the channels; here each channel has its own.
    `output_glu` makes the gelu and gated linear unit optional.

    Parameters: log_A_real, A_imag [dim, N/2]; log_step, D [dim]; B, C [2, dim, N/2], real and
    imaginary part first. For "real": log_A_real, B, C [dim, N] and no A_imag. out_proj
    [dim, 2 dim] with `output_glu`. State: [B, dim, N/2], complex64 (complex128); for "real"
    [B, dim, N], real.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = S4D(dim=4, state_dim=8)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 4, 4))

    Attributes:
      dim: features of input and output.
      state_dim: real states N per channel; even unless `spectrum` is "real".
      spectrum: "lin", "inv", "legs", "real" or "dss".
      dt_min: smallest step size at initialization.
      dt_max: largest step size at initialization.
      output_glu: whether a gelu and a gated linear unit follow.
      reparameterization: "exp", "softplus" or "best".
    """

    dim: int
    state_dim: int = 64
    spectrum: Init = "lin"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    output_glu: bool = False
    reparameterization: Reparameterization = "exp"

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.state_dim)
        _checks.one_of(self, "spectrum", self.spectrum, INITS)
        _checks.one_of(self, "reparameterization", self.reparameterization, _reparameterize.KINDS)
        _checks.require(
            self,
            not (self.is_real and self.reparameterization == "best"),
            "`reparameterization` must not be 'best' with spectrum='real', whose rates may be above"
            f" {_reparameterize.LARGEST_RATE:.0f}, got 'best'; use 'softplus'.",
        )
        _checks.require(
            self,
            self.is_real or self.state_dim % 2 == 0,
            f"`state_dim` must be even, got {self.state_dim}; or set spectrum='real'.",
        )
        _checks.require(
            self,
            0 < self.dt_min < self.dt_max,
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {self.dt_min} and"
            f" {self.dt_max}.",
        )

    @property
    def is_real(self) -> bool:
        """True if the states are real."""
        return self.spectrum == "real"

    @property
    def _shape(self) -> tuple[int, int]:
        """Shape of the stored states."""
        return self.dim, self.state_dim if self.is_real else self.state_dim // 2

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, shape, axes = self.dim, self._shape, ("embed", "state")
        parts = () if self.is_real else (2,)
        whole, whole_axes = (*parts, *shape), (*(None for _ in parts), *axes)
        std = 1.0 if self.is_real else 0.5**0.5
        params = {"log_A_real": Param(shape, axes, "recurrence", self._draw_real)}
        if not self.is_real:
            params["A_imag"] = Param(shape, axes, "recurrence", self._draw_imag)
        step = _init.uniform(math.log(self.dt_min), math.log(self.dt_max))
        params |= {
            "log_step": Param((dim,), ("embed",), "recurrence", step),
            "B": Param(whole, whole_axes, "recurrence", self._draw_input),
            "C": Param(whole, whole_axes, "recurrence", _init.normal(std)),
            "D": Param((dim,), ("embed",), "bias", _init.normal(1.0)),
        }
        if self.output_glu:
            params["out_proj"] = Param(
                (dim, 2 * dim), ("embed", "mlp"), "weight", _init.fan_in_normal
            )
        return params

    def _draw_real(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        real = np.arange(1, shape[1] + 1) if self.is_real else np.full(shape[1], 0.5)
        weight = _reparameterize.weight_of_rate(real, self.reparameterization)
        return jnp.broadcast_to(jnp.asarray(weight, dtype), shape)

    def _draw_imag(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        size, n = self.state_dim, np.arange(shape[1])
        if self.spectrum == "lin":
            imag = np.pi * n
        elif self.spectrum == "inv":
            imag = size / np.pi * (size / (2 * n + 1) - 1)
        else:
            imag = _init.hippo_eigen(size)[0]
        return jnp.broadcast_to(jnp.asarray(imag, dtype), shape)

    def _draw_input(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if self.is_real:
            return jnp.ones(shape, dtype)
        if self.spectrum != "legs":
            ones = jnp.ones(shape[1:], dtype)
            return jnp.stack([ones, jnp.zeros_like(ones)])
        B = _init.hippo_eigen(self.state_dim)[1].conj().T @ np.sqrt(
            2 * np.arange(self.state_dim) + 1
        )
        parts = np.stack([B.real, np.clip(B.imag, -2, 2)])[:, None]
        return jnp.broadcast_to(jnp.asarray(parts, dtype), shape)

    def make_state(self, batch_size: int, dtype: Any) -> State:
        kind = dtype if self.is_real else complex_dtype(dtype)
        return jnp.zeros((batch_size, *self._shape), kind)

    def state_flops(self) -> int:
        return (4 if self.is_real else 12) * self._shape[0] * self._shape[1]

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        p = {name: value.astype(wide) for name, value in params.items()}
        eigenvalues = -_reparameterize.rate(p["log_A_real"], self.reparameterization)
        step = jnp.exp(p["log_step"])[:, None]
        B, C = p["B"], p["C"]
        if not self.is_real:
            eigenvalues = jax.lax.complex(eigenvalues, p["A_imag"])
            step = step.astype(eigenvalues.dtype)
            B, C = (jax.lax.complex(part[0], part[1]) for part in (B, 2 * C))
        exponent = step * eigenvalues
        y, state = ssm_scan(
            x,
            exponent,
            B * jnp.expm1(exponent) / eigenvalues,
            C,
            state,
            reset=context.reset,
            sequence_axis=context.sequence_axis,
        )
        y = y + params["D"].astype(x.dtype) * x
        return gelu_glu(y, params["out_proj"]) if self.output_glu else y, state


@dataclasses.dataclass(frozen=True)
class GSS(Layer):
    """Gated state space (arXiv 2206.13947): a diagonal state space on few channels, and a gate.

        u_t = gelu(x_t W_u)                               [inner]
        v_t = gelu(x_t W_v)                               [hidden]
        y_t = ((ssm(u)_t W_s) * v_t) W_o

    ssm is `S4D(inner, state_dim, "dss")`. With `inner_norm` a layer norm precedes it, as in
    lucidrains/gated-state-spaces-pytorch.

    Departures: the paper fixes the step size at 1, draws Lambda at random, and shares it among the
    channels; here the state space starts as DSS does. Weights start normal with variance 1/fan_in.
    The norm before the layer is not part of it; the backbone provides it.

    Parameters: in_proj [dim, inner]; gate_proj [dim, hidden]; ssm (an `S4D`); ssm_proj
    [inner, hidden]; out_proj [hidden, dim]; with `inner_norm` norm_scale and norm_bias [inner].
    State: that of `S4D`, [B, inner, state_dim / 2].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = GSS(dim=8, state_dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 8), (2, 8), (2, 2, 2))

    Attributes:
      dim: features of input and output.
      state_dim: real states per channel, even.
      inner: channels of the state space; by default dim / 4, rounded up.
      expand: hidden = expand * dim features of the gate.
      dt_min: smallest step size at initialization.
      dt_max: largest step size at initialization.
      inner_norm: whether a layer norm precedes the state space.
      norm_eps: constant added to the variance in that norm.
    """

    dim: int
    state_dim: int = 64
    inner: int | None = None
    expand: int = 4
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    inner_norm: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, inner=self.channels, expand=self.expand)
        _checks.above_zero(self, norm_eps=self.norm_eps)
        self._ssm  # noqa: B018  # checks the other fields

    @property
    def channels(self) -> int:
        """Channels of the state space: `inner`, by default dim / 4, rounded up."""
        return -(-self.dim // 4) if self.inner is None else self.inner

    @property
    def _ssm(self) -> S4D:
        return S4D(self.channels, self.state_dim, "dss", self.dt_min, self.dt_max)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, inner, hidden = self.dim, self.channels, self.expand * self.dim
        weight = _init.fan_in_normal
        norm: dict[str, Param | Layer] = {
            "norm_scale": Param((inner,), ("mlp",), "norm", _init.ones),
            "norm_bias": Param((inner,), ("mlp",), "norm", _init.zeros),
        }
        return {
            **(norm if self.inner_norm else {}),
            "in_proj": Param((dim, inner), ("embed", "mlp"), "weight", weight),
            "gate_proj": Param((dim, hidden), ("embed", "mlp"), "weight", weight),
            "ssm": self._ssm,
            "ssm_proj": Param((inner, hidden), (None, "mlp"), "weight", weight),
            "out_proj": Param((hidden, dim), ("mlp", "embed"), "weight", weight),
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return self._ssm.make_state(batch_size, dtype)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        u, v = (jax.nn.gelu(dense(x, params[name])) for name in ("in_proj", "gate_proj"))
        if self.inner_norm:
            u = layer_normalize(u, params["norm_scale"], params["norm_bias"], self.norm_eps)
        y, state = self._ssm.forward(params["ssm"], u, state, context)
        return dense(dense(y, params["ssm_proj"]) * v, params["out_proj"]), state
