"""Matrix-state recurrences in chunks: matmuls inside a chunk, an affine map of the state per chunk.

Whatever the recurrence, a chunk of C steps entered with state S amounts to

    O  = O_c + R_c S        outputs [C, V]
    S' = X_c + M_c S        the state that leaves [K, V]

and O_c, R_c, X_c, M_c do not depend on S. So chunks are prepared side by side, and only the second
line runs from chunk to chunk, in order or in log depth.

Decays enter as exp(sum of g over the steps in between). Such a sum is never the difference of two
longer ones: g may be -inf (a reset enters as just that), and differences of large sums have no
correct digits left. All exponents are at most zero, so nothing overflows.

A matmul multiplies what a mask sets to zero, and zero times NaN is NaN. So steps with non-finite
input are taken out before the matmuls, and every output and state that they reach, and no other,
is NaN.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops._time_scan import chunk_scan

SUB = 16  # steps in a sub-chunk: inside one, decays per channel are taken pair by pair

Arrays = Mapping[str, jax.Array]


ALGORITHMS = ("sequential", "chunked", "associative")


def choose(algorithm: str | None, length: int) -> str:
    """The algorithm for T steps where the caller named none.

    A handful of steps does not fill a chunk. Beyond that, chunks are what training needs: with
    gradients they were the faster on CPU for every op and decay, at 2048 steps; only forward, a
    CPU is faster step by step. The bound of 8 is a guess that `experiments.bench choice` is there
    to replace.
    """
    return algorithm or ("sequential" if length < 8 else "chunked")


def log_decay_of(g: jax.Array | None, like: jax.Array) -> jax.Array:
    """The log decay as [B, T, 1 or H, 1 or K]: none is zero."""
    if g is None:
        return jnp.zeros((*like.shape[:2], 1, 1), jnp.float32)
    return g if g.ndim == 4 else g[..., None]


class ChunkMap(NamedTuple):
    """A chunk as an affine map of the state."""

    outputs: jax.Array  # O_c [..., C, V]
    reads: jax.Array  # R_c [..., C, K]
    offset: jax.Array  # X_c [..., K, V]
    transition: jax.Array  # M_c [..., K, K], or [..., K, 1] or [..., 1, 1] where it is diagonal


Prepare = Callable[[Arrays], ChunkMap]


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product with float32 accuracy; on TPU the default would round the factors to bfloat16."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def read(state: jax.Array, key: jax.Array) -> jax.Array:
    """S^T k, for a single step: [..., K, V] and [..., K] -> [..., V]."""
    return jnp.einsum("...kv,...k->...v", state, key, precision=lax.Precision.HIGHEST)


def _sums(g: jax.Array, include: jax.Array) -> jax.Array:
    """sum_i include[t, i] g_i over axis -2, -inf where a -inf is included.

    A product with zeros and ones adds exactly the terms that belong to a sum. The -inf would turn
    the zeros into NaN, so they are counted apart.
    """
    include = include.astype(g.dtype)
    lowest = jnp.isneginf(jnp.real(g))
    total = matmul(include, jnp.where(lowest, jnp.zeros_like(g), g))
    hit = matmul(jnp.real(include), lowest.astype(jnp.real(include).dtype)) > 0
    return jnp.where(hit, jnp.full_like(total, -jnp.inf), total)


def _order(size: int) -> tuple[jax.Array, jax.Array]:
    steps = jnp.arange(size)
    return steps[:, None], steps[None, :]


def cumulative(g: jax.Array) -> jax.Array:
    """sum_{i <= t} g_i over axis -2."""
    t, i = _order(g.shape[-2])
    return _sums(g, i <= t)


def remaining(g: jax.Array) -> jax.Array:
    """sum_{i > t} g_i over axis -2."""
    t, i = _order(g.shape[-2])
    return _sums(g, i > t)


def between(g: jax.Array) -> jax.Array:
    """sum_{j < i <= t} g_i, and -inf for t < j: [..., C, K] -> [..., C (t), C (j), K]."""
    size, channels = g.shape[-2:]
    t, j = _order(size)
    lowest = jnp.isneginf(jnp.real(g))
    finite = jnp.where(lowest, jnp.zeros_like(g), g)
    after = (t > j)[..., None]
    terms = jnp.where(after, finite[..., :, None, :], jnp.zeros_like(finite[..., None, :]))
    upto = (j <= t).astype(g.dtype)
    sums = matmul(upto, terms.reshape(*g.shape[:-1], size * channels))
    sums = sums.reshape(*g.shape[:-2], size, size, channels)
    count = matmul(jnp.real(upto), lowest.astype(jnp.real(upto).dtype))
    hit = count[..., :, None, :] != count[..., None, :, :]  # a -inf after j, up to t
    return jnp.where(hit | (t < j)[..., None], jnp.full_like(sums, -jnp.inf), sums)


def decayed_products(
    lefts: tuple[jax.Array, ...], right: jax.Array, g: jax.Array
) -> tuple[jax.Array, ...]:
    """P[t, j] = sum_d left[t, d] exp(sum_{j < i <= t} g[i, d]) right[j, d] for j <= t, else 0.

    Args:
      lefts: arrays [..., C, K].
      right: [..., C, K].
      g: [..., C, 1] or [..., C, K].

    One decay for all channels comes out of the product. Decays per channel do not, but they
    factorise at any step between j and t: with the start of t's sub-chunk as that step both
    factors are at most one, and no decay after t enters. Inside a sub-chunk there is no such step
    for every pair, so pairs are taken one by one.
    """
    if g.shape[-1] == 1:
        decay = jnp.exp(between(g))[..., 0]
        return tuple(matmul(left, right.mT) * decay for left in lefts)
    size = g.shape[-2]
    sub = SUB if size % SUB == 0 else size

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], size // sub, sub, x.shape[-1])

    g, right, lefts = split(g), split(right), tuple(map(split, lefts))
    pairs = jnp.exp(between(g)) * right[..., None, :, :]
    same = [jnp.sum(left[..., :, None, :] * pairs, axis=-1) for left in lefts]
    into = [left * jnp.exp(cumulative(g)) for left in lefts]
    out_of, total = remaining(g), jnp.sum(g, axis=-2, keepdims=True)
    rows: list[list[jax.Array]] = [[] for _ in lefts]
    for s in range(size // sub):
        # exponents from each earlier step up to the start of sub-chunk s
        earlier = [out_of[..., p, :, :] for p in range(s)]
        for p in range(s):
            for between_them in range(p + 1, s):
                earlier[p] = earlier[p] + total[..., between_them, :, :]
        for row, left, own in zip(rows, into, same, strict=True):
            blocks = [own[..., s, :, :]]
            if s:
                reached = jnp.concatenate(
                    [right[..., p, :, :] * jnp.exp(e) for p, e in enumerate(earlier)], axis=-2
                )
                blocks.insert(0, matmul(left[..., s, :, :], reached.mT))
            block = jnp.concatenate(blocks, axis=-1)
            padding = [(0, 0)] * (block.ndim - 1) + [(0, size - block.shape[-1])]
            row.append(jnp.pad(block, padding))
    return tuple(jnp.concatenate(row, axis=-2) for row in rows)


@jax.custom_jvp
def inverse_unit_lower(n: jax.Array) -> jax.Array:
    """(I + N)^-1 for strictly lower triangular N [..., C, C], by halves.

    inv [[A, 0], [N, B]] = [[A', 0], [-B' N A', B']] with A', B' the inverses of the halves. Unlike
    the series in powers of N, no intermediate exceeds the result and its factors.
    """
    size = n.shape[-1]
    if size > SUB and size % 2 == 0:
        half = size // 2
        halves = inverse_unit_lower(jnp.stack([n[..., :half, :half], n[..., half:, half:]]))
        corner = -matmul(matmul(halves[1], n[..., half:, :half]), halves[0])
        top = jnp.concatenate([halves[0], jnp.zeros_like(corner)], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([corner, halves[1]], axis=-1)], axis=-2)
    # The same from below, without cutting small blocks apart: X is the inverse of the diagonal
    # blocks of size `width`, `links` what joins them in pairs.
    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=n.dtype), n.shape)
    width = 1
    while width < size:
        joined = (rows // (2 * width) == columns // (2 * width)) & (
            rows // width > columns // width
        )
        links = jnp.where(joined, n, jnp.zeros_like(n))
        inverse = inverse - matmul(matmul(inverse, links), inverse)
        width *= 2
    return inverse


@inverse_unit_lower.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> Any:
    inverse = inverse_unit_lower(primals[0])
    return inverse, -matmul(matmul(inverse, jnp.tril(tangents[0], -1)), inverse)


def apply_transition(transition: jax.Array, state: jax.Array) -> jax.Array:
    """M S, for a full or a diagonal M."""
    return transition * state if transition.shape[-1] == 1 else matmul(transition, state)


def apply_alive(alive: jax.Array, transition: jax.Array, state: jax.Array) -> jax.Array:
    """M S in the rows that are alive, zero in the others, whatever S holds.

    M is masked as well, so that the gradients of the others are zero and not zero times S.
    """
    zero = jnp.zeros((), state.dtype)
    if transition.shape[-1] == 1:  # a diagonal: all of the state is alive or none of it
        return transition * jnp.where(alive, state, zero)
    return jnp.where(alive, matmul(jnp.where(alive, transition, zero), state), zero)


def whole_transition(
    local: Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]], state: jax.Array, v: jax.Array
) -> jax.Array:
    """M of a whole sequence [B, H, K, K]: what becomes of the identity when nothing is written."""
    size = state.shape[-2]
    identity = jnp.eye(size, dtype=state.dtype) + jnp.zeros_like(state[..., :1])
    return local(identity, jnp.zeros_like(v, shape=(*v.shape[:-1], size)))[1]


def scan_chunks(
    prepare: Prepare,
    arrays: dict[str, jax.Array],
    state: jax.Array,
    reset: jax.Array | None,
    *,
    out_dtype: Any,
    chunk_size: int,
    log_depth: bool,
) -> tuple[jax.Array, jax.Array]:
    """Run a recurrence chunk by chunk.

    Args:
      prepare: makes the `ChunkMap` of chunks, from arrays [..., C, features].
      arrays: [B, T, H, features] by name; "g", the log decay, and "q", which writes nothing, have
        a role here, and a step in which all but "g" are zero must leave the state to its decay.
      state: [B, H, K, V].
      reset: [B, T] or None.
      out_dtype: of the outputs.
      chunk_size: C.
      log_depth: prepare all chunks side by side and combine them in log depth. Otherwise as many
        are prepared at once as make 16 products of a kind, and the others wait, so that the
        memory is that of a few chunks.

    Returns:
      (outputs [B, T, H, V], final state).
    """
    length = arrays["q"].shape[1]
    if reset is None:
        reset = jnp.zeros(arrays["q"].shape[:2], bool)
    dtype = state.dtype

    def advance(state: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        arrays, reset = block
        steps = reset.shape[0]
        size = min(chunk_size, -(-steps // SUB) * SUB)
        padding = -steps % size
        count = (steps + padding) // size

        def chunks(x: jax.Array) -> jax.Array:  # [time, B, H, F] -> [count, B, H, C, F]
            x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
            x = x.reshape(count, size, *x.shape[1:])
            return jnp.moveaxis(x, 1, -2)

        values = {name: chunks(x.astype(dtype)) for name, x in arrays.items()}
        cut = chunks(reset[:, :, None, None])[..., 0]  # [count, B, 1, C]
        values, spoiled, unread = _take_out_non_finite(values, cut)
        values["g"] = jnp.where(cut[..., None], jnp.full_like(values["g"], -jnp.inf), values["g"])
        maps = prepare(values)
        alive = ~_reached(cut, jnp.zeros_like(cut))[..., None]
        nan = jnp.full((), jnp.nan, dtype)
        offset = jnp.where(spoiled[..., -1:, None], nan, maps.offset)
        states, final = _carry(maps._replace(offset=offset), alive[..., -1:, :], state, log_depth)
        reads = apply_alive(alive, maps.reads, states)
        spoiled = (spoiled | unread)[..., None]
        out = jnp.where(spoiled, nan, maps.outputs + reads).astype(out_dtype)
        out = jnp.moveaxis(out, -2, 1).reshape(count * size, *out.shape[1:3], out.shape[-1])
        return final, out[:steps]

    at_once = max(1, 16 // (state.shape[0] * state.shape[1]))
    block_size = length if log_depth else chunk_size * at_once
    return chunk_scan(advance, state, (arrays, reset), block_size)


def _take_out_non_finite(
    values: dict[str, jax.Array], cut: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Zero the steps with non-finite numbers, and say what they reach.

    Returns the arrays, the steps that find such a number written since the last reset, and the
    steps whose own query is such a number.
    """
    finite = {name: jnp.all(jnp.isfinite(x), axis=-1) for name, x in values.items()}
    g = jnp.real(values["g"])
    finite["g"] = jnp.all(jnp.isneginf(g) | jnp.isfinite(values["g"]), axis=-1)
    asks = finite.pop("q")
    writes = functools.reduce(jnp.logical_and, finite.values())
    kept = {
        name: jnp.where((asks if name == "q" else writes)[..., None], x, jnp.zeros_like(x))
        for name, x in values.items()
    }
    return kept, _reached(~writes, cut), ~asks


