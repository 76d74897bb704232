"""Gradients of the inputs of matrix-state recurrences on GPU, for all chunks in parallel.

A chunk gets the state S before it, the cotangent F of the state after it, and the written values U.
For the delta rule it also gets dR = (I + N)^-T dU, with dU = scale scores^T d_out + D K F. In the
notation of `matrix_state`, with do = scale * d_out, the cotangents are

    d_scores = do U^T                                 dN = -dR U^T
    dQ = D do S^T + (d_scores D) K
    dK = D U F^T - D beta dR S^T + (d_scores D)^T Q + (beta dN D) K + (beta dN D)^T K
    d_beta_t = dR_t (v_t - D S^T k_t) + sum_j dN_{t,j} (k_t^T D k_j)

where linear attention has U = V and no terms with dR. A thread block has one chunk and 64 channels
of one head. It adds tiles of the columns of the state in registers.

Logarithms of decays per head enter as three kinds of sums: up to a step (for reads of S), after a
step (for writes), and between two steps. The kernel returns the cotangents of these sums.
Differences of larger terms would lose accuracy, so the gradient contains none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_blocks, matrix_channels
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import KEY_TILE, Arrays, Blocks, Position, Variant
from pallas_kernels.gpu.matrix_pairs import LOG_ZERO, SQUARE, decays
from pallas_kernels.gpu.matrix_products import CHUNK
from pallas_kernels.gpu.tma import SMEM_WHOLE
from pallas_kernels.jax_compat import array_like, pl

TIMED = ("v", "written", "d_out", "d_right")  # blocks of a tile of columns, [64, columns]
STATES = ("states", "cotangents")  # blocks of a tile of columns and of the channels
Results = dict[str, jax.Array]  # by name
VECTORS = ("d_reads", "d_writes", "d_spans", "d_beta")


class SharedMemory(NamedTuple):
    """Buffers in shared memory.

    Attributes:
      blocks: blocks of the inputs, by name.
      scratch: exact pieces of matrices [64, 64]: two with decays per channel, else one.
      squares: cotangents of the scores and of N, [64, 64] in float32.
      barriers: for the blocks of the chunk, those of `TIMED` and `STATES`, and those of `TIMED`.
    """

    blocks: Blocks
    scratch: list[list[Any]]
    squares: list[Any]
    barriers: list[Any]


class Rows(NamedTuple):
    """Sums over the tiles, in registers, [64, keys]; None where the variant has none.

    Attributes:
      reads: d_out S^T.
      writes: U F^T.
      right: dR S^T.
    """

    reads: jax.Array
    writes: jax.Array
    right: Any


class Squares(NamedTuple):
    """Sums over the tiles, in registers, [64, 64]; None where the variant has none.

    Attributes:
      scores: d_out U^T.
      lower: dR U^T.
    """

    scores: jax.Array
    lower: Any


def gradients(name: str, p: Variant, arrays: Arrays, like: dict[str, jax.Array]) -> Results:
    """Compute the cotangents of the inputs of all chunks.

    Args:
      name: name of the kernel.
      p: the variant; queries and keys are not shared by heads.
      arrays: the inputs, "states", "cotangents", and for the delta rule "written" and "d_right".
      like: "q" and "k", for the dtypes of their cotangents.

    Returns:
      "q" and "k" [B, chunks * 64, H, K]. With decays per channel "logs" of the same shape, the
      cotangents of the logarithms but for those of the decay of the whole chunk. With decays per
      head "d_reads", "d_writes" and "d_spans" [B, H, chunks * 64], the cotangents of the sums of
      logarithms up to a step, after a step, and of those that a step is in, between two steps. For
      the delta rule "d_beta", without the terms with V.
    """
    batch, heads, _, _, keys, values = arrays["states"][0].shape
    names = ["q", "k", "d_out", "states", "cotangents"]
    names += ["written", "d_right", "beta"] if p.delta else ["v"]
    names += ["log_decay", "upto", "after"] if p.decay else ["logs"] if p.channel else []
    given = {name: arrays[name] for name in names}
    leaves, tree = jax.tree.flatten(given)
    steps, parts = p.chunks * CHUNK, keys // KEY_TILE
    shape = (batch, steps, heads, keys)
    outputs = {key: array_like(leaves[0], shape, x.dtype) for key, x in like.items()}
    if p.channel:
        outputs["logs"] = array_like(leaves[0], shape, jnp.float32)
    for key in (*(VECTORS[:3] if p.decay else ()), *(VECTORS[3:] if p.delta else ())):
        outputs[key] = array_like(leaves[0], (parts, batch, heads, steps), jnp.float32)
    p = _fit(p._replace(keys=KEY_TILE), given)

    def body(*refs: Any, smem: SharedMemory) -> None:
        sources = jax.tree.unflatten(tree, refs[: len(leaves)])
        targets = dict(zip(outputs, refs[len(leaves) :], strict=True))
        _kernel(p, values // p.columns, sources, targets, smem)

    count = {key: matrix_blocks.pieces(key, xs) for key, xs in given.items()}
    timed, states = (sum(count[key] for key in given if key in kind) for kind in (TIMED, STATES))
    arrivals = (sum(count.values()) - timed - states, timed + states, timed)
    smem = SharedMemory(
        blocks={key: matrix_blocks.buffers(p, key, n) for key, n in count.items()},
        scratch=[
            matrix_blocks.buffers(p, "scores", p.num.exact) for _ in range(_scratch_matrices(p))
        ],
        squares=[plgpu.SMEM(SQUARE, jnp.float32) for _ in range(1 + p.delta)],
        barriers=[plgpu.Barrier(num_arrivals=number) for number in arrivals],
    )
    grid = {"part": parts, "chunk": p.chunks, "head": heads, "batch": batch}
    found = matrix_blocks.launch(name, body, leaves, outputs, smem, grid, p.num.interpret)
    return {key: jnp.sum(x, axis=0) if key in VECTORS else x for key, x in found.items()}


def _scratch_matrices(p: Variant) -> int:
    return 2 if p.channel else 1


def _fit(p: Variant, given: Arrays) -> Variant:
    """Choose the columns of a tile, 64 or 32, that fit the shared memory."""
    scratch = (_scratch_matrices(p) * p.num.exact * 2 + (1 + p.delta) * 4) * CHUNK * CHUNK
    wide = p._replace(num=p.num._replace(swizzle=128), columns=64)
    if scratch + matrix_blocks.nbytes(wide, given) <= SMEM_WHOLE:
        return wide
    return p._replace(num=p.num._replace(swizzle=64), columns=32)


def _kernel(
    p: Variant,
    tiles: int,
    sources: dict[str, list[Any]],
    targets: dict[str, Any],
    smem: SharedMemory,
) -> None:
    names = ("batch", "head", "chunk", "part")
    batch, head, index, part = (lax.axis_index(name) for name in names)
    chunk = Position(batch, head, index, None, keys=pl.ds(part * KEY_TILE, KEY_TILE))

    def fetch(at: Position, index: int, wanted: Callable[[str], bool]) -> None:
        for key, block in smem.blocks.items():
            if wanted(key):
                matrix_blocks.fetch(p, key, sources[key], at, block, smem.barriers[index])

    def add(index: int, kinds: tuple[str, ...], sums: Any) -> Any:
        """Return the sums over the tiles, whose blocks are of these kinds."""

        def tile(i: Any, sums: Any) -> Any:
            columns = pl.ds(i.astype(jnp.int32) * p.columns, p.columns)
            fetch(chunk._replace(columns=columns), index, lambda key: key in kinds)
            plgpu.barrier_wait(smem.barriers[index])
            sums = add_tile(p, smem.blocks, sums)
            plgpu.commit_smem()  # all threads have read the blocks
            return sums

        return lax.fori_loop(0, tiles, tile, sums)

    fetch(chunk, 0, lambda key: key not in TIMED + STATES)
    rows, square = mp.zeros(CHUNK, p.keys), mp.zeros(*SQUARE)
    sums = add(1, TIMED + STATES, Rows(rows, rows, rows if p.delta else None))
    plgpu.barrier_wait(smem.barriers[0])
    found = of_rows(p, smem.blocks, smem.scratch, sums)
    squares = add(2, TIMED, Squares(square, square if p.delta else None))
    store_squares(p, smem.squares, squares)
    for key, value in of_pairs(p, smem.blocks, smem.scratch, smem.squares, found).items():
        if key in VECTORS:
            targets[key][part, batch, head, chunk.steps] = value
        else:
            targets[key][batch, chunk.steps, head, chunk.keys] = value.astype(targets[key].dtype)


def add_tile(p: Variant, blocks: Blocks, sums: Any) -> Any:
    """Add a tile of columns to `Rows` or `Squares`."""
    num, d_out, written = p.num, blocks["d_out"], blocks["written" if p.delta else "v"]
    if isinstance(sums, Squares):
        right = mp.transposed(written)
        scores = mp.product(num, d_out, right, sums.scores)
        lower = mp.product(num, blocks["d_right"], right, sums.lower) if p.delta else None
        return Squares(scores, lower)
    state, cotangent = (mp.transposed(blocks[name]) for name in STATES)
    reads = mp.product(num, d_out, state[: num.inputs], sums.reads)
    writes = mp.product(num, written, cotangent, sums.writes)
    right = mp.product(num, blocks["d_right"], state, sums.right) if p.delta else None
    return Rows(reads, writes, right)


def store_squares(p: Variant, refs: list[Any], sums: Squares) -> None:
    """Store the cotangents of the scores and of N."""
    t, j = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    plgpu.commit_smem()
    refs[0][...] = jnp.where(t >= j, p.scale * sums.scores, 0.0)
    if p.delta:
        refs[1][...] = jnp.where(t > j, -sums.lower, 0.0)
    plgpu.commit_smem()


def _row_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1)


def of_rows(p: Variant, blocks: Blocks, scratch: list[list[Any]], sums: Rows) -> Results:
    """Return the results of `gradients` for one chunk and its channels, without pairs of steps."""
    q, k = mp.joined(blocks["q"]), mp.joined(blocks["k"])

    def decayed(name: str, value: jax.Array) -> jax.Array:
        if p.channel:
            of_tile = matrix_channels.Decays(p, blocks["logs"])
            return (of_tile.upto() if name == "upto" else of_tile.after()) * value
        return mp.scaled(blocks[name][0], value) if p.decay else value

    found = {"q": decayed("upto", p.scale * sums.reads), "k": decayed("after", sums.writes)}
    reads, writes = q * found["q"], k * found["k"]
    if p.delta:
        read = -decayed("upto", sums.right)
        found["d_beta"] = _row_sums(k * read)
        read = mp.by_row(blocks["beta"][0], read.shape) * read
        reads = reads + k * read
        found["k"] = found["k"] + read
    if p.channel:
        found["logs"] = _sums_of_steps(p, scratch[0], reads, writes)
    if p.decay:
        found |= {"d_reads": _row_sums(reads), "d_writes": _row_sums(writes)}
    return found


def of_pairs(
    p: Variant, blocks: Blocks, scratch: list[list[Any]], squares: list[Any], found: Results
) -> Results:
    """Add the terms of pairs of steps to the results of a chunk and its channels."""
    if not p.channel:
        return _add_pairs(p, blocks, scratch[0], squares, found)
    start = matrix_channels.PairCotangents(*(found.get(n) for n in ("q", "k", "logs", "d_beta")))
    sums = matrix_channels.pairs_back(p, blocks, scratch, squares, start)
    found = found | {"q": sums.q, "k": sums.k, "logs": sums.logs}
    return found | ({"d_beta": sums.beta} if p.delta else {})


def _sums_of_steps(
    p: Variant, scratch: list[Any], reads: jax.Array, writes: jax.Array
) -> jax.Array:
    """Return the cotangents of logarithms from those of sums up to a step and after a step."""
    i, t = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    mp.store(scratch, mp.split(reads, p.num.exact))
    found = mp.product(p.num, [mp.ones(i <= t)], scratch, in_registers=True)
    mp.store(scratch, mp.split(writes, p.num.exact))
    return mp.product(p.num, [mp.ones(i > t)], scratch, found, in_registers=True)


def _add_pairs(
    p: Variant,
    blocks: Blocks,
    scratch: list[Any],
    squares: list[Any],
    found: Results,
) -> Results:
    """Add the terms of pairs of steps, without decays per channel."""
    num, q, k = p.num, blocks["q"], blocks["k"]
    t, j = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    factor = decays(num, blocks["log_decay"][0], scratch[0]) if p.decay else None

    def decayed(x: jax.Array) -> jax.Array:
        return x if factor is None else x * factor

    def store(x: jax.Array) -> tuple[list[jax.Array], list[Any]]:
        pieces = mp.split(x, p.computed)
        mp.store(scratch[: p.computed], pieces)
        return pieces, mp.transposed(scratch[: p.computed])

    d_scores = decayed(mp.load(squares[0]))
    change = d_scores * mp.product(num, q, mp.transposed(k)) if p.decay else None
    pieces, turned = store(d_scores)
    dq = mp.product(num, pieces, k, found["q"], in_registers=True)
    dk = mp.product(num, turned, q, found["k"])
    if p.delta:
        d_lower = decayed(mp.load(squares[1]))
        overlaps = mp.product(num, k, mp.transposed(k))
        found["d_beta"] = found["d_beta"] + _row_sums(d_lower * overlaps)
        d_lower = mp.by_row(blocks["beta"][0], SQUARE) * d_lower
        pieces, turned = store(d_lower)
        dk = mp.product(num, pieces, k, dk, in_registers=True)
        dk = mp.product(num, turned, k, dk)
        if change is not None:
            change = change + d_lower * overlaps
    if change is not None:  # the decay of step i is in the pairs with j < i <= t
        mp.store(scratch, mp.split(jnp.where(t > j, change, 0.0), num.exact))
        below = mp.product(num, [mp.ones(j >= t)], scratch, in_registers=True)
        found["d_spans"] = _row_sums(jnp.where(t > j, below, 0.0))
    return found | {"q": dq, "k": dk}


def decay_gradient(p: Variant, arrays: Arrays, results: Results, length: int) -> jax.Array:
    """Return the cotangents of the logarithms, [B, T, H] or [B, T, H, K].

    Args:
      p: the variant.
      arrays: the arguments of `gradients`, and with decays per channel "carry".
      results: its results.
      length: T.
    """
    states, cotangents = (
        jnp.sum(arrays[name][0].astype(jnp.float32), axis=3) for name in ("states", "cotangents")
    )
    carried = jnp.sum(states * cotangents, axis=-1)
    if p.channel:
        last = jnp.moveaxis(arrays["carry"][0] * carried, 1, 2)
        total = (results["logs"] + jnp.repeat(last, CHUNK, axis=1))[:, :length]
        logs = sum(piece.astype(jnp.float32) for piece in arrays["logs"])[:, :length]
        return jnp.where(logs <= LOG_ZERO, 0.0, total)
    # The logarithm of step i is in the sums up to t >= i, and in the sums after j < i.
    [logs], [upto] = arrays["log_decay"], arrays["upto"]
    chunked = (*logs.shape[:2], -1, CHUNK)
    reads, writes, spans = (results[name].reshape(chunked) for name in VECTORS[:3])
    last = upto.reshape(chunked)[..., -1] * jnp.sum(carried, axis=-1)
    before = jnp.pad(writes[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    total = spans + last[..., None] + lax.cumsum(reads, axis=3, reverse=True)
    total = total + jnp.cumsum(before, axis=-1)
    total = jnp.where(logs <= LOG_ZERO, 0.0, total.reshape(logs.shape))
    return matrix_blocks.by_step(total, length)
