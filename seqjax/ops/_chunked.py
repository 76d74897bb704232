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

from seqjax.ops._broadcast import along_rows
from seqjax.ops._reverse_rule import reverse_rule

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


def matmul_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T."""
    return jnp.einsum("...tk,...jk->...tj", a, b, precision=lax.Precision.HIGHEST)


def decay_by_step(g: jax.Array | None, like: jax.Array) -> jax.Array | None:
    """The decays in the shape of the keys, for forms that take step after step."""
    if g is None:
        return None
    g = g if g.ndim == 4 else g[..., None]
    return jnp.broadcast_to(decay_of(g.astype(like.dtype)), like.shape)


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T: [..., K] and [..., V] -> [..., K, V]."""
    return jnp.einsum("...k,...v->...kv", a, b)


def read(state: jax.Array, key: jax.Array) -> jax.Array:
    """S^T k, for a single step: [..., K, V] and [..., K] -> [..., V]."""
    return jnp.einsum("...kv,...k->...v", state, key, precision=lax.Precision.HIGHEST)


def _products(g: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Products of the decays a_i = exp(g_i) in blocks of 1, 2, 4, ..., C steps, C a power of two.

    Returns two lists of arrays [..., C, K]: upto[n][t], the product from the start of t's block of
    2^n steps to t, and after[n][j], from j + 1 to the end of j's block. Products, not exponentials
    of sums: one exponential a step and channel is all there is, and g may be -inf.
    """
    upto, after = [decay_of(g)], [jnp.ones_like(g)]
    for width in _widths(1, g.shape[-2]):
        first, second = _halves(upto[-1], width)
        left, right = _halves(after[-1], width)
        upto.append(_join(first, first[..., -1:, :] * second, g.shape))
        after.append(_join(left * second[..., -1:, :], right, g.shape))
    return upto, after


@jax.custom_jvp
def decay_through(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a_1 ... a_t and a_{t+1} ... a_C for a_i = exp(g_i): [..., C, K] each."""
    upto, after = _products(g)
    return upto[-1], after[-1]


@decay_through.defjvp
def _decay_through_jvp(primals: Any, tangents: Any) -> Any:
    upto, after = decay_through(*primals)
    (dg,) = tangents
    return (upto, after), (upto * sums_through(dg), after * sums_after(dg))


def _sums(after: bool, transposed: bool, x: jax.Array) -> jax.Array:
    t, i = _order(x.shape[-2])
    included = i > t if after else i <= t
    included = (included.T if transposed else included).astype(x.dtype)
    # With a matrix of its own for each chunk: XLA on CPU would make one product with x^T of a
    # shared one, and take ten times as long to copy x^T.
    return matmul(jnp.broadcast_to(included, (*x.shape[:-2], *included.shape)), x)


def _summing(after: bool) -> Callable[[jax.Array], jax.Array]:
    return reverse_rule(
        functools.partial(_sums, after, False), lambda _, ct: [_sums(after, True, ct)]
    )


sums_through = _summing(after=False)  # x_1 + ... + x_t over axis -2
sums_after = _summing(after=True)  # x_{t+1} + ... + x_C


def _halves(x: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The first and second halves of blocks of 2 * width steps: two [..., blocks, width, K]."""
    blocks = x.reshape(*x.shape[:-2], -1, 2, width, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _join(first: jax.Array, second: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.concatenate([first, second], axis=-2).reshape(shape)


@jax.custom_jvp
def decayed_products(
    lefts: tuple[jax.Array, ...], rights: tuple[jax.Array, ...], g: jax.Array
) -> list[list[jax.Array]]:
    """P[t, j] = sum_d left[t, d] a_{j+1, d} ... a_{t, d} right[j, d] for j <= t, else 0; a = exp(g).

    Args:
      lefts: arrays [..., C, K].
      rights: arrays [..., C, K].
      g: [..., C, 1] or [..., C, K].

    Returns:
      P of every left and right [..., C, C]; what they share becomes one matmul.

    One decay for all channels comes out of the product. Decays per channel do not, but they
    factorise at any step between j and t. For every t and j < t there is one width at which j is
    in the first and t in the second half of the same block: the middle is such a step, and all
    pairs of that width are one matmul per block. Nothing is divided, no factor exceeds one, and
    no decay after t enters.
    """
    size, channels = rights[0].shape[-2:]
    if g.shape[-1] == 1 and channels > 1:
        one = jnp.ones_like(g)
        [[factor]] = decayed_products((one,), (one,), g)
        return [[matmul_nt(left, right) * factor for right in rights] for left in lefts]
    base = min(size, SUB)
    upto, after = _products(g)

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], size // base, base, channels)

    def product(lefts: list[jax.Array], rights: list[jax.Array]) -> jax.Array:
        """[..., n, L, width, R, width] from lists of [..., n, width, K]."""
        shape = (*lefts[0].shape[:-1], len(rights), lefts[0].shape[-2])
        both = matmul_nt(jnp.concatenate(lefts, axis=-2), jnp.concatenate(rights, axis=-2))
        return both.reshape(*shape[:-3], len(lefts), *shape[-3:])

    # Inside blocks of SUB steps, matmuls of the whole block, of which the width's pairs are kept.
    steps = jnp.arange(base)
    rows, columns = steps[:, None, None], steps
    made = product([blocks(x) for x in lefts], [blocks(x) for x in rights])
    made = jnp.where(rows == columns, made, jnp.zeros_like(made))
    for level, width in enumerate(_widths(1, base)):
        met = (rows // (2 * width) == columns // (2 * width)) & (rows // width > columns // width)
        pairs = product(
            [blocks(x * upto[level]) for x in lefts], [blocks(x * after[level]) for x in rights]
        )
        made = jnp.where(met, pairs, made)
    # Above, only the pairs that meet.
    for width in _widths(base, size):
        level = width.bit_length() - 1
        second = [_halves(x * upto[level], width)[1] for x in lefts]
        corner = product(second, [_halves(x * after[level], width)[0] for x in rights])
        own = made.reshape(*corner.shape[:-4], 2, *corner.shape[-4:])
        first, last = own[..., 0, :, :, :, :], own[..., 1, :, :, :, :]
        top = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
        made = jnp.concatenate([top, jnp.concatenate([corner, last], axis=-1)], axis=-3)
    made = made.reshape(*made.shape[:-5], *made.shape[-4:])
    return [[made[..., n, :, m, :] for m in range(len(rights))] for n in range(len(lefts))]


@decayed_products.defjvp
def _decayed_products_jvp(primals: Any, tangents: Any) -> Any:
    """With c_t = g_1 + ... + g_t, P[t, j] depends on g through c_t - c_j alone.

    So dc enters as if left[t] changed by left[t] dc_t and right[j] by -right[j] dc_j, and in
    reverse the gradient of the decays is what those of the factors leave. Where the decay between
    j and t is zero, so is the product that dc would have to change.
    """
    (lefts, rights, g), (d_lefts, d_rights, dg) = primals, tangents
    made = decayed_products(lefts, rights, g)
    dc = sums_through(dg)
    d_lefts = tuple(dx + x * dc for x, dx in zip(lefts, d_lefts, strict=True))
    d_rights = tuple(dx - x * dc for x, dx in zip(rights, d_rights, strict=True))
    by_left = decayed_products(d_lefts, rights, g)
    by_right = decayed_products(lefts, d_rights, g)
    return made, jax.tree.map(jnp.add, by_left, by_right)


def _widths(start: int, stop: int) -> list[int]:
    """start, 2 start, 4 start, ... below stop."""
    widths = []
    while start < stop:
        widths.append(start)
        start *= 2
    return widths


def decay_of(g: jax.Array) -> jax.Array:
    """exp(g), zero where g is -inf, whatever its imaginary part."""
    low = jnp.isneginf(jnp.real(g))
    return jnp.where(low, jnp.zeros_like(g), jnp.exp(jnp.where(low, jnp.zeros_like(g), g)))


def _order(size: int) -> tuple[jax.Array, jax.Array]:
    steps = jnp.arange(size)
    return steps[:, None], steps[None, :]


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


def diagonal(rows: jax.Array) -> jax.Array:
    """diag(rows): [..., K] -> [..., K, K]."""
    size = rows.shape[-1]
    return along_rows(rows, size) * jnp.eye(size, dtype=rows.dtype)


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
    batch, length, heads = arrays["q"].shape[:3]
    dtype = state.dtype
    size = 1 << (min(chunk_size, length) - 1).bit_length()
    count = -(-length // size)
    blocks = 1 if log_depth else -(-count // max(1, 16 // (batch * heads)))
    at_once = -(-count // blocks)

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, H, F] -> [blocks, at_once, B, H, C, F]
        x = jnp.pad(x, [(0, 0), (0, blocks * at_once * size - length), (0, 0), (0, 0)])
        x = x.reshape(x.shape[0], blocks, at_once, size, *x.shape[2:])
        return jnp.transpose(x, (1, 2, 0, 4, 3, 5))

    if reset is None:
        reset = jnp.zeros((batch, length), bool)
    cuts = chunks(reset[:, :, None, None])[..., 0]  # [blocks, at_once, B, 1, C]

    def advance(state: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        arrays, cut = block
        values = {name: x.astype(dtype) for name, x in arrays.items()}
        values, spoiled, unread = _take_out_non_finite(values, cut)
        values["g"] = jnp.where(cut[..., None], jnp.full_like(values["g"], -jnp.inf), values["g"])
        maps = prepare(values)
        alive = ~_reached(cut, jnp.zeros_like(cut))[..., None]
        nan = jnp.full((), jnp.nan, dtype)
        offset = jnp.where(spoiled[..., -1:, None], nan, maps.offset)
        states, final = _carry(maps._replace(offset=offset), alive[..., -1:, :], state, log_depth)
        reads = apply_alive(alive, maps.reads, states)
        spoiled = (spoiled | unread)[..., None]
        return final, jnp.where(spoiled, nan, maps.outputs + reads).astype(out_dtype)

    # Recomputed in the backward pass, so that what is kept is the inputs and a state per block.
    advance = jax.checkpoint(advance, prevent_cse=False)
    blocked = {name: chunks(x) for name, x in arrays.items()}
    final, out = lax.scan(advance, state, (blocked, cuts))
    out = jnp.transpose(out, (2, 0, 1, 4, 3, 5))  # [B, blocks, at_once, C, H, V]
    return out.reshape(batch, -1, *out.shape[4:])[:, :length], final


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
