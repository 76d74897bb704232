"""Small matrices, their products and broadcasts.

`matmul` has float32 accuracy on every backend. `product` has the accuracy of its inputs' dtype, and
runs on the matrix units of GPUs and TPUs.

Transposing a broadcast gives a sum. On CPU, XLA's sum over a minor axis is sequential and ten
times slower than a product with a vector of ones. Its sum over a major axis is hardly faster. On
other backends the two cost the same. So the adjoints of the broadcasts below are products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqjax.ops.core import jax_compat
from seqjax.ops.core.custom_adjoint import custom_adjoint

SUB, SUB_OF_ACCELERATORS = 16, 4  # the size up to which a block is inverted without splitting it


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b with float32 accuracy. On TPU the default rounds the factors to bfloat16."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def matmul_tn(a: jax.Array, b: jax.Array, accelerator: bool) -> jax.Array:
    """Return a^T b with float32 accuracy.

    With explicit transposes, XLA for GPU would transpose all arrays that the factors are computed
    from. XLA for CPU is faster with them.
    """
    if accelerator:
        return jnp.einsum("...tk,...tj->...kj", a, b, precision=lax.Precision.HIGHEST)
    return matmul(b.mT, a).mT


def product(
    a: jax.Array,
    b: jax.Array,
    subscripts: str = "tk,kj->tj",
    rows: jax.Array | None = None,
    narrow: bool = False,
) -> jax.Array:
    """Return a b, computed by the matrix units of accelerators.

    Two factors in bfloat16 stay as they are and are accumulated in float32, which is the dtype of
    the result unless `narrow`. Other factors are widened to the same dtype, and
    `jax.default_matmul_precision` decides: by default, GPUs round float32 factors to 10 bits
    (TF32), and TPUs to bfloat16. The same holds for the products of the adjoint.

    Args:
      a: [..., t, k].
      b: [..., k, j], with as many axes as `a`; leading axes of 1 are repeated.
      subscripts: other axes, such as "tk,jk->tj" for a b^T.
      rows: [..., t, 1] bool, True for rows that are not zero, by default all. Non-finite elements
        of b then turn these rows into NaN and no cotangent: zero times NaN is NaN.
      narrow: whether the product of bfloat16 factors is rounded to bfloat16. If the matmul does so,
        and not another kernel, GPUs write half the bytes.
    """
    left, right, result = subscripts.replace("->", ",").split(",")
    if rows is None and a.dtype == b.dtype != jnp.bfloat16:
        return _einsum(a, b, left, right, result)  # derivatives of JAX

    def forward(a: jax.Array, b: jax.Array, rows: jax.Array | None) -> jax.Array:
        made = _einsum(a, b, left, right, result, narrow=narrow)
        return made if rows is None else jnp.where(rows, made, jnp.zeros_like(made))

    def adjoint(args: Any, ct: jax.Array) -> list[jax.Array]:
        a, b, rows = args
        if rows is not None:
            ct = jnp.where(rows, ct, jnp.zeros_like(ct))
            b = jnp.where(jnp.isfinite(b), b, jnp.zeros_like(b))
        return [
            sum_to(_einsum(ct, b, result, right, left), a.shape).astype(a.dtype),
            sum_to(_einsum(a, ct, left, result, right), b.shape).astype(b.dtype),
        ]

    return custom_adjoint(forward, adjoint)(a, b, rows)


def sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum x over the axes that are repeated when an array of `shape` is broadcast to that of x."""
    for axis, size in enumerate(shape):
        count = x.shape[axis]
        if size != 1 or count == 1:
            continue
        if isinstance(count, int) and count <= 16:
            parts = [lax.index_in_dim(x, n, axis) for n in range(count)]
            x = functools.reduce(jnp.add, parts)
        else:
            rows = x.reshape(*x.shape[:axis], count, -1)
            total = matmul(jnp.ones((*rows.shape[:-2], 1, count), x.dtype), rows)
            x = total.reshape(*x.shape[:axis], 1, *x.shape[axis + 1 :])
    return x


def spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """Repeat leading axes of 1 of x [..., C, F] as in `like`; the last two axes may differ."""
    shape = (*jnp.broadcast_shapes(x.shape[:-2], like.shape[:-2]), *x.shape[-2:])
    if shape == x.shape:
        return x

    def adjoint(args: Any, ct: jax.Array) -> list[jax.Array]:
        return [sum_to(ct, args[0].shape)]

    return custom_adjoint(lambda x: jnp.broadcast_to(x, shape), adjoint)(x)


