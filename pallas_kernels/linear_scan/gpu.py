"""The elementwise linear recurrence on GPU: one pass over the arrays, forward and backward.

A thread has one feature of one sequence; the state stays in registers. Every element is read once
and written once, and all that a thread does is hidden behind the copies, if B x D / 128 thread
blocks are enough to keep the memory busy; time is split over more where they are not
(`gpu_split_time`). How the arrays come and go is in `pipeline`, what is computed in `forms`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import pipeline
from pallas_kernels.gpu.pipeline import Blocks, Near, Place
from pallas_kernels.gpu.tma import everywhere, zeros
from pallas_kernels.linear_scan import forms, gpu_split_time, pieces
from pallas_kernels.linear_scan.forms import Numbers
from pallas_kernels.vmem_rows import each, groups

Carry = tuple[Numbers, Numbers]


class Kind(NamedTuple):
    """What a kernel is specialised to, besides its blocks.

    Attributes:
      post: the form.
      a_in_time: whether `a` has rows, or is the same at all times.
      summed: whether the cotangent of `a` is summed over time.
      summary: whether only the final state is made, and the product of the decays.
      wide: dtype of the state.
    """

    post: bool
    a_in_time: bool
    summed: bool
    summary: bool
    wide: Any


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

    def like(*shape: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((batch, *shape, width), dtype),) * parts

    # The outputs of a block of time, and those of a whole sequence.
    made, ends = {"y": like(length, dtype=out_dtype)}, {"final": like(dtype=wide)}
    if summary:
        made, ends["product"] = {}, ends["final"]
    if states is not None and a_in_time:  # summed over the batch after
        made["da"] = like(length, dtype=wide if shared_by_all else a[0].dtype)
    elif states is not None:
        ends["da"] = like(dtype=wide)
    # The inputs in the same way.
    fetched: dict[str, Numbers] = {"x": x}
    begun: dict[str, Numbers] = {"h0": h0}
    if a_in_time:
        fetched["a"] = a
    else:
        begun["a"] = tuple(p[:, 0] for p in a)
    if states is not None:
        fetched["states"], begun["start"] = states

    name = "linear_scan" + ("_summary" if summary else "" if states is None else "_adjoint")
    pipeline.check_alignment("linear_scan", fetched, begun, made, ends)
    rows, ahead = pipeline.in_time(
        "linear_scan",
        length,
        width,
        pipeline.bytes_of_a_step(fetched),
        pipeline.bytes_of_a_step(made),
        blocks,
    )
    plan = Blocks(length, rows, min(ahead, -(-length // rows)), width, reverse, interpret)
    kind = Kind(post, a_in_time, "da" in ends, summary, wide)
    found = pipeline.call(
        name,
        plan,
        pipeline.Pass(
            functools.partial(_start, kind),
            functools.partial(_through, plan, kind),
            lambda carry: dict(zip(("final", "product" if summary else "da"), carry, strict=True)),
        ),
        fetched=fetched,
        begun=begun,
        made=made,
        ends=ends,
        reset=reset,
        edge=None if states is None else "states",
    )
    if summary:
        return (), found["final"], found["product"]
    da = found.get("da", ())
    return found["y"], found["final"], da if a_in_time else tuple(p[:, None] for p in da)


def _run_in_pieces(*args: Any) -> tuple[Numbers, Numbers, Numbers]:
    count = pieces(*args[1][0].shape)
    return _run(*args) if count == 1 else gpu_split_time.in_pieces(_run, count, *args)


scan = functools.partial(forms.scan, _run_in_pieces)
adjoint = functools.partial(forms.adjoint, _run_in_pieces)


def _start(kind: Kind, near: Near) -> tuple[dict[str, Numbers], Carry]:
    """What is there at all times, and (state, sum of da or product of decays)."""
    fixed = {
        name: tuple(ref[...].astype(kind.wide) for ref in refs) for name, refs in near.begun.items()
    }
    h: Numbers = fixed["h0"]
    total: Numbers = ()
    if kind.summary:
        total = tuple(zeros(kind.wide) + one for one in (1, 0)[: len(h)])
    elif kind.summed:
        total = tuple(zeros(kind.wide) for _ in h)
    return fixed, (h, total)


def _through(
    plan: Blocks,
    kind: Kind,
    near: Near,
    fixed: dict[str, Numbers],
    at: Place,
    carry: Carry,
) -> Carry:
    """Take (state, sum of da) through a block of time that lies in a slot, and fill a place."""
    fetched, (block, slot, place) = near.fetched, at
    count, valid = groups(block, plan.rows, plan.length, plan.group)

    def load(name: str, *where: Any) -> Numbers:
        return tuple(ref[(slot, *where)].astype(kind.wide) for ref in fetched[name])

    def put(name: str, t: Any, value: Numbers) -> None:
        for ref, part in zip(near.made[name], value, strict=True):
            ref[place, t] = part.astype(ref.dtype)

    if "edge" in fetched:
        # What the form's first step found in this block, and which step that is.
        outset = block == (0 if plan.reverse else plan.blocks - 1)
        edge = forms.either(everywhere(outset), fixed["start"], load("edge"))
        at_edge = 0 if plan.reverse else jnp.minimum(valid, plan.rows) - 1

    def group(i: Any, carry: Carry) -> Carry:
        base = (count - 1 - i if plan.reverse else i) * plan.group

        def row(r: Any, carry: Carry) -> Carry:
            h, total = carry
            t = base + r
            a, x = load("a", t) if kind.a_in_time else fixed["a"], load("x", t)
            cut = everywhere(fetched["reset"][0][slot, t] != 0) if "reset" in fetched else None
            inside = everywhere(t < valid) if plan.length % plan.group else None
            y, new = forms.step(kind.post, h, a, x, cut)
            new = forms.either(inside, new, h)
            if kind.summary:
                product = forms.unless(cut, forms.multiply(a, total))
                return new, forms.either(inside, product, total)
            put("y", t, y)
            if "edge" in fetched:
                before = jnp.clip(t - 1 if plan.reverse else t + 1, 0, plan.rows - 1)
                found = forms.either(everywhere(t == at_edge), edge, load("states", before))
                da = forms.unless(cut, forms.multiply(y, found))
                if kind.a_in_time:
                    put("da", t, da)
                else:
                    total = forms.either(inside, forms.add(total, da), total)
            return new, total

        return each(plan.group, row, carry, reverse=plan.reverse, unroll=not plan.interpret)

    return lax.fori_loop(0, count, group, carry)
