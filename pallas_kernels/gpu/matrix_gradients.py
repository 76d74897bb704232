"""Gradients of the inputs of matrix-state recurrences on GPU, for all chunks in parallel.

A chunk gets the state S before it and the cotangent F of the state after it. In the notation of
`matrix_state`, with do = scale * d_out, its cotangents are

    dU = scores^T do + D K F                          dR = (I + N)^-T dU,   dV = beta dR
    d_scores = do U^T                                 dN = -dR U^T
    dQ = D do S^T + (d_scores D) K
    dK = D U F^T - D dV S^T + (d_scores D)^T Q + (beta dN D) K + (beta dN D)^T K

where linear attention has U = V, dV = dU, and no terms with N. A thread block has one chunk of one
head. It iterates over tiles of the columns of the state, and adds the tiles in registers.

Logarithms of decays enter as three kinds of sums: up to a step (for reads of S), after a step (for
writes), and between two steps. The kernel returns the cotangents of these sums. Differences of
larger terms would lose accuracy, so the gradient contains none.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_blocks
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import Arrays, Blocks, Position, Variant
from pallas_kernels.gpu.matrix_pairs import SQUARE, decays
from pallas_kernels.gpu.matrix_products import CHUNK
from pallas_kernels.gpu.tma import SMEM_WHOLE
from pallas_kernels.jax_compat import array_like, pl

TILED = ("v", "d_out", "states", "cotangents")  # blocks of a tile; the others are of the chunk
VECTORS = ("reads", "writes", "spans", "beta")


class SharedMemory(NamedTuple):
    """Buffers in shared memory.

    Attributes:
      blocks: blocks of the inputs, by name. Those of "v", "d_out" and "scores" have room for the
        pieces of computed values.
      barrier: completed when the blocks of the chunk have arrived.
      tile_barrier: completed when the blocks of a tile have arrived.
    """

    blocks: Blocks
    barrier: Any
    tile_barrier: Any


class Sums(NamedTuple):
    """Sums over the tiles, in registers; None where the variant has none.

    Attributes:
      dq, dk: [64, K].
      scores: cotangent of the scores, without the scale.
      lower: dR U^T.
      reads, writes: cotangents [64] of sums of logarithms up to and after a step.
      beta: cotangent of beta [64].
    """

    dq: jax.Array
    dk: jax.Array
    scores: jax.Array
    lower: Any
    reads: Any
    writes: Any
    beta: Any


def fit(p: Variant) -> Variant:
    """Choose the columns of a tile: 64, or 32 where registers or shared memory require it.

    With 128 keys, the sums of a thread block take more than half of the registers.
    """
    narrow = p._replace(num=p.num._replace(swizzle=64), columns=32)
    wide = p._replace(num=p.num._replace(swizzle=128), columns=64)
    keys = 2 * p.num.inputs * p.keys
    tile = 2 * p.computed * wide.columns
    squares = CHUNK * (p.num.exact + p.delta * p.computed)
    fits = 2 * (CHUNK * (keys + tile + squares) + p.keys * tile) + 2048 <= SMEM_WHOLE
    return wide if p.keys == 64 and fits else narrow


def gradients(
    name: str, p: Variant, arrays: Arrays, like: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Compute the cotangents of the inputs of all chunks.

    Args:
      name: name of the kernel.
      p: the variant; queries and keys are not shared by heads.
      arrays: the inputs, "scores", "states", "cotangents", and for the delta rule "inverse".
      like: "q", "k" and "v", for the dtypes of their cotangents.

    Returns:
      "q", "k", "v" [B, chunks * 64, H, K or V]. With decays also "reads", "writes" and "spans"
      [B, H, chunks * 64], the cotangents of the sums of logarithms up to a step, after a step, and
      of those that a step is in, between two steps. For the delta rule also "beta".
    """
    batch, _, heads, values = like["v"].shape
    names = ["q", "k", "scores", *TILED]
    names += ["inverse", "beta"] if p.delta else []
    names += ["log_decay", "upto", "after"] if p.decay else []
    given = {name: arrays[name] for name in names}
    leaves, tree = jax.tree.flatten(given)
    steps = p.chunks * CHUNK
    outputs = {
        key: array_like(leaves[0], (batch, steps, heads, x.shape[-1]), x.dtype)
        for key, x in like.items()
    }
    for key in (*(VECTORS[:3] if p.decay else ()), *(("beta",) if p.delta else ())):
        outputs["d_" + key] = array_like(leaves[0], (batch, heads, steps), jnp.float32)

    def body(*refs: Any, smem: SharedMemory) -> None:
        sources = jax.tree.unflatten(tree, refs[: len(leaves)])
        targets = dict(zip(outputs, refs[len(leaves) :], strict=True))
        _kernel(p, values // p.columns, sources, targets, smem)

    count = {key: matrix_blocks.pieces(key, xs) for key, xs in given.items()}
    room = {"v": p.computed, "d_out": p.computed, "scores": p.num.exact}
    blocks = {
        key: matrix_blocks.buffers(p, key, max(n, room.get(key, 0))) for key, n in count.items()
    }
    smem = SharedMemory(
        blocks=blocks,
        barrier=plgpu.Barrier(num_arrivals=sum(n for key, n in count.items() if key not in TILED)),
        tile_barrier=plgpu.Barrier(num_arrivals=sum(count[key] for key in TILED)),
    )
    grid = {"chunk": p.chunks, "head": heads, "batch": batch}
    return matrix_blocks.launch(name, body, leaves, outputs, smem, grid, p.num.interpret)


def _kernel(
    p: Variant,
    tiles: int,
    sources: dict[str, list[Any]],
    targets: dict[str, Any],
    smem: SharedMemory,
) -> None:
    batch, head, index = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    blocks = dict(smem.blocks)
    loaded = {
        key: refs[: p.computed if key in ("scores", "inverse") else p.num.inputs]
        for key, refs in blocks.items()
        if key not in ("states", "cotangents")
    }
    chunk = Position(batch, head, index, columns=None)
    for key, block in loaded.items():
        if key not in TILED:
            matrix_blocks.fetch(p, key, sources[key], chunk, block, smem.barrier)
    plgpu.barrier_wait(smem.barrier)

    def zeros(*shape: int) -> jax.Array:
        layout = mp.WGMMA if len(shape) == 2 else mp.WGMMA.reduce(1)
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    sums = Sums(
        dq=zeros(CHUNK, p.keys),
        dk=zeros(CHUNK, p.keys),
        scores=zeros(*SQUARE),
        lower=zeros(*SQUARE) if p.delta else None,
        reads=zeros(CHUNK) if p.decay else None,
        writes=zeros(CHUNK) if p.decay else None,
        beta=zeros(CHUNK) if p.delta else None,
    )

    def tile(i: Any, sums: Sums) -> Sums:
        columns = pl.ds(i.astype(jnp.int32) * p.columns, p.columns)
        at = chunk._replace(columns=columns)
        for key in TILED:
            block = loaded.get(key, blocks[key])
            matrix_blocks.fetch(p, key, sources[key], at, block, smem.tile_barrier)
        plgpu.barrier_wait(smem.tile_barrier)
        sums, dv = _tile(p, blocks, loaded, sums)
        target = targets["v"]
        target[at.batch, at.steps, at.head, columns] = dv.astype(target.dtype)
        plgpu.commit_smem()  # all threads have read the blocks
        return sums

    sums, spans = _pairs(p, blocks, loaded, lax.fori_loop(0, tiles, tile, sums))
    for key, value in (("q", sums.dq), ("k", sums.dk)):
        target = targets[key]
        target[chunk.batch, chunk.steps, chunk.head] = value.astype(target.dtype)
    for key, value in zip(VECTORS, (sums.reads, sums.writes, spans, sums.beta), strict=True):
        if value is not None:
            targets["d_" + key][chunk.batch, chunk.head, chunk.steps] = value


def _row_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1)


