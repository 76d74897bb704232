"""Maps of the inputs of matrix-state ops: the L2 norm of queries and keys, and gates of decays.

The TPU kernels of `delta_rule` compute these maps. For other calls, XLA computes them before the
recurrence.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.core.checks import state_dtype
from seqjax.types import Array, Float


class SoftplusGate(NamedTuple):
    """Gate of log decays, as in Mamba-2, Gated DeltaNet and Kimi Delta Attention.

        g = -exp(A_log) softplus(x + dt_bias)

    Pass it to an op as `gate`, with x as `log_decay`. It is a pytree of arrays, and has gradients.

    Attributes:
      A_log: [H].
      dt_bias: [H] for x [B, T, H], and [H, K] for x [B, T, H, K].
    """

    A_log: Float[Array, "H"]
    dt_bias: Float[Array, "H"] | Float[Array, "H K"]

    def __call__(self, x: Array) -> Array:
        """Return g, of the shape of x, in float32, or float64 if an array is."""
        wide = state_dtype(x, self.A_log, self.dt_bias)
        return self.rate(x, wide) * jax.nn.softplus(x.astype(wide) + self.dt_bias.astype(wide))

    def rate(self, x: Array, dtype: Any) -> Array:
        """Return -exp(A_log), broadcast to the shape of `dt_bias`."""
        rate = -jnp.exp(self.A_log.astype(dtype))
        return jnp.broadcast_to(rate[:, None] if x.ndim == 4 else rate, x.shape[2:])


def check_gate(
    op: str, gate: Any, log_decay: Array | None
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays of a gate by name, and the patterns of their shapes."""
    if not isinstance(gate, SoftplusGate):
        raise ValueError(f"{op}: `gate` must be a SoftplusGate, got {type(gate).__name__}.")
    if log_decay is None:
        raise ValueError(f"{op}: `log_decay` must be the input of the gate, got None.")
    arrays = {name: jnp.asarray(x) for name, x in gate._asdict().items()}
    return arrays, {"A_log": "H", "dt_bias": "H K" if log_decay.ndim == 4 else "H"}


def open_gate(log_decay: Any) -> Any:
    """Return log decays from log decays, or from the pair of a gate's input and the gate."""
    return log_decay[1](log_decay[0]) if isinstance(log_decay, tuple) else log_decay


def l2_normalize(x: Array, eps: float = 1e-6) -> Array:
    """Return x / sqrt(sum(x^2) + eps) over the last axis, computed in the state dtype."""
    wide = x.astype(state_dtype(x))
    return (wide * lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def normalize(arrays: dict[str, Array]) -> dict[str, Array]:
    """Return the inputs with normalized queries and keys."""
    return arrays | {name: l2_normalize(arrays[name]) for name in ("q", "k")}
