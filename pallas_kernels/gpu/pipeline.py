"""One pass of a recurrence over [B, T, D] on GPU: how its arrays come and go.

A thread block has 128 features of one sequence, one for each of its threads, and takes them
through all of time. The arrays come as the user has them, [B, T, D] or [B, T, R, D] for R numbers
of a feature, in blocks of time, which the copy engine (TMA) brings to shared memory several ahead
and takes back from there; it fills up what hangs over the end of an array. What a step does is the
op's. For Hopper and newer, by Mosaic GPU.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tma as gpu
from pallas_kernels.gpu.tma import AHEAD, BEHIND, MARKS, MOST, WIDTH
from pallas_kernels.jax_compat import array_like, pl

Arrays = Mapping[str, tuple[jax.Array, ...]]
Shapes = Mapping[str, tuple[jax.ShapeDtypeStruct, ...]]


class Blocks(NamedTuple):
    """How T and D are cut.

    Attributes:
      length: T.
      rows: of time in a block.
      ahead: blocks of time on their way to shared memory, or in use there.
      width: D.
      reverse: whether time runs from the last row to the first.
      interpret: whether it runs without a GPU.
    """

    length: int
    rows: int
    ahead: int
    width: int
    reverse: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        """Blocks of time."""
        return -(-self.length // self.rows)

    @property
    def across(self) -> int:
        """Blocks of features."""
        return -(-self.width // WIDTH)

    @property
    def group(self) -> int:
        """Rows that are unrolled together."""
        return min(self.rows, 8)


class Near(NamedTuple):
    """What there is in shared memory.

    Attributes:
      fetched: by name, refs [ahead, rows, (R,) 128] of what comes in blocks of time; "edge" is
        [ahead, (R,) 128], "reset" [ahead, rows].
      begun: refs [(R,) 128] of what comes once.
      made: refs [BEHIND, rows, (R,) 128] of what goes in blocks of time.
      ends: refs [(R,) 128] of what goes once.
    """

    fetched: dict[str, list[Any]]
    begun: dict[str, list[Any]]
    made: dict[str, list[Any]]
    ends: dict[str, list[Any]]


class Place(NamedTuple):
    """Where a block of time is: its number, and its places in `fetched` and in `made`."""

    block: Any
    slot: Any
    place: Any


class Pass(NamedTuple):
    """What an op does.

    Attributes:
      start: near -> (what stays the same, what is carried on).
      through: (near, what stays, place, carry) -> carry: takes it through a block of time, and
        fills that of `made`.
      finish: carry -> the values of `ends`, by name, in the order of their rows.
    """

    start: Callable[[Near], tuple[Any, Any]]
    through: Callable[[Near, Any, Place, Any], Any]
    finish: Callable[[Any], Mapping[str, tuple[Any, ...]]]


def bytes_of_a_step(arrays: Arrays | Shapes) -> int:
    """Of what comes or goes in blocks of time, for one thread block."""
    each = (x for group in arrays.values() for x in group)
    return sum(WIDTH * math.prod(x.shape[2:-1]) * jnp.dtype(x.dtype).itemsize for x in each)


def in_time(
    op: str, length: int, width: int, fetched: int, made: int, blocks: tuple[int, int] | None
) -> tuple[int, int]:
    """Steps of time in a block, and how many blocks ahead the copies are.

    A step takes so many bytes of shared memory for what is fetched and for what is made.

    Raises:
      NotImplementedError: for blocks that were asked for and do not fit.
    """
    if blocks is None:
        rows = gpu.steps(length, fetched, made)
        ahead = min(AHEAD, (MOST // rows - BEHIND * made) // fetched)
        if ahead < 2:
            raise NotImplementedError(
                f"{op}: the GPU kernel has no room for {(fetched + made) // WIDTH} bytes a "
                "step and feature; use implementation='xla' or None."
            )
        return rows, ahead
    rows, columns = blocks
    if columns != WIDTH and not columns == width < WIDTH:
        raise NotImplementedError(
            f"{op}: on GPU `block_sizes` must have {WIDTH} features, got {columns}."
        )
    longest = min(256, MOST // (2 * fetched + BEHIND * made) // 16 * 16)
    if rows > longest:
        raise NotImplementedError(
            f"{op}: on GPU `block_sizes` of these arrays can have {longest} steps, got {rows}."
        )
    return rows, min(AHEAD, (MOST // rows - BEHIND * made) // fetched)


def check_alignment(op: str, *arrays: Arrays | Shapes) -> None:
    """Refuse rows that the copy engine cannot take.

    Raises:
      NotImplementedError: for one.
    """
    given: list[Any] = [x for group in arrays for xs in group.values() for x in xs]
    gpu.check_alignment(op, given)


def as_read(row: Any) -> jax.Array:
    """A row [128] laid out as what is read from memory, as a loop's carry has to stay."""
    return plgpu.layout_cast(row, plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=1))


