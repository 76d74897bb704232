"""Array functions that several layers share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqjax.layers._base import state_dtype
from seqjax.ops.matrix_state.input_maps import l2_normalize as l2_normalize


class Adapted(NamedTuple):
    """A weight [I, O] plus the product of two low-rank factors, [I, R] and [R, O]."""

    weight: jax.Array
    down: jax.Array
    up: jax.Array


def dense(x: jax.Array, weight: jax.Array | Adapted, bias: jax.Array | None = None) -> jax.Array:
    """Multiply x [..., I] by weight [I, O], in the dtype of `x`, and add a bias [O]."""
    if isinstance(weight, Adapted):
        return dense(x, weight.weight, bias) + dense(dense(x, weight.down), weight.up)
    # One leading axis: on CPU the gradient of a product over two axes transposes its operands, and
    # takes twice the time.
    rows = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)
    y = rows.reshape(*x.shape[:-1], weight.shape[-1])
    return y if bias is None else y + bias.astype(x.dtype)


def block_dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply x [..., G * I] by the block-diagonal weight [G, I, O]; return [..., G * O]."""
    groups, inputs, _ = weight.shape
    blocks = x.reshape(*x.shape[:-1], groups, inputs)
    y = jnp.einsum("...gi,gio->...go", blocks, weight.astype(x.dtype))
    return merge_heads(y)


def wide_dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply x [..., I] by weight [I, O] in the dtype of `x`; return sums in the state dtype.

    Use it for logarithms: an exponential turns their rounding error into a relative error.
    """
    weight = weight.astype(x.dtype)
    return jnp.matmul(x, weight, preferred_element_type=state_dtype(x.dtype))


def complex_dense(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multiply real x [..., I] by a complex weight [2, I, O]; return the parts in the state dtype.

    The real and the imaginary part stay separate, so that the caller can scale them by real numbers
    at half the cost.
    """
    wide = state_dtype(x.dtype)
    weight = weight.astype(x.dtype)
    return (
        jnp.matmul(x, weight[0], preferred_element_type=wide),
        jnp.matmul(x, weight[1], preferred_element_type=wide),
    )


def real_of_dense(h: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return Re(h W) for complex h [..., N] and a complex weight [2, N, O], in the real `dtype`."""
    weight = weight.astype(dtype)
    return h.real.astype(dtype) @ weight[0] - h.imag.astype(dtype) @ weight[1]


def gelu_glu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return a * sigmoid(b) with (a, b) = gelu(x) W, x [..., I] and W [I, 2 O]."""
    value, gate = jnp.split(dense(jax.nn.gelu(x), weight), 2, axis=-1)
    return value * jax.nn.sigmoid(gate)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Reshape [B, T, H * K] to [B, T, H, K]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """Reshape [B, T, H, K] to [B, T, H * K]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """Repeat the heads of x [B, T, G, K]: head h of [B, T, H, K] is head h // (H / G) of `x`."""
    groups = x.shape[2]
    return x if groups == heads else jnp.repeat(x, heads // groups, axis=2)


def rms_normalize(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in the state dtype."""
    wide = x.astype(state_dtype(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(wide.dtype)).astype(x.dtype)


def layer_normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float
) -> jax.Array:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis.

    The variance is the biased one. The statistics are computed in the state dtype.
    """
    wide = x.astype(state_dtype(x.dtype))
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    y = centered * jax.lax.rsqrt(variance + eps) * scale.astype(wide.dtype)
    if bias is not None:
        y = y + bias.astype(wide.dtype)
    return y.astype(x.dtype)
