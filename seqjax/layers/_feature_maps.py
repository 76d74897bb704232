"""Feature maps of queries and keys, which replace the exponential of softmax attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.layers._base import state_dtype

FEATURE_MAPS = ("elu", "relu", "softmax", "dpfp", "performer", "identity")
# A product of rectified features can be zero in all places, for example for alternating signs.
_SUM_EPS = 1e-6


def width(name: str, keys: int, order: int) -> int:
    """Return the number of features that a map makes from `keys` numbers."""
    if name == "dpfp":
        return 2 * order * keys
    return order * keys if name == "performer" else keys


def features(name: str, x: jax.Array, order: int = 1, seed: int = 0) -> jax.Array:
    """Apply a feature map over the last axis of x [..., K], in the state dtype.

    Args:
      name: one of `FEATURE_MAPS`.
      x: [..., K].
      order: the number of rotations of "dpfp"; random features of "performer" per number.
      seed: seed of the random features of "performer".
    """
    x = x.astype(state_dtype(x.dtype))
    match name:
        case "elu":
            return jax.nn.elu(x) + 1
        case "relu":
            return jax.nn.relu(x)
        case "softmax":
            return jax.nn.softmax(x, axis=-1)
        case "dpfp":
            return _dpfp(x, order)
        case "performer":
            return _performer(x, order, seed)
        case _:
            return x


def sum_normalize(x: jax.Array) -> jax.Array:
    """Return x / (sum(x) + 1e-6) over the last axis."""
    return x / (jnp.sum(x, axis=-1, keepdims=True) + _SUM_EPS)


def _dpfp(x: jax.Array, order: int) -> jax.Array:
    """Return r * roll(r, j) for j = 1 .. order with r = relu([x, -x]) (arXiv 2102.11174)."""
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([r * jnp.roll(r, j, axis=-1) for j in range(1, order + 1)], axis=-1)


def taylor(x: jax.Array) -> jax.Array:
    """Return features with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(K)."""
    x = x * x.shape[-1] ** -0.25
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, 0.5**0.5 * pairs(x)], axis=-1)


def squared(x: jax.Array) -> jax.Array:
    """Return features with phi(q) . phi(k) = s^2, s = q . k / sqrt(K)."""
    return pairs(x * x.shape[-1] ** -0.25)


def pairs(x: jax.Array) -> jax.Array:
    """Return the K (K + 1) / 2 products of pairs of x [..., K], those of unequal ones * sqrt(2)."""
    first, second = np.triu_indices(x.shape[-1])
    factor = np.where(first == second, 1.0, 2**0.5)
    return x[..., first] * x[..., second] * jnp.asarray(factor, x.dtype)


def _performer(x: jax.Array, order: int, seed: int) -> jax.Array:
    """Return exp(w . x - |x|^2 / 2) / sqrt(M) for M fixed directions w (FAVOR+, 2009.14794)."""
    keys = x.shape[-1]
    x = x * keys**-0.25
    w = jnp.asarray(random_directions(keys, order, seed), x.dtype)
    half_square = jnp.sum(x * x, axis=-1, keepdims=True) / 2
    return jnp.exp(x @ w - half_square) * w.shape[1] ** -0.5


@functools.lru_cache(maxsize=64)
def random_directions(keys: int, order: int, seed: int) -> np.ndarray:
    """Return [K, order * K]: orthogonal blocks whose columns have the lengths of normal vectors."""
    rng = np.random.RandomState(seed)
    blocks = []
    for _ in range(order):
        normals = rng.standard_normal((2, keys, keys))
        q, r = np.linalg.qr(normals[0])
        # With a positive diagonal of r, the columns of q are uniform on the sphere. LAPACK's signs
        # would put them on one side of it.
        blocks.append(q * np.sign(np.diag(r)) * np.linalg.norm(normals[1], axis=0))
    return np.concatenate(blocks, axis=1)
