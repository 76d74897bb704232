"""FFM: fast and forgetful memory."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, complex_dtype, state_dtype
from seqjax.layers._gated import project, recur
from seqjax.layers._math import layer_normalize, real_of_dense
from seqjax.layers.context import Context


@dataclasses.dataclass(frozen=True)
class FFM(Layer):
    """Fast and forgetful memory, for reinforcement learning (arXiv 2310.04128).

        p_t = (x_t W_p + b_p) * sigmoid(x_t W_i + b_i)                         [m]
        S_t[j, k] = exp(-exp(log_decay[j]) + i omega[k]) S_{t-1}[j, k] + p_t[j]     complex [m, c]
        z_t = Re(S_t W_z) + b_z                        all m * c numbers of S_t, complex W_z
        g_t = sigmoid(x_t W_o + b_o)
        y_t = g_t * layernorm(z_t) + (1 - g_t) * (x_t W_s + b_s)

    The layer norm has no scale and no bias. As in the authors' JAX code, the decays
    -exp(log_decay) start evenly spaced from -e to -1e-6, and omega starts at 2 pi / period with
    periods evenly spaced from 1 to 1024. A period of 1 does not oscillate at first. All weights and
    biases start uniform in +-1/sqrt(fan_in), as in torch.

    Departures: W_z multiplies the real and the imaginary parts, as in the authors' code; here it is
    stored as a complex weight, whose imaginary part has the opposite sign. The decay is stored as a
    logarithm in place of being clipped. The norm acts before the gate, as in the authors' torch
    code; their JAX code normalizes g_t * z_t.

    Parameters: memory_proj, input_gate_proj [dim, m]; memory_bias, input_gate_bias [m]; log_decay
    [m]; omega [c]; mix_proj [2, m * c, dim]; gate_proj, skip_proj [dim, dim]; mix_bias, gate_bias,
    skip_bias [dim]. State: S [B, m * c], complex64 (complex128), with index j * c + k.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = FFM(dim=4, memory_dim=8, contexts=2)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 4)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 4)), state)
      >>> y.shape, y_next.shape, state.shape
      ((2, 5, 4), (2, 4), (2, 16))

    Attributes:
      dim: features of input and output.
      memory_dim: number of decays m.
      contexts: number of frequencies c.
      norm_eps: constant added to the variance in the norm.
    """

    dim: int
    memory_dim: int = 32
    contexts: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, memory_dim=self.memory_dim, contexts=self.contexts)
        _checks.above_zero(self, norm_eps=self.norm_eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, memory, size = self.dim, self.memory_dim, self.memory_dim * self.contexts
        params: dict[str, Param | Layer] = {
            "log_decay": Param((memory,), (None,), "recurrence", _log_decays),
            "omega": Param((self.contexts,), (None,), "recurrence", _frequencies),
            "mix_proj": Param(
                (2, size, dim), (None, "state", "embed"), "weight", _uniform(2 * size)
            ),
            "mix_bias": Param((dim,), ("embed",), "bias", _uniform(2 * size)),
        }
        for name, width in (
            ("memory", memory),
            ("input_gate", memory),
            ("gate", dim),
            ("skip", dim),
        ):
            axis = "state" if width == memory else None
            params[f"{name}_proj"] = Param((dim, width), ("embed", axis), "weight", _uniform(dim))
            params[f"{name}_bias"] = Param((width,), (axis,), "bias", _uniform(dim))
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return jnp.zeros((batch_size, self.memory_dim * self.contexts), complex_dtype(dtype))

    def state_flops(self) -> int:
        return 8 * self.memory_dim * self.contexts  # one complex product and sum

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        into, input_gate, gate, skip = (
            project(x, params[f"{name}_proj"], params[f"{name}_bias"])
            for name in ("memory", "input_gate", "gate", "skip")
        )
        real, imag = jnp.broadcast_arrays(
            -jnp.exp(params["log_decay"].astype(wide))[:, None], params["omega"].astype(wide)
        )
        decay = jnp.exp(lax.complex(real, imag)).reshape(-1)
        driven = jnp.repeat(into * jax.nn.sigmoid(input_gate), self.contexts, axis=-1)
        memory, state = recur(decay, lax.complex(driven, jnp.zeros_like(driven)), state, context)
        z = real_of_dense(memory, params["mix_proj"], x.dtype).astype(wide)
        z = z + params["mix_bias"].astype(wide)
        z = layer_normalize(z, jnp.ones((), wide), None, self.norm_eps)
        gate = jax.nn.sigmoid(gate)
        return (gate * z + (1 - gate) * skip).astype(x.dtype), state


def _uniform(fan_in: int) -> Any:
    return _init.uniform(-(fan_in**-0.5), fan_in**-0.5)


def _log_decays(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.log(np.linspace(math.e, 1e-6, shape[0])), dtype)


def _frequencies(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(2 * np.pi / np.linspace(1, 1024, shape[0]), dtype)