def _decayed(p: Variant, blocks: Blocks, name: str, value: jax.Array) -> jax.Array:
    return mp.scaled(blocks[name][0], value) if p.decay else value


def _tile(p: Variant, blocks: Blocks, loaded: Blocks, sums: Sums) -> tuple[Sums, jax.Array]:
    """Add a tile of columns to the sums, and return the cotangent of its values."""
    product = functools.partial(mp.product, p.num)
    decayed = functools.partial(_decayed, p, blocks)
    q, k, scores = (loaded[name] for name in ("q", "k", "scores"))
    state, cotangent = blocks["states"], blocks["cotangents"]
    inputs = p.num.inputs
    written = loaded["v"]
    missing: Any = None
    k_read: Any = None
    beta: Any = None
    if p.delta:
        k_read = decayed("upto", product(k, state))
        missing = mp.joined(written) - k_read
        beta = mp.by_row(blocks["beta"][0], missing.shape)
        written = blocks["v"]
        mp.store(written, mp.split(beta * missing, p.computed))
        mp.store(written, mp.split(product(loaded["inverse"], written), p.computed))
    d_scores = product(loaded["d_out"], mp.transposed(written), sums.scores)
    d_out = p.scale * mp.joined(loaded["d_out"])
    reads, writes, d_beta, lower = sums.reads, sums.writes, sums.beta, sums.lower
    if p.decay:
        q_read = decayed("upto", product(q, state[:inputs]))
        reads = reads + _row_sums(d_out * q_read)
    left = mp.split(decayed("upto", d_out), inputs)
    dq = product(left, mp.transposed(state[:inputs]), sums.dq, in_registers=True)
    later, value = decayed("after", product(k, cotangent)), mp.joined(written)
    if p.decay:
        writes = writes + _row_sums(value * later)
    left = mp.split(decayed("after", value), p.computed)
    dk = product(left, mp.transposed(cotangent), sums.dk, in_registers=True)
    dv = p.scale * product(mp.transposed(scores), loaded["d_out"]) + later
    if p.delta:
        mp.store(blocks["d_out"], mp.split(dv, p.computed))
        dr = product(mp.transposed(loaded["inverse"]), blocks["d_out"])
        pieces = mp.split(dr, p.computed)
        lower = product(pieces, mp.transposed(written), lower, in_registers=True)
        d_beta = d_beta + _row_sums(dr * missing)
        dv = beta * dr
        if p.decay:
            reads = reads - _row_sums(dv * k_read)
        left = mp.split(-decayed("upto", dv), p.computed)
        dk = product(left, mp.transposed(state), dk, in_registers=True)
    return Sums(dq, dk, d_scores, lower, reads, writes, d_beta), dv