def _einsum(x: jax.Array, y: jax.Array, *axes: str, narrow: bool = False) -> jax.Array:
    subscripts = "...{},...{}->...{}".format(*axes)
    if x.dtype == y.dtype == jnp.bfloat16:
        dtype = jnp.bfloat16 if narrow else jnp.float32
        return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)
    wide = x.dtype if x.dtype.itemsize >= y.dtype.itemsize else y.dtype
    return jnp.einsum(subscripts, x.astype(wide), y.astype(wide))


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b^T: [..., K] and [..., V] -> [..., K, V]."""
    return jnp.einsum("...k,...v->...kv", a, b)


def read(state: jax.Array, key: jax.Array) -> jax.Array:
    """Return S^T k for a single step: [..., K, V] and [..., K] -> [..., V].

    Leading axes of size 1 in the key are repeated first. Without this, `einsum` transposes the
    state.
    """
    if key.shape[:-1] != state.shape[:-2]:
        key = spread(key[..., None], state)[..., 0]
    return jnp.einsum("...kv,...k->...v", state, key, precision=lax.Precision.HIGHEST)


def stored_once(arrays: Any, when: bool) -> Any:
    """Return the arrays; if `when`, one kernel stores each, for all kernels that read it.

    XLA for GPU otherwise computes elementwise results again in every kernel that reads them, and
    merges matmuls that share a factor, with copies of their results.
    """
    return lax.optimization_barrier(arrays) if when else arrays


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse_unit_lower(n: jax.Array, accelerator: bool = False) -> jax.Array:
    """Return (I + N)^-1 for strictly lower triangular N [..., C, C], by halves.

    inv [[A, 0], [N, B]] = [[A', 0], [-B' N A', B']] with A', B' the inverses of the halves. Unlike
    the series in powers of N, no intermediate exceeds the result and its factors. On accelerators,
    smaller blocks are split.
    """
    size = n.shape[-1]
    if size > (SUB_OF_ACCELERATORS if accelerator else SUB) and size % 2 == 0:
        half = size // 2
        blocks = jnp.stack([n[..., :half, :half], n[..., half:, half:]])
        halves = inverse_unit_lower(blocks, accelerator)
        corner = -matmul(matmul(halves[1], n[..., half:, :half]), halves[0])
        top = jnp.concatenate([halves[0], jnp.zeros_like(corner)], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([corner, halves[1]], axis=-1)], axis=-2)
    # The same recursion bottom-up, without splitting small blocks. `inverse` is the inverse of the
    # diagonal blocks of size `width`, and `links` are the blocks that join them in pairs.
    rows, columns = np.arange(size)[:, None], np.arange(size)[None, :]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=n.dtype), n.shape)
    # Give the identity the varying mesh axes of `n`. For size 1 nothing else would.
    inverse, _ = jax_compat.match_varying(inverse, n)
    width = 1
    while width < size:
        joined = (rows // (2 * width) == columns // (2 * width)) & (
            rows // width > columns // width
        )
        links = jnp.where(joined, n, jnp.zeros_like(n))
        change = links if width == 1 else matmul(matmul(inverse, links), inverse)
        inverse = inverse - change
        width *= 2
    return inverse


@inverse_unit_lower.defjvp
def _inverse_jvp(accelerator: bool, primals: Any, tangents: Any) -> Any:
    inverse = inverse_unit_lower(primals[0], accelerator)
    return inverse, -matmul(matmul(inverse, jnp.tril(tangents[0], -1)), inverse)


def diagonal(rows: jax.Array) -> jax.Array:
    """Return diag(rows): [..., K] -> [..., K, K]."""
    size = rows.shape[-1]
    return along_rows(rows, size) * jnp.eye(size, dtype=rows.dtype)


def along_rows(x: jax.Array, size: int) -> jax.Array:
    """Repeat every element along a row: [..., K] -> [..., K, size]."""
    return _along_rows(size)(x)


@functools.cache
def _along_rows(size: int) -> Any:
    return custom_adjoint(
        lambda x: jnp.broadcast_to(x[..., None], (*x.shape, size)),
        lambda args, ct: [matmul(ct, jnp.ones((size,), ct.dtype))],
    )


def down_columns(x: jax.Array, size: int) -> jax.Array:
    """Repeat every element down a column: [..., K] -> [..., size, K]."""
    return _down_columns(size)(x)


@functools.cache
def _down_columns(size: int) -> Any:
    return custom_adjoint(
        lambda x: jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], size, x.shape[-1])),
        lambda args, ct: [matmul(jnp.ones((*ct.shape[:-2], 1, size), ct.dtype), ct)[..., 0, :]],
    )


def everywhere(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat an array for every element of an array of this shape: [...] -> [*shape, ...]."""
    leading = len(shape)

    def adjoint(args: Any, ct: jax.Array) -> list[jax.Array]:
        rows = ct.reshape(-1, ct[(0,) * leading].size)
        count = rows.shape[0]
        if isinstance(count, int) and count <= 8:  # known and small: add the rows
            total = sum(rows[1:], start=rows[0])
        else:
            total = matmul(jnp.ones((1, count), ct.dtype), rows)
        return [total.reshape(ct.shape[leading:])]

    return custom_adjoint(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), adjoint)(x)
