"""The elementwise linear recurrence on GPU: one pass over the arrays, forward and backward.

A thread block has 128 features of one sequence, one for each of its threads, and takes them
through all of time; the state stays in registers. The arrays come as the user has them, [B, T, D],
in blocks of [Tb, 128], which the copy engine (TMA) brings to shared memory several blocks ahead
and takes back from there; it fills up what hangs over the end of an array. So every
element is read once and written once, and all that a thread does is hidden behind the copies, if
B x D / 128 thread blocks are enough to keep the memory busy; time is split over more where they
are not (`_gpu_pieces`).

What is computed is in `_form`. For Hopper and newer, by Mosaic GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _gpu_blocks as gpu
from pallas_kernels._compat import array_like, pl
from pallas_kernels._rows import each, groups
from pallas_kernels.linear_scan import _form, _gpu_pieces
from pallas_kernels.linear_scan._form import Numbers


class Plan(NamedTuple):
    """What a kernel is specialised to.

    Attributes:
      length: T.
      rows: of time in a block.
      ahead: blocks of time on their way to shared memory, or in use there.
      width: D.
      post: the form.
      reverse: whether time runs from the last row to the first.
      a_in_time: whether `a` has rows, or is the same at all times.
      sequences: that `a` has; the others take them in turn.
      summary: whether only the final state is made, and the product of the decays.
      interpret: whether it runs without a GPU.
    """

    length: int
    rows: int
    ahead: int
    width: int
    post: bool
    reverse: bool
    a_in_time: bool
    sequences: int
    summary: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        """Blocks of time."""
        return -(-self.length // self.rows)

    @property
    def across(self) -> int:
        """Blocks of features."""
        return -(-self.width // gpu.WIDTH)

    @property
    def group(self) -> int:
        """Rows that are unrolled together."""
        return min(self.rows, 8)


def _in_time(
    length: int, width: int, fetched: int, made: int, blocks: tuple[int, int] | None
) -> tuple[int, int]:
    """Steps of time in a block, and how many blocks ahead the copies are.

    A step takes so many bytes of shared memory for what is fetched and for what is made.
    """
    if blocks is None:
        return gpu.steps(length, fetched, made), gpu.AHEAD
    rows, columns = blocks
    if columns != gpu.WIDTH and not columns == width < gpu.WIDTH:
        raise NotImplementedError(
            f"linear_scan: on GPU `block_sizes` must have {gpu.WIDTH} features, got {columns}."
        )
    longest = min(256, gpu.MOST // (2 * fetched + gpu.BEHIND * made) // 16 * 16)
    if rows > longest:
        raise NotImplementedError(
            f"linear_scan: on GPU `block_sizes` of these arrays can have {longest} steps, got "
            f"{rows}."
        )
    return rows, min(gpu.AHEAD, (gpu.MOST // rows - gpu.BEHIND * made) // fetched)


def _run(
    a: Numbers,
    x: Numbers,
    h0: Numbers,
    reset: jax.Array | None,
    states: tuple[Numbers, Numbers] | None,
    post: bool,
    reverse: bool,
    out_dtype: Any,
    blocks: tuple[int, int] | None,
    interpret: bool,
    summary: bool = False,
) -> tuple[Numbers, Numbers, Numbers]:
    """Both forms, and the adjoint if there are states; a summary's third are the products."""
    batch, length, width = x[0].shape
    wide, parts = h0[0].dtype, len(x)
    a_in_time, shared_by_all = a[0].shape[1] > 1 or length == 1, a[0].shape[0] < batch
    # The outputs of a block of time, and those of a whole sequence.
    made: dict[str, Any] = {"y": jax.ShapeDtypeStruct((batch, length, width), out_dtype)}
    ends: dict[str, Any] = {"final": jax.ShapeDtypeStruct((batch, width), wide)}
    if summary:
        made, ends["product"] = {}, ends["final"]
    if states is not None and a_in_time:  # summed over the batch after
        made["da"] = jax.ShapeDtypeStruct(x[0].shape, wide if shared_by_all else a[0].dtype)
    elif states is not None:
        ends["da"] = jax.ShapeDtypeStruct((batch, width), wide)
    # The inputs in the same way.
    fetched: dict[str, Numbers] = {"x": x}
    begun: dict[str, Numbers] = {"h0": h0}
    if a_in_time:
        fetched["a"] = a
    else:
        begun["a"] = tuple(p[:, 0] for p in a)
    if states is not None:
        fetched["states"], begun["start"] = states
    given = [array for arrays in (*fetched.values(), *begun.values()) for array in arrays]
    gpu.check_alignment("linear_scan", given)

    rows, ahead = _in_time(
        length,
        width,
        gpu.WIDTH * sum(p.dtype.itemsize for arrays in fetched.values() for p in arrays),
        gpu.WIDTH * parts * sum(jnp.dtype(out.dtype).itemsize for out in made.values()),
        blocks,
    )
    plan = Plan(
        length=length,
        rows=rows,
        ahead=min(ahead, -(-length // rows)),
        width=width,
        post=post,
        reverse=reverse,
        a_in_time=a_in_time,
        sequences=a[0].shape[0],
        summary=summary,
        interpret=interpret,
    )

    def shared(*shape: int, dtype: Any, count: int = parts) -> list[Any]:
        return [plgpu.SMEM(shape, dtype) for _ in range(count)]

    scratch: dict[str, Any] = {
        "fetched": {
            name: shared(plan.ahead, plan.rows, gpu.WIDTH, dtype=arrays[0].dtype)
            for name, arrays in fetched.items()
        },
        "begun": {name: shared(gpu.WIDTH, dtype=arrays[0].dtype) for name, arrays in begun.items()},
        "made": {
            name: shared(gpu.BEHIND, plan.rows, gpu.WIDTH, dtype=out.dtype)
            for name, out in made.items()
        },
        "ends": {name: shared(gpu.WIDTH, dtype=out.dtype) for name, out in ends.items()},
    }
    if states is not None:
        scratch["fetched"]["edge"] = shared(plan.ahead, gpu.WIDTH, dtype=states[0][0].dtype)
    if reset is not None:
        fetched["reset"] = (gpu.marks(reset),)
        most = max(plan.rows, gpu.MARKS)
        scratch["fetched"]["reset"] = shared(plan.ahead, most, dtype=jnp.int32, count=1)
    scratch["ready"] = plgpu.Barrier(
        num_arrivals=sum(map(len, scratch["fetched"].values())), num_barriers=plan.ahead
    )
    scratch["first"] = plgpu.Barrier(num_arrivals=sum(map(len, scratch["begun"].values())))

    inputs, outputs = fetched | begun, made | ends
    counts = {name: len(arrays) for name, arrays in inputs.items()}
    counts |= {f"out_{name}": parts for name in outputs}
    out = gpu.launch(
        functools.partial(_kernel, plan, counts),
        [array for arrays in inputs.values() for array in arrays],
        [
            array_like(x[0], like.shape, like.dtype)
            for like in outputs.values()
            for _ in range(parts)
        ],
        scratch,
        batch * plan.across,
        name="linear_scan" + ("_summary" if summary else "" if states is None else "_adjoint"),
        interpret=interpret,
    )
    found = {name: tuple(out[i * parts : (i + 1) * parts]) for i, name in enumerate(outputs)}
    if summary:
        return (), found["final"], found["product"]
    da = found.get("da", ())
    return found["y"], found["final"], da if a_in_time else tuple(p[:, None] for p in da)


def _run_in_pieces(*args: Any) -> tuple[Numbers, Numbers, Numbers]:
    x = args[1]
    count = _gpu_pieces.pieces(*x[0].shape)
    return _run(*args) if count == 1 else _gpu_pieces.in_pieces(_run, count, *args)


scan = functools.partial(_form.scan, _run_in_pieces)
adjoint = functools.partial(_form.adjoint, _run_in_pieces)


def _kernel(
    plan: Plan,
    counts: dict[str, int],
    *refs: Any,
    fetched: dict[str, list[Any]],
    begun: dict[str, list[Any]],
    made: dict[str, list[Any]],
    ends: dict[str, list[Any]],
    ready: Any,
    first: Any,
) -> None:
    far = _form.named(counts, refs)
    sequence, column = gpu.position(plan.across)
    columns = pl.ds(column * gpu.WIDTH, gpu.WIDTH)
    of_a = lax.rem(sequence, jnp.int32(plan.sequences))

    def in_time(step: Any) -> Any:
        return plan.blocks - 1 - step if plan.reverse else step

    def fetch(step: Any) -> None:
        """Have a block of time brought to its place."""
        block, slot = in_time(step), lax.rem(step, jnp.int32(plan.ahead))
        start = block * plan.rows
        # Its edge is the last state before it, in the form's own direction.
        edge = jnp.maximum(start - 1, 0) if plan.reverse else start + plan.rows
        for name, near in fetched.items():
            where: tuple[Any, ...] = (sequence, pl.ds(start, plan.rows), columns)
            if name == "reset":
                where = (sequence, pl.ds(start, near[0].shape[-1]))
            elif name == "edge":
                where = (sequence, jnp.minimum(edge, plan.length - 1), columns)
            elif name == "a":
                where = (of_a, *where[1:])
            for source, to in zip(far["states" if name == "edge" else name], near, strict=True):
                plgpu.copy_gmem_to_smem(source.at[where], to.at[slot], ready.at[slot])

    lax.fori_loop(0, plan.ahead, lambda i, _: fetch(i.astype(jnp.int32)), None)
    for name, near in begun.items():
        for source, to in zip(far[name], near, strict=True):
            where = (of_a if name == "a" else sequence, columns)
            plgpu.copy_gmem_to_smem(source.at[where], to, first)
    plgpu.barrier_wait(first)
    h, wide = tuple(ref[...] for ref in begun["h0"]), begun["h0"][0].dtype
    fixed = {name: tuple(ref[...].astype(wide) for ref in near) for name, near in begun.items()}
    total: Numbers = ()
    if plan.summary:
        total = tuple(gpu.zeros(wide) + one for one in (1, 0)[: len(h)])
    elif "da" in ends:
        total = tuple(gpu.zeros(wide) for _ in h)

    def block_of_time(i: Any, carry: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
        step = i.astype(jnp.int32)
        block, slot = in_time(step), lax.rem(step, jnp.int32(plan.ahead))
        place = lax.rem(step, jnp.int32(gpu.BEHIND))
        plgpu.barrier_wait(ready.at[slot])
        plgpu.wait_smem_to_gmem(gpu.BEHIND - 1, wait_read_only=True)
        carry = _through(plan, block, slot, place, carry, fetched, fixed, made)
        plgpu.commit_smem()
        for name, near in made.items():
            for source, to in zip(near, far[f"out_{name}"], strict=True):
                start = block * plan.rows
                gpu.send(source.at[place], to, (sequence,), start, plan.length, column)
        plgpu.commit_smem_to_gmem_group()
        pl.when(step + plan.ahead < plan.blocks)(lambda: fetch(step + plan.ahead))
        return carry

    h, total = lax.fori_loop(0, plan.blocks, block_of_time, (h, total))
    for name, near in ends.items():
        for ref, value in zip(near, h if name == "final" else total, strict=True):
            ref[...] = value
    plgpu.commit_smem()
    for name, near in ends.items():
        for source, to in zip(near, far[f"out_{name}"], strict=True):
            gpu.send_row(source, to, (sequence,), column, plan.across)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def _through(
    plan: Plan,
    block: Any,
    slot: Any,
    place: Any,
    carry: tuple[Numbers, Numbers],
    fetched: dict[str, list[Any]],
    fixed: dict[str, Numbers],
    made: dict[str, list[Any]],
) -> tuple[Numbers, Numbers]:
    """Take (state, sum of da) through a block of time that lies in `slot`, and fill `place`."""
    wide = fixed["h0"][0].dtype
    count, valid = groups(block, plan.rows, plan.length, plan.group)

    def load(name: str, *where: Any) -> Numbers:
        return tuple(ref[(slot, *where)].astype(wide) for ref in fetched[name])

    def put(name: str, t: Any, value: Numbers) -> None:
        for ref, part in zip(made[name], value, strict=True):
            ref[place, t] = part.astype(ref.dtype)

    if "edge" in fetched:
        # What the form's first step found in this block, and which step that is.
        outset = block == (0 if plan.reverse else plan.blocks - 1)
        edge = _form.either(gpu.everywhere(outset), fixed["start"], load("edge"))
        at_edge = 0 if plan.reverse else jnp.minimum(valid, plan.rows) - 1

    def group(i: Any, carry: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
        base = (count - 1 - i if plan.reverse else i) * plan.group

        def row(r: Any, carry: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
            h, total = carry
            t = base + r
            a, x = load("a", t) if plan.a_in_time else fixed["a"], load("x", t)
            cut = gpu.everywhere(fetched["reset"][0][slot, t] != 0) if "reset" in fetched else None
            inside = gpu.everywhere(t < valid) if plan.length % plan.group else None
            y, new = _form.step(plan.post, h, a, x, cut)
            new = _form.either(inside, new, h)
            if plan.summary:
                product = _form.unless(cut, _form.multiply(a, total))
                return new, _form.either(inside, product, total)
            put("y", t, y)
            if "edge" in fetched:
                before = jnp.clip(t - 1 if plan.reverse else t + 1, 0, plan.rows - 1)
                found = _form.either(gpu.everywhere(t == at_edge), edge, load("states", before))
                da = _form.unless(cut, _form.multiply(y, found))
                if plan.a_in_time:
                    put("da", t, da)
                else:
                    total = _form.either(inside, _form.add(total, da), total)
            return new, total

        return each(plan.group, row, carry, reverse=plan.reverse, unroll=not plan.interpret)

    return lax.fori_loop(0, count, group, carry)
