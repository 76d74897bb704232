"""The elementwise linear recurrence in plain XLA: sequential, associative, chunked.

All three compute either form of `linear_recurrence`, in either direction, on a [B|1, T|1, D],
x [B, T, D], h0 [B, D] and reset [B, T] or None. They return y [B, T, D] and the final state [B, D].
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ASSOCIATIVE_BYTES = 2 * 2**30  # of states, at most, for the associative algorithm on GPU


class ScanOptions(NamedTuple):
    """The form and direction of a recurrence, and the algorithm that XLA runs.

    Attributes:
      out_dtype: dtype of the outputs y.
      post: whether this is the `post` form of `linear_recurrence`.
      reverse: whether time runs backwards.
      algorithm: "sequential", "associative", "chunked", or None to choose by platform.
      chunk_size: steps in a chunk of the chunked algorithm; by default 256.
      unroll: steps in an iteration of the sequential loop; by default 4, and 1 for `post`.
    """

    out_dtype: jnp.dtype
    post: bool = False
    reverse: bool = False
    algorithm: str | None = None
    chunk_size: int | None = None
    unroll: int | None = None


def run(
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
    reset: jax.Array | None,
    options: ScanOptions,
    platform: str,
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence with the algorithm of the options, by default the platform's fastest."""
    algorithm = options.algorithm or choose(x.shape, h0.dtype, platform)
    if algorithm == "sequential":
        return _sequential(a, x, h0, reset, options)
    if algorithm == "associative":
        return _associative(a, x, h0, reset, options)
    return _chunked(a, x, h0, reset, options)


def choose(shape: tuple[int, ...], dtype: Any, platform: str) -> str:
    """Return the algorithm for states [B, T, D] of a dtype on a platform.

    CPU: sequential, because the loop reads and writes each array exactly once.
    GPU: associative, 6 times faster than chunked on an H100 at [1, 65536, 512], while its
    temporaries fit. With gradients they take twice the memory of the states.
    Elsewhere: associative for up to 4096 steps. Not measured on hardware.
    """
    if platform == "cpu" or shape[1] == 1 or not isinstance(shape[1], int):
        return "sequential"  # the only algorithm that supports a symbolic T
    if platform in ("cuda", "rocm") and isinstance(shape[0], int):
        fits = math.prod(shape) * jnp.dtype(dtype).itemsize <= ASSOCIATIVE_BYTES
    else:
        fits = shape[1] <= 4096
    return "associative" if fits else "chunked"


