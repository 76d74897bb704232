"""Passes that carry a matrix state over the chunks, on GPU.

A thread block has one head and a tile of the columns of its state, and iterates over the chunks.
The state stays in the registers of one warpgroup. It is copied to shared memory once a chunk, as
the right factor of reads. The copy engine prefetches the next chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import matrix_blocks
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import Arrays, Blocks, Position, Variant
from pallas_kernels.gpu.matrix_products import CHUNK
from pallas_kernels.jax_compat import array_like, gpu_store, pl

OUTPUT_SLOTS = 2
KEPT = "kept"  # prefix of the names of pieces that the chunks keep


class SharedMemory(NamedTuple):
    """Buffers in shared memory.

    Attributes:
      rings: blocks of the inputs by name, with one slot for each chunk in flight or in use.
      state: pieces of the state before the chunk.
      values: pieces of right factors [64, columns] that a chunk computes, one after the other.
      out: outputs, two slots, or None.
      barriers: one for each slot of the rings.
    """

    rings: Blocks
    state: list[Any]
    values: list[Any]
    out: Any
    barriers: Any


class Chunk(NamedTuple):
    """Access to a chunk, for the function that computes it.

    Attributes:
      p: the variant.
      x: blocks of the inputs, by name.
      state: pieces of the state before the chunk in shared memory.
      values: shared memory for right factors.
      send: value [64, columns] -> None; stores the outputs.
      keep: value [64, columns] -> None; stores an exact array for a later kernel.
    """

    p: Variant
    x: Blocks
    state: list[Any]
    values: list[Any]
    send: Callable[[jax.Array], None]
    keep: Callable[[jax.Array], None]

    @property
    def k_read(self) -> list[Any]:
        """Pieces of the keys that read the state; `decayed` applies the decays they lack."""
        return self.x["k_read" if self.p.channel else "k"]

    @property
    def k_write(self) -> list[Any]:
        """Pieces of the keys that write to the state; `decayed` applies the decays they lack."""
        return self.x["k_write" if self.p.channel else "k"]

    @property
    def q_read(self) -> list[Any]:
        """Pieces of the queries; `decayed` applies the decays they lack."""
        return self.x["q_read" if self.p.channel else "q"]

    def decayed(self, name: str, value: jax.Array) -> jax.Array:
        """Multiply rows by decays; zero where the decay is, because a state may be NaN."""
        return mp.scaled(self.x[name][0], value) if name in self.x else value

    def write(self, value: jax.Array, count: int | None = None) -> list[Any]:
        """Write a right factor to shared memory, and return its pieces."""
        refs = self.values[: count or self.p.computed]
        mp.store(refs, mp.split(value, len(refs)))
        return refs

    def carried(self, state: jax.Array) -> jax.Array:
        """Apply all decays of the chunk to the state."""
        if self.p.channel:
            return mp.scaled(self.x["carry"][0], state)
        if not self.p.decay:
            return state
        total = self.x["upto"][0][CHUNK - 1]
        return jnp.where(total == 0.0, jnp.zeros_like(state), total * state)


def run(
    name: str,
    p: Variant,
    arrays: Arrays,
    initial: jax.Array,
    chunk: Callable[[Chunk, jax.Array], jax.Array],
    *,
    out_like: jax.Array | None = None,
    kept: str | None = None,
    states: bool = False,
    reverse: bool = False,
) -> Arrays:
    """Run a pass over all chunks.

    Args:
      name: name of the kernel.
      p: the variant.
      arrays: the inputs of a chunk.
      initial: [B, H, K, V], the first state.
      chunk: (chunk, state in registers) -> the next state.
      out_like: an array with the shape and dtype of the outputs, or None for no outputs.
      kept: name of the array that the chunks keep, or None.
      states: whether to store the state before each chunk.
      reverse: whether time runs from the last chunk to the first.

    Returns:
      "final" [B, H, K, V], with `out_like` "out" [B, T, H, V], with `kept` pieces
      [B, chunks * 64, H, V] of that name, and with `states` "states"
      [B, H, chunks, pieces, K, V] in bfloat16.
    """
    batch, heads, _, values = initial.shape
    outputs = {"final": array_like(initial, initial.shape, jnp.float32)}
    if out_like is not None:
        outputs["out"] = array_like(initial, out_like.shape, out_like.dtype)
    if states:
        shape = (batch, heads, p.chunks, p.computed, *initial.shape[2:])
        outputs["states"] = array_like(initial, shape, jnp.bfloat16)
    if kept is not None:
        shape = (batch, p.chunks * CHUNK, heads, values)
        like = array_like(initial, shape, jnp.bfloat16)
        outputs |= {f"{KEPT}{i}": like for i in range(p.computed)}
    leaves, tree = jax.tree.flatten(arrays)

    def body(*refs: Any, smem: SharedMemory) -> None:
        sources = jax.tree.unflatten(tree, refs[: len(leaves)])
        first, *targets = refs[len(leaves) :]
        stored = dict(zip(outputs, targets, strict=True))
        _kernel(p, chunk, reverse, sources, first, stored, smem)

    rings = {
        key: matrix_blocks.buffers(p, key, matrix_blocks.pieces(key, xs), (p.depth,))
        for key, xs in arrays.items()
    }
    out = None
    if out_like is not None:
        [out] = mp.buffers(p.num, (OUTPUT_SLOTS, CHUNK, p.columns), out_like.dtype)
    smem = SharedMemory(
        rings=rings,
        state=matrix_blocks.buffers(p, "states", p.computed),
        values=matrix_blocks.buffers(p, "v", p.computed),
        out=out,
        barriers=plgpu.Barrier(num_arrivals=sum(map(len, rings.values())), num_barriers=p.depth),
    )
    grid = {"column": values // p.columns, "head": heads, "batch": batch}
    given = [*leaves, initial]
    found = matrix_blocks.launch(name, body, given, outputs, smem, grid, p.num.interpret)
    results = {key: [x] for key, x in found.items() if not key.startswith(KEPT)}
    if kept is not None:
        results[kept] = [x for key, x in found.items() if key.startswith(KEPT)]
    return results


def _kernel(
    p: Variant,
    chunk: Callable[[Chunk, jax.Array], jax.Array],
    reverse: bool,
    sources: dict[str, list[Any]],
    first: Any,
    targets: dict[str, Any],
    smem: SharedMemory,
) -> None:
    batch, head, column = (lax.axis_index(name) for name in ("batch", "head", "column"))
    columns = pl.ds(column * p.columns, p.columns)

    def position(iteration: Any) -> Position:
        index = p.chunks - 1 - iteration if reverse else iteration
        return Position(batch, head, index, columns)

    def fetch(iteration: Any) -> None:
        slot, at = lax.rem(iteration, jnp.int32(p.depth)), position(iteration)
        for name, ring in smem.rings.items():
            block = [ref.at[slot] for ref in ring]
            matrix_blocks.fetch(p, name, sources[name], at, block, smem.barriers.at[slot])

    def step(i: Any, state: jax.Array) -> jax.Array:
        iteration = i.astype(jnp.int32)
        slot, at = lax.rem(iteration, jnp.int32(p.depth)), position(iteration)

        def send(value: jax.Array) -> None:
            out = smem.out.at[lax.rem(iteration, jnp.int32(OUTPUT_SLOTS))]
            if "states" not in targets:  # else all copies have ended
                plgpu.wait_smem_to_gmem(OUTPUT_SLOTS - 1, wait_read_only=True)
            mp.store([out], [value.astype(out.dtype)])
            target = targets["out"].at[batch, at.steps, head, columns]
            plgpu.copy_smem_to_gmem(out, target)

        def keep(value: jax.Array) -> None:
            for n, part in enumerate(mp.split(value, p.computed)):
                gpu_store(targets[f"{KEPT}{n}"].at[batch, at.steps, head, columns], part)

        if "states" in targets:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mp.store(smem.state, mp.split(state, p.computed))
        if "states" in targets:
            for n, ref in enumerate(smem.state):
                target = matrix_blocks.piece(p, "states", [targets["states"]], at, n)
                plgpu.copy_smem_to_gmem(ref, target)
        plgpu.barrier_wait(smem.barriers.at[slot])
        x = {name: [ref.at[slot] for ref in ring] for name, ring in smem.rings.items()}
        state = chunk(Chunk(p, x, smem.state, smem.values, send, keep), state)
        plgpu.commit_smem()  # all threads have read the slot
        pl.when(iteration + p.depth < p.chunks)(lambda: fetch(iteration + p.depth))
        return state

    for iteration in range(min(p.depth, p.chunks)):
        fetch(jnp.int32(iteration))
    state = lax.fori_loop(0, p.chunks, step, mp.load(first.at[batch, head, :, columns]))
    gpu_store(targets["final"].at[batch, head, :, columns], state)
    plgpu.wait_smem_to_gmem(0)