def _pairs(p: Variant, blocks: Blocks, loaded: Blocks, sums: Sums) -> tuple[Sums, Any]:
    """Add the terms of pairs of steps, and return the cotangents of sums between two steps."""
    product = functools.partial(mp.product, p.num)
    q, k, scratch = loaded["q"], loaded["k"], blocks["scores"]
    t, j = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    d_scores = p.scale * sums.scores
    change = d_scores * mp.joined(loaded["scores"]) if p.decay else None
    factor = decays(p.num, blocks["log_decay"][0], scratch[0]) if p.decay else None

    def decayed(x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, x if factor is None else x * factor, 0.0)

    def store(x: jax.Array) -> tuple[list[jax.Array], list[Any]]:
        pieces = mp.split(x, p.computed)
        mp.store(scratch[: p.computed], pieces)
        return pieces, mp.transposed(scratch[: p.computed])

    pieces, turned = store(decayed(d_scores, t >= j))
    dq = product(pieces, k, sums.dq, in_registers=True)
    dk = product(turned, q, sums.dk)
    d_beta = sums.beta
    if p.delta:
        overlaps = decayed(product(k, mp.transposed(k)), t > j)
        d_lower = jnp.where(t > j, -sums.lower, 0.0)
        d_beta = d_beta + _row_sums(d_lower * overlaps)
        d_overlaps = mp.by_row(blocks["beta"][0], SQUARE) * d_lower
        pieces, turned = store(decayed(d_overlaps, t > j))
        dk = product(pieces, k, dk, in_registers=True)
        dk = product(turned, k, dk)
        if change is not None:
            change = change + d_overlaps * overlaps
    spans = None
    if change is not None:  # the decay of step i is in the pairs with j < i <= t
        mp.store(scratch, mp.split(jnp.where(t > j, change, 0.0), p.num.exact))
        below = product([mp.ones(j >= t)], scratch, in_registers=True)
        spans = _row_sums(jnp.where(t > j, below, 0.0))
    return sums._replace(dq=dq, dk=dk, beta=d_beta), spans
