"""Gradients of the inputs of matrix-state recurrences on GPU, for all chunks in parallel.

A chunk gets the state S before it, the cotangent F of the state after it, and the written values U.
For the delta rule it also gets dR = (I + N)^-T dU, with dU = scale scores^T d_out + D K F. In the
notation of `matrix_state`, with do = scale * d_out, the cotangents are

    d_scores = do U^T                                 dN = -dR U^T
    dQ = D do S^T + (d_scores D) K
    dK = D U F^T - D beta dR S^T + (d_scores D)^T Q + (beta dN D) K + (beta dN D)^T K
    d_beta_t = dR_t (v_t - D S^T k_t) + sum_j dN_{t,j} (k_t^T D k_j)

where linear attention has U = V and no terms with dR. The generalized delta rule has the products
of `Variant.pairs`, and dA = D dR S^T + ..., dB = D Z F^T + ..., dN = dR Z^T, dM = dR V^T.

A thread block has one chunk and 64 channels
of one head. It adds tiles of the columns of the state in registers.

Logarithms of decays per head enter as three kinds of sums: up to a step (for reads of S), after a
step (for writes), and between two steps. The kernel returns the cotangents of these sums.
Differences of larger terms would lose accuracy, so these sums contain none.
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
from pallas_kernels.jax_compat import array_like, gpu_store, pl

TIMED = ("v", "written", "d_out", "d_right")  # blocks of a tile of columns, [64, columns]
STATES = ("states", "cotangents")  # blocks of a tile of columns and of the channels
Results = dict[str, jax.Array]  # by name
VECTORS = ("d_reads", "d_writes", "d_spans", "d_beta")
SUM_BYTES = 3072  # of shared memory, for sums over rows in registers, and barriers
CARRIED = "carried"  # name of the sums over values of a state times its cotangent


class SharedMemory(NamedTuple):
    """Buffers in shared memory.

    Attributes:
      blocks: blocks of the inputs, by name.
      scratch: exact pieces of matrices [64, 64]: two with decays per channel, else one.
      squares: cotangents of the products of pairs of steps, [64, 64] in float32.
      barriers: for the blocks of the chunk, those of `TIMED` and `STATES`, and those of `TIMED`.
    """

    blocks: Blocks
    scratch: list[list[Any]]
    squares: dict[str, Any]
    barriers: list[Any]


def row_factors(p: Variant) -> dict[str, tuple[str, str]]:
    """Return the factors X, Y of the sums over columns X Y^T that are [64, keys], by name.

    Times decays, and "right" for the delta rule times -beta, they are cotangents of the inputs that
    read or write states. "right" is for "k" or "a", which read the state for the triangular system.
    """
    found = {"q": ("d_out", "states"), "k": ("written" if p.delta else "v", "cotangents")}
    if p.solved:
        found["right"] = ("d_right", "states")
    if p.vectors:
        found["b"] = ("written", "cotangents")
    return found


def square_factors(p: Variant) -> dict[str, tuple[str, str]]:
    """Return the factors of the sums that are [64, 64], the cotangents of `Variant.pairs`."""
    values = {"k": "written" if p.delta else "v", "b": "written"}
    return {
        pair.name: ("d_out" if pair.left == "q" else "d_right", values[pair.right])
        for pair in p.pairs
    }


def gradients(name: str, p: Variant, arrays: Arrays, like: dict[str, jax.Array]) -> Results:
    """Compute the cotangents of the inputs of all chunks.

    Args:
      name: name of the kernel.
      p: the variant; queries and keys are not shared by heads.
      arrays: the inputs, "states", "cotangents", and for the delta rule "written" and "d_right".
      like: "q" and "k", for the dtypes of their cotangents.

    Returns:
      "q" and "k" [B, chunks * 64, H, K]. With decays per channel "logs" of the same shape, the
      cotangents of the logarithms, without the terms of the decay of the whole chunk. With decays
      per head "d_reads", "d_writes" and "d_spans" [B, H, chunks * 64], the cotangents of the sums
      of logarithms up to a step, after a step, and of those that a step is in, between two steps.
      With decays "carried" [B, H, chunks, K], the sums over values of a state before a chunk times
      the cotangent of the state after it. For the delta rule "d_beta", without the terms with V.
    """
    batch, heads, _, _, keys, values = arrays["states"][0].shape
    names = [*like, "d_out", "states", "cotangents"]
    names += ["written", "d_right"] if p.solved else []
    names += ["beta"] if p.delta else ["v"]
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
    if p.decay or p.channel:
        shape = (batch, heads, p.chunks, keys)
        outputs[CARRIED] = array_like(leaves[0], shape, jnp.float32)
    p = _fit(name, p._replace(keys=KEY_TILE), given)

    def body(*refs: Any, smem: SharedMemory) -> None:
        sources = jax.tree.unflatten(tree, refs[: len(leaves)])
        targets = dict(zip(outputs, refs[len(leaves) :], strict=True))
        _kernel(p, values // p.columns, parts, sources, targets, smem)

    count = {key: matrix_blocks.pieces(key, xs) for key, xs in given.items()}
    timed, states = (sum(count[key] for key in given if key in kind) for kind in (TIMED, STATES))
    arrivals = (sum(count.values()) - timed - states, timed + states, timed)
    smem = SharedMemory(
        blocks={key: matrix_blocks.buffers(p, key, n) for key, n in count.items()},
        scratch=[
            matrix_blocks.buffers(p, "scores", p.num.exact) for _ in range(_scratch_matrices(p))
        ],
        squares={pair.name: mp.buffers(p.num, SQUARE, jnp.float32)[0] for pair in p.pairs},
        barriers=[plgpu.Barrier(num_arrivals=number) for number in arrivals],
    )
    # Parts of the same chunk run next to each other, because they read the same values.
    grid = {"chunk": p.chunks, "head": heads, "part": batch * parts}
    found = matrix_blocks.launch(name, body, leaves, outputs, smem, grid, p.num.interpret)
    return {key: jnp.sum(x, axis=0) if key in VECTORS else x for key, x in found.items()}


def _scratch_matrices(p: Variant) -> int:
    return 2 if p.channel else 1


def _fit(name: str, p: Variant, given: Arrays) -> Variant:
    """Choose the columns of a tile, 64 or 32, that fit the shared memory."""
    scratch = (_scratch_matrices(p) * p.num.exact * 2 + len(p.pairs) * 4) * CHUNK * CHUNK
    for columns in (64, 32):
        p = p.tiled(columns)
        if scratch + matrix_blocks.nbytes(p, given) <= SMEM_WHOLE - SUM_BYTES:
            return p
    raise NotImplementedError(
        f"{name}: the blocks do not fit the shared memory; use bfloat16 inputs, or"
        " implementation='xla' or None."
    )


def _kernel(
    p: Variant,
    tiles: int,
    parts: Any,
    sources: dict[str, list[Any]],
    targets: dict[str, Any],
    smem: SharedMemory,
) -> None:
    index, head, part = (lax.axis_index(name) for name in ("chunk", "head", "part"))
    parts = jnp.int32(parts)
    batch, part = lax.div(part, parts), lax.rem(part, parts)
    chunk = Position(batch, head, index, None, keys=pl.ds(part * KEY_TILE, KEY_TILE))

    def fetch(at: Position, index: int, wanted: Callable[[str], bool]) -> None:
        for key, block in smem.blocks.items():
            if wanted(key):
                matrix_blocks.fetch(p, key, sources[key], at, block, smem.barriers[index])

    def add(index: int, factors: dict[str, tuple[str, str]], rows: bool) -> Results:
        """Return the sums over the tiles of these factors."""
        kinds = TIMED + STATES if rows else TIMED

        def tile(i: Any, sums: Results) -> Results:
            columns = pl.ds(i.astype(jnp.int32) * p.columns, p.columns)
            fetch(chunk._replace(columns=columns), index, lambda key: key in kinds)
            plgpu.barrier_wait(smem.barriers[index])
            sums = add_tile(p, smem.blocks, factors, sums)
            plgpu.commit_smem()  # all threads have read the blocks
            return sums

        sums = dict.fromkeys(factors, mp.zeros(CHUNK, p.keys if rows else CHUNK))
        if rows and CARRIED in targets:
            sums[CARRIED] = mp.zeros(p.keys)
        return lax.fori_loop(0, tiles, tile, sums)

    fetch(chunk, 0, lambda key: key not in TIMED + STATES)
    sums = add(1, row_factors(p), True)
    plgpu.barrier_wait(smem.barriers[0])
    found = of_rows(p, smem.blocks, smem.scratch, sums)
    store_squares(p, smem.squares, add(2, square_factors(p), False))
    for key, value in of_pairs(p, smem.blocks, smem.scratch, smem.squares, found).items():
        if key in VECTORS:
            target = targets[key].at[part, batch, head, chunk.steps]
        elif key == CARRIED:
            target = targets[key].at[batch, head, index, chunk.keys]
        else:
            target = targets[key].at[batch, chunk.steps, head, chunk.keys]
        gpu_store(target, value.astype(target.dtype))


def add_tile(
    p: Variant, blocks: Blocks, factors: dict[str, tuple[str, str]], sums: Results
) -> Results:
    """Add a tile of columns to the sums with the given factors."""
    found = {}
    for name, (left, right) in factors.items():
        pieces = blocks[right]
        if left == "d_out" and right == "states":
            pieces = pieces[: p.num.inputs]
        found[name] = mp.product(p.num, blocks[left], mp.transposed(pieces), sums[name])
    if CARRIED in sums:
        states, cotangents = (mp.joined(blocks[name]) for name in STATES)
        found[CARRIED] = sums[CARRIED] + _row_sums(states * cotangents)
    return found


def store_squares(p: Variant, refs: dict[str, Any], sums: Results) -> None:
    """Store the cotangents of the products of pairs of steps; for the delta rule that of N."""
    t, j = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    for pair in p.pairs:
        value = sums[pair.name]
        if pair.left == "q":
            value = jnp.where(t >= j, p.scale * value, 0.0)
        else:
            value = jnp.where(t > j, -value if p.delta else value, 0.0)
        mp.store([refs[pair.name]], [value])


def _row_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1)


def of_rows(p: Variant, blocks: Blocks, scratch: list[list[Any]], sums: Results) -> Results:
    """Return the results of `gradients` for one chunk and its channels, without pairs of steps."""

    def row(name: str) -> jax.Array:
        return mp.joined(blocks[name])

    def read(name: str, value: jax.Array) -> jax.Array:
        if p.channel:
            return matrix_channels.Decays(p, blocks["logs"]).upto(name) * value
        return mp.scaled(blocks["upto"][0], value) if p.decay else value

    def written(value: jax.Array) -> jax.Array:
        if p.channel:
            return matrix_channels.Decays(p, blocks["logs"]).after() * value
        return mp.scaled(blocks["after"][0], value) if p.decay else value

    found = {"q": read("q", p.scale * sums["q"]), "k": written(sums["k"])}
    reads, writes = row("q") * found["q"], row("k") * found["k"]
    if p.delta:
        own = -read("k", sums["right"])
        found["d_beta"] = _row_sums(row("k") * own)
        own = mp.by_row(blocks["beta"][0], own.shape) * own
        reads = reads + row("k") * own
        found["k"] = found["k"] + own
    i, t = mp.row_indices(SQUARE), mp.column_indices(SQUARE)
    steps = [(i <= t, reads), (i > t, writes)]
    if p.vectors:
        found |= {"a": read("a", sums["right"]), "b": written(sums["b"])}
        steps[1] = (i > t, writes + row("b") * found["b"])
        steps += [(i < t, row("a") * found["a"])]
    if p.channel:
        found["logs"] = _sums_of_steps(p, scratch[0], steps)
    if p.decay:
        found |= {"d_reads": _row_sums(reads), "d_writes": _row_sums(writes)}
    return found | {name: sums[name] for name in (CARRIED,) if name in sums}


def of_pairs(
    p: Variant,
    blocks: Blocks,
    scratch: list[list[Any]],
    squares: dict[str, Any],
    found: Results,
) -> Results:
    """Add the terms of pairs of steps to the results of a chunk and its channels."""
    if p.channel:
        return matrix_channels.pairs_back(p, blocks, scratch, squares, found)
    return _add_pairs(p, blocks, scratch[0], squares, found)


def _sums_of_steps(p: Variant, scratch: list[Any], terms: list[tuple[jax.Array, jax.Array]]) -> Any:
    """Return the sums over t of the values of the terms, where their mask [i, t] is true."""
    found: Any = None
    for mask, value in terms:
        mp.store(scratch, mp.split(value, p.num.exact))
        found = mp.product(p.num, [mp.ones(mask)], scratch, found, in_registers=True)
    return found


def _add_pairs(
    p: Variant,
    blocks: Blocks,
    scratch: list[Any],
    squares: dict[str, Any],
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

    d_scores = decayed(mp.load(squares["scores"]))
    change = d_scores * mp.product(num, q, mp.transposed(k)) if p.decay else None
    pieces, turned = store(d_scores)
    dq = mp.product(num, pieces, k, found["q"], in_registers=True)
    dk = mp.product(num, turned, q, found["k"])
    if p.delta:
        d_lower = decayed(mp.load(squares["lower"]))
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
      arrays: "logs" and "carry", or "log_decay" and "upto".
      results: its results.
      length: T.
    """
    carried = results[CARRIED]
    if p.channel:
        last = jnp.moveaxis(arrays["carry"][0] * carried, 1, 2)
        total = (results["logs"] + jnp.repeat(last, CHUNK, axis=1))[:, :length]
        logs = matrix_blocks.total(arrays["logs"])[:, :length]
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