def _reached(events: jax.Array, cut: jax.Array) -> jax.Array:
    """Whether an event [..., C] has happened at or before each step, and no cut since."""
    t, i = _order(cut.shape[-1])
    count = jnp.sum(jnp.where(i <= t, cut[..., None, :], False), axis=-1, dtype=jnp.int32)
    same = count[..., :, None] == count[..., None, :]
    return jnp.any(events[..., None, :] & same & (i <= t), axis=-1)


def _carry(
    maps: ChunkMap, alive: jax.Array, state: jax.Array, log_depth: bool
) -> tuple[jax.Array, jax.Array]:
    """The states that enter the chunks [count, B, H, K, V], and the one that leaves the last."""
    if log_depth:

        def combine(early: Any, late: Any) -> Any:
            transition, offset, alive = late
            return (
                apply_transition(transition, early[0]),
                apply_alive(alive, transition, early[1]) + offset,
                early[2] & alive,
            )

        prefix = lax.associative_scan(combine, (maps.transition, maps.offset, alive), axis=0)
        leaving = apply_alive(prefix[2], prefix[0], state) + prefix[1]
        return jnp.concatenate([state[None], leaving[:-1]]), leaving[-1]

    def step(state: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        transition, offset, alive = chunk
        return apply_alive(alive, transition, state) + offset, state

    final, states = lax.scan(step, state, (maps.transition, maps.offset, alive))
    return states, final
