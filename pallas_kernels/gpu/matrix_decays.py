"""Decays of the matrix-state kernels on GPU before the kernels: logarithms and their sums."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu.matrix_pairs import LOG_ZERO
from pallas_kernels.gpu.matrix_products import CHUNK


def logarithms(
    log_decay: jax.Array | None, reset: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    """Return finite logarithms of the decays, with resets; zeros of `shape` without decays."""
    logs = jnp.zeros(shape, jnp.float32)
    if log_decay is not None:
        logs = log_decay.astype(jnp.float32)
        logs = jnp.where(logs < LOG_ZERO, LOG_ZERO, logs)
    if reset is None:
        return logs
    return jnp.where(jnp.expand_dims(reset, range(2, logs.ndim)), LOG_ZERO, logs)


def carry(logs: jax.Array, chunks: int) -> jax.Array:
    """Return the decays of whole chunks [B, H, chunks, K], from logarithms [B, T, H, K]."""
    batch, length, *rest = logs.shape
    logs = jnp.pad(logs, ((0, 0), (0, chunks * CHUNK - length), (0, 0), (0, 0)))
    return jnp.exp(jnp.moveaxis(jnp.sum(logs.reshape(batch, chunks, CHUNK, *rest), axis=2), 1, 2))


def sums(logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return exp(g_1 + ... + g_t) and exp(g_{t+1} + ... + g_C) within the chunks."""
    steps = logs.reshape(*logs.shape[:2], -1, CHUNK)
    later = jnp.pad(steps[..., 1:], [(0, 0)] * 3 + [(0, 1)])
    upto, after = jnp.cumsum(steps, axis=-1), lax.cumsum(later, axis=3, reverse=True)
    return jnp.exp(upto).reshape(logs.shape), jnp.exp(after).reshape(logs.shape)
