"""Time split over thread blocks, for too few sequences and features to fill a GPU.

T is split into segments, which the kernel treats as additional sequences. A first pass computes two
rows for each segment: its final state from a zero initial state, and the product of its decays. A
few steps over these rows, in XLA, give the initial state of each segment. The second pass is the
usual one. In both forms, the state after a segment is

    h <- P h + s        P the product, zero if there is a reset; s the state from zero

Inputs are read twice and outputs written once.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.linear_scan import forms
from pallas_kernels.linear_scan.forms import Numbers, Pass, PassResult, States
from pallas_kernels.selection import zero_where


class RunSummaryPass(Protocol):
    """Function that runs a pass, or computes only its final state and product of decays."""

    def __call__(self, call: Pass, summary: bool = False) -> PassResult:
        """Run the pass, or its summary."""
        ...


def run_in_segments(run_pass: RunSummaryPass, segments: int, call: Pass) -> PassResult:
    """Run a pass with time split into a number of segments."""
    a, x, h0, reset, states = call.a, call.x, call.h0, call.reset, call.states
    batch, length, width = x[0].shape

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(len(array) * segments, length // segments, *array.shape[2:])

    def by_segment(rows: Numbers) -> Numbers:
        return tuple(p.reshape(batch, segments, width) for p in rows)

    def join_segments(rows: list[Numbers]) -> Numbers:
        parts = zip(*rows, strict=True)
        return tuple(jnp.stack(part, 1).reshape(batch * segments, width) for part in parts)

    if a[0].shape[1] > 1:
        a = tuple(map(split, a))
    elif len(a[0]) > 1:
        a = tuple(jnp.repeat(p, segments, axis=0) for p in a)
    x = tuple(map(split, x))
    has_reset = None
    if reset is not None:
        reset = split(reset)
        has_reset = jnp.any(reset, axis=1).reshape(batch, segments, 1)

    zero = tuple(jnp.zeros((batch * segments, width), p.dtype) for p in h0)
    split_call = call._replace(a=a, x=x, h0=zero, reset=reset, states=None)
    summary = run_pass(split_call, summary=True)
    ends, products = by_segment(summary.final), by_segment(summary.da)
    order = range(segments)[:: -1 if call.reverse else 1]
    h, initial = h0, [h0] * segments
    for i in order:
        initial[i] = h
        decayed = forms.multiply(tuple(p[:, i] for p in products), h)
        decayed = zero_where(None if has_reset is None else has_reset[:, i], decayed)
        h = forms.add(decayed, tuple(p[:, i] for p in ends))

    if states is not None:
        # The state before a segment, in the direction of the differentiated form: the last state
        # of the segment before.
        y, start = states
        y = tuple(map(split, y))
        edge = -1 if call.reverse else 0
        edges = by_segment(tuple(p[:, edge].astype(s.dtype) for p, s in zip(y, start, strict=True)))
        starts = [tuple(p[:, i] for p in edges) for i in range(segments)]
        starts = [start, *starts[:-1]] if call.reverse else [*starts[1:], start]
        states = States(y, join_segments(starts))
    split_call = split_call._replace(h0=join_segments(initial), states=states)
    outputs, final, da = run_pass(split_call)
    outputs = tuple(p.reshape(batch, length, width) for p in outputs)
    if da and da[0].shape[1] > 1:
        da = tuple(p.reshape(batch, length, width) for p in da)
    elif da:
        da = tuple(p.sum(1, keepdims=True) for p in by_segment(da))
    return PassResult(outputs, tuple(p[:, order[-1]] for p in by_segment(final)), da)
