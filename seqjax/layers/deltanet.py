"""DeltaNet, plain and gated: a matrix memory corrected by the delta rule."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, l2_normalize, merge_heads, rms_normalize, split_heads
from seqjax.layers.context import Context
from seqjax.layers.conv import ShortConv, qkv_convs
from seqjax.ops.matrix_state.delta_rule import delta_rule

_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class DeltaNet(Layer):
    """Delta rule memory, DeltaNet (2406.06484) or with `gated` Gated DeltaNet (2412.06464).

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))      per head
        q, k = q / |q|, k / |k|                                    |.|^2 = sum of squares + 1e-6
        beta_t = sigmoid(x_t W_beta)
        alpha_t = exp(-exp(A_log) softplus(x_t W_a + dt_bias))                 gated, otherwise 1
        S_t = (I - beta_t k_t k_t^T) alpha_t S_{t-1} + beta_t k_t v_t^T        [K, V] per head
        o_t = S_t^T q_t / sqrt(K)
        y_t = (rmsnorm(o_t) * silu(x_t W_g)) W_o                               gate if output_gate

    With `negative_eigenvalues=True` beta is 2 sigmoid, so that I - beta k k^T has eigenvalues in
    [-1, 1] and the layer can solve state tracking tasks such as parity (arXiv 2411.12537). The RMS
    norm is per head, with one scale [V] for all heads. A starts uniform in [1, 16] and softplus of
    dt_bias log-uniform in [1e-3, 1e-1], as in Mamba-2; projections normal with variance 1/fan_in.

    Departures: the authors' default expand_v for Gated DeltaNet is 2; here it is 1 for both.

    Parameters: q_proj, k_proj [dim, H * K], v_proj [dim, H * V], q_conv, k_conv, v_conv
    (`ShortConv`), beta_proj [dim, H], norm [V], out_proj [H * V, dim]; if gated a_proj [dim, H],
    A_log, dt_bias [H]; if output_gate gate_proj [dim, H * V].
    State: {"q_conv", "k_conv", "v_conv": [B, conv_size - 1, H * K or H * V],
    "memory": [B, H, K, V]}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = DeltaNet(dim=8, heads=2, gated=True)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["memory"].shape
      ((2, 5, 8), (2, 8), (2, 2, 4, 4))

    Attributes:
      dim: features of input and output.
      heads: number of heads H.
      head_dim: key features per head K; by default dim / heads.
      expand_v: V = expand_v * K, which must be an integer.
      conv_size: taps of the short convolutions.
      gated: whether the memory decays, by alpha.
      negative_eigenvalues: whether beta is in (0, 2) instead of (0, 1).
      output_gate: whether to gate the output; by default the value of `gated`, as in the papers.
    """

    dim: int
    heads: int
    head_dim: int | None = None
    expand_v: float = 1
    conv_size: int = 4
    gated: bool = False
    negative_eigenvalues: bool = False
    output_gate: bool | None = None

    def __post_init__(self) -> None:
        head_dim = _checks.head_dim(self, self.dim, self.heads, self.head_dim)
        _checks.positive(self, conv_size=self.conv_size)
        value_dim = self.expand_v * head_dim
        _checks.require(
            self,
            value_dim >= 1 and value_dim == int(value_dim),
            f"`expand_v` * head_dim must be an integer >= 1, got expand_v={self.expand_v},"
            f" head_dim={head_dim}.",
        )

    @property
    def key_dim(self) -> int:
        """Key features per head K: `head_dim`, by default dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def gates_output(self) -> bool:
        """Value of `output_gate`, by default `gated`."""
        return self.gated if self.output_gate is None else self.output_gate

    @property
    def value_dim(self) -> int:
        """Value features per head V."""
        return int(self.expand_v * self.key_dim)

    def _convs(self) -> dict[str, ShortConv]:
        return qkv_convs(self.heads, self.key_dim, self.value_dim, self.conv_size)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        def inward(width: int) -> Param:
            return Param((self.dim, width), ("embed", "heads"), "weight", _init.fan_in_normal)

        key_width, value_width = self.heads * self.key_dim, self.heads * self.value_dim
        params: dict[str, Param | Layer] = {
            "q_proj": inward(key_width),
            "k_proj": inward(key_width),
            "v_proj": inward(value_width),
            **self._convs(),
            "beta_proj": inward(self.heads),
            "norm": Param((self.value_dim,), ("head_dim",), "norm", _init.ones),
            "out_proj": Param(
                (value_width, self.dim), ("heads", "embed"), "weight", _init.fan_in_normal
            ),
        }
        if self.gated:
            params |= {
                "a_proj": inward(self.heads),
                "A_log": Param(
                    (self.heads,), ("heads",), "recurrence", _init.log_uniform_of(1.0, 16.0)
                ),
                "dt_bias": Param(
                    (self.heads,),
                    ("heads",),
                    "recurrence",
                    _init.inverse_softplus_log_uniform(1e-3, 1e-1),
                ),
            }
        if self.gates_output:
            params["gate_proj"] = inward(value_width)
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        state = {name: conv.make_state(batch_size, dtype) for name, conv in self._convs().items()}
        shape = (batch_size, self.heads, self.key_dim, self.value_dim)
        return state | {"memory": jnp.zeros(shape, dtype)}

    def state_flops(self) -> int:
        size = self.heads * self.key_dim * self.value_dim
        return (7 if self.gated else 6) * size  # read k, write, read q, and the decay

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        wide = state_dtype(x.dtype)
        new_state, mixed = {}, []
        for name, conv in self._convs().items():
            projected = dense(x, params[f"{name[0]}_proj"])
            y, new_state[name] = conv.forward(params[name], projected, state[name], context)
            mixed.append(split_heads(y, self.heads))
        q, k, v = mixed
        beta = jax.nn.sigmoid(dense(x, params["beta_proj"]).astype(wide))
        if self.negative_eigenvalues:
            beta = 2 * beta
        log_decay = None
        if self.gated:
            dt = dense(x, params["a_proj"]).astype(wide) + params["dt_bias"].astype(wide)
            log_decay = -jnp.exp(params["A_log"].astype(wide)) * jax.nn.softplus(dt)
        o, new_state["memory"] = delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            beta,
            log_decay,
            state["memory"],
            reset=reset,
            sequence_axis=sequence_axis,
        )
        o = merge_heads(rms_normalize(o, params["norm"], _NORM_EPS))
        if self.gates_output:
            o = o * jax.nn.silu(dense(x, params["gate_proj"]))
        return dense(o, params["out_proj"]), new_state