def _sequential(
    a: jax.Array, x: jax.Array, h0: jax.Array, reset: jax.Array | None, options: ScanOptions
) -> tuple[jax.Array, jax.Array]:
    """Run a loop over time without transposes, `unroll` steps per iteration.

    On CPU each step is a kernel call and each iteration a write. Four steps per iteration share one
    write. With more steps, XLA's executor spends longer on scheduling the calls than on running
    them. The `post` form has two results per step and reaches this limit at one step.
    """
    length = x.shape[1]
    # A symbolic T is known to be divisible by 1 only.
    unroll = options.unroll or (1 if options.post else 4)
    unroll = min(unroll, length) if isinstance(length, int) else 1

    def advance(start: Any, rows: int, h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.uint32(length - rows) - start if options.reverse else start
        outs: list[jax.Array] = [h] * rows
        for i in range(rows)[:: -1 if options.reverse else 1]:
            # Slice row by row: XLA would copy a slice of the whole block.
            decay, value = (
                _rows(v, first + jnp.uint32(i), 1)[:, 0].astype(h0.dtype) for v in (a, x)
            )
            cut = None if reset is None else _rows(reset, first + jnp.uint32(i), 1)[:, 0]
            out, h = _step(decay, value, h, cut, options.post)
            outs[i] = out.astype(options.out_dtype)
        return h, _write_rows(y, jnp.stack(outs, axis=1), first)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # An unsigned index saves a kernel call per step: XLA need not handle negative indices.
        return advance(i.astype(jnp.uint32) * jnp.uint32(unroll), unroll, *carry)

    h, y = lax.fori_loop(0, length // unroll, body, (h0, _buffer(x, options)))
    rest = length % unroll
    if rest:
        h, y = advance(jnp.uint32(length - rest), rest, h, y)
    return y, h


def _buffer(x: jax.Array, options: ScanOptions) -> jax.Array:
    """Return the array that the loop overwrites with its outputs.

    The initial value differs between the forward and the backward loop. XLA would merge two equal
    buffers into one and copy it for each loop.
    """
    return jnp.full_like(x, 1 if options.post else 0, options.out_dtype)


def _step(
    decay: jax.Array, x: jax.Array, h: jax.Array, cut: jax.Array | None, post: bool
) -> tuple[jax.Array, jax.Array]:
    """Return (y_t, carry) of one step of either form."""
    if post:
        out = h + x
        return out, unless_reset(cut, decay * out)
    # Select after the sum, so that product and sum are one operation, rounded once.
    out = decay * h + x
    out = out if cut is None else jnp.where(cut[..., None], x, out)
    return out, out


def unless_reset(cut: jax.Array | None, value: jax.Array) -> jax.Array:
    """Replace the value by zero where `cut` is true. A product with zero would keep NaN."""
    return value if cut is None else jnp.where(cut[..., None], jnp.zeros_like(value), value)


def _rows(array: jax.Array | None, first: Any, rows: int) -> Any:
    if array is None or array.shape[1] == 1:
        return array
    zero = jnp.uint32(0)
    start = (zero, jnp.asarray(first, jnp.uint32), *(zero for _ in array.shape[2:]))
    return lax.dynamic_slice(array, start, (array.shape[0], rows, *array.shape[2:]))


def _write_rows(array: jax.Array, rows: jax.Array, first: Any) -> jax.Array:
    zero = jnp.uint32(0)
    return lax.dynamic_update_slice(array, rows, (zero, jnp.asarray(first, jnp.uint32), zero))


def _associative(
    a: jax.Array, x: jax.Array, h0: jax.Array, reset: jax.Array | None, options: ScanOptions
) -> tuple[jax.Array, jax.Array]:
    """Run `lax.associative_scan` over the maps h -> where(reset, 0, decay h) + x."""
    length = x.shape[1]
    a = jnp.broadcast_to(a.astype(h0.dtype), (a.shape[0], length, a.shape[2]))
    x = x.astype(h0.dtype)
    first, last = (length - 1, 0) if options.reverse else (0, length - 1)
    end_decay, end_cut = a[:, last], None if reset is None else reset[:, last]
    if options.post:  # the decay follows the output: y_t = a_{t-1} y_{t-1} + x_t
        entering = h0
        back = -1 if options.reverse else 1
        a = jnp.roll(a, back, axis=1)
        if reset is not None:
            reset = jnp.roll(reset, back, axis=1).at[:, first].set(False)
    else:
        entering = unless_reset(None if reset is None else reset[:, first], a[:, first] * h0)
    x = x.at[:, first].add(entering)
    if reset is None:

        def combine(early: Any, late: Any) -> Any:
            return early[0] * late[0], late[0] * early[1] + late[1]

        elements: tuple[jax.Array, ...] = (a, x)
    else:

        def combine(early: Any, late: Any) -> Any:
            carried = jnp.where(late[2], jnp.zeros_like(late[1]), late[0] * early[1])
            return early[0] * late[0], carried + late[1], early[2] | late[2]

        elements = (a, x, reset[..., None])
    y = lax.associative_scan(combine, elements, axis=1, reverse=options.reverse)[1]
    final = y[:, last]
    if options.post:
        final = unless_reset(end_cut, end_decay * final)
    return y.astype(options.out_dtype), final


def _chunked(
    a: jax.Array, x: jax.Array, h0: jax.Array, reset: jax.Array | None, options: ScanOptions
) -> tuple[jax.Array, jax.Array]:
    """Run chunk after chunk, with log depth inside a chunk and temporaries of a chunk's size."""
    length = x.shape[1]
    chunk_size = min(options.chunk_size or 256, length)

    def advance(start: Any, rows: int, h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = length - rows - start if options.reverse else start
        block = (_rows(a, first, rows), _rows(x, first, rows), h, _rows(reset, first, rows))
        out, h = _associative(*block, options)
        return h, _write_rows(y, out, first)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return advance(i.astype(jnp.uint32) * jnp.uint32(chunk_size), chunk_size, *carry)

    h, y = lax.fori_loop(0, length // chunk_size, body, (h0, _buffer(x, options)))
    rest = length % chunk_size
    if rest:
        h, y = advance(jnp.uint32(length - rest), rest, h, y)
    return y, h