def call(
    name: str,
    plan: Blocks,
    work: Pass,
    *,
    fetched: Arrays,
    begun: Arrays,
    made: Shapes,
    ends: Shapes,
    reset: jax.Array | None = None,
    edge: str | None = None,
) -> dict[str, tuple[jax.Array, ...]]:
    """Run a pass.

    Args:
      name: the kernel's.
      plan: the blocks.
      work: what is done.
      fetched: by name, arrays [S, T, (R,) D] that come in blocks of time, S a divisor of B.
      begun: arrays [S, (R,) D] that come once.
      made: arrays [B, T, (R,) D] that go in blocks of time.
      ends: arrays [B, (R,) D] that go once; there is at least one.
      reset: [B, T] bool; comes as "reset", in int32.
      edge: the name among `fetched` of what each block also needs the row before its first of, in
        time as it is in the array; comes as "edge".

    Returns:
      The arrays of `made` and `ends`, by name.
    """
    inputs, outputs = {"fetched": dict(fetched), "begun": dict(begun)}, {**made, **ends}

    def refs(lead: tuple[int, ...], skipped: int, arrays: Any) -> dict[str, list[Any]]:
        return {
            k: [plgpu.SMEM((*lead, *x.shape[skipped:-1], WIDTH), x.dtype) for x in v]
            for k, v in arrays.items()
        }

    near = Near(
        refs((plan.ahead, plan.rows), 2, fetched),
        refs((), 1, begun),
        refs((BEHIND, plan.rows), 2, made),
        refs((), 1, ends),
    )
    if edge is not None:
        near.fetched["edge"] = refs((plan.ahead,), 2, {edge: fetched[edge]})[edge]
    if reset is not None:
        inputs["fetched"]["reset"] = (gpu.marks(reset),)
        near.fetched["reset"] = [plgpu.SMEM((plan.ahead, max(plan.rows, MARKS)), jnp.int32)]
    leaves, tree = jax.tree.flatten(inputs)
    shapes, out_tree = jax.tree.flatten(outputs)
    batch = shapes[0].shape[0]

    def kernel(*given: Any, near: Near, ready: Any, first: Any) -> None:
        far = jax.tree.unflatten(tree, given[: len(leaves)])
        far["sent"] = jax.tree.unflatten(out_tree, given[len(leaves) :])
        _kernel(plan, work, edge, far, near, ready, first)

    arriving = sum(map(len, near.fetched.values()))
    out = gpu.launch(
        kernel,
        leaves,
        [array_like(leaves[0], s.shape, s.dtype) for s in shapes],
        {
            "near": near,
            "ready": plgpu.Barrier(num_arrivals=arriving, num_barriers=plan.ahead),
            "first": plgpu.Barrier(num_arrivals=sum(map(len, near.begun.values()))),
        },
        batch * plan.across,
        name=name,
        interpret=plan.interpret,
    )
    return jax.tree.unflatten(out_tree, out)


def _kernel(
    plan: Blocks, work: Pass, edge: str | None, far: Any, near: Near, ready: Any, first: Any
) -> None:
    sequence, column = gpu.position(plan.across)
    columns = pl.ds(column * WIDTH, WIDTH)

    def member(source: Any) -> Any:
        """Which of its sequences: all take them in turn."""
        return lax.rem(sequence, jnp.int32(source.shape[0]))

    def middle(near: Any, lead: int) -> tuple[Any, ...]:
        """All the R numbers of a feature."""
        return (slice(None),) * (len(near.shape) - lead - 1)

    def in_time(step: Any) -> Any:
        return plan.blocks - 1 - step if plan.reverse else step

    def fetch(step: Any) -> None:
        """Have a block of time brought to its place."""
        slot, start = lax.rem(step, jnp.int32(plan.ahead)), in_time(step) * plan.rows
        # Its edge is the last state before it, in the form's own direction.
        before = jnp.maximum(start - 1, 0) if plan.reverse else start + plan.rows
        for name, refs in near.fetched.items():
            for source, to in zip(
                far["fetched"][edge if name == "edge" else name], refs, strict=True
            ):
                where: tuple[Any, ...] = (member(source), pl.ds(start, plan.rows))
                if name == "reset":
                    where = (sequence, pl.ds(start, to.shape[-1]))
                elif name == "edge":
                    at = jnp.minimum(before, plan.length - 1)
                    where = (member(source), at, *middle(to, 1), columns)
                else:
                    where = (*where, *middle(to, 2), columns)
                plgpu.copy_gmem_to_smem(source.at[where], to.at[slot], ready.at[slot])

    def send(source: Any, to: Any, start: Any, count: int) -> None:
        """Have rows of several numbers of a feature taken away.

        They are not contiguous where they hang over the features.
        """
        where = (sequence, pl.ds(start, count), *middle(source, 1), columns)
        plgpu.copy_smem_to_gmem(source.at[pl.ds(0, count)], to.at[where], commit_group=False)

    lax.fori_loop(0, plan.ahead, lambda i, _: fetch(i.astype(jnp.int32)), None)
    for name, refs in near.begun.items():
        for source, to in zip(far["begun"][name], refs, strict=True):
            where = (member(source), *middle(to, 0), columns)
            plgpu.copy_gmem_to_smem(source.at[where], to, first)
    plgpu.barrier_wait(first)
    fixed, carry = work.start(near)

    def block_of_time(i: Any, carry: Any) -> Any:
        step = i.astype(jnp.int32)
        block, slot = in_time(step), lax.rem(step, jnp.int32(plan.ahead))
        place = lax.rem(step, jnp.int32(BEHIND))
        plgpu.barrier_wait(ready.at[slot])
        plgpu.wait_smem_to_gmem(BEHIND - 1, wait_read_only=True)
        carry = work.through(near, fixed, Place(block, slot, place), carry)
        plgpu.commit_smem()
        for name, refs in near.made.items():
            for source, to in zip(refs, far["sent"][name], strict=True):
                tile, start = source.at[place], block * plan.rows
                if len(to.shape) == 3:
                    gpu.send(tile, to, (sequence,), start, plan.length, column)
                else:
                    last = block == plan.blocks - 1
                    copy = functools.partial(send, tile, to, start)
                    gpu.exactly(plan.length, plan.rows, last, copy)
        plgpu.commit_smem_to_gmem_group()
        pl.when(step + plan.ahead < plan.blocks)(lambda: fetch(step + plan.ahead))
        return carry

    values = work.finish(lax.fori_loop(0, plan.blocks, block_of_time, carry))
    for name, refs in near.ends.items():
        for ref, value in zip(refs, values[name], strict=True):
            if len(ref.shape) == 1:
                ref[...] = value
            else:
                for r, row in enumerate(value):
                    ref[r] = row
    plgpu.commit_smem()
    for name, refs in near.ends.items():
        for source, to in zip(refs, far["sent"][name], strict=True):
            if len(source.shape) == 1:
                gpu.send_row(source, to, (sequence,), column, plan.across)
            else:
                where = (sequence, *middle(source, 0), columns)
                plgpu.copy_smem_to_gmem(source, to.at[where], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
