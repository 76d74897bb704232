"""Time split over thread blocks, where there are too few sequences and features to fill a GPU.

T is cut into pieces, which are as many sequences more. A first pass over the inputs writes two
rows for each piece: the state that it ends in if it begins at zero, and the product of its decays.
A few steps over these, outside, give the state that each begins in; the pass that everybody takes
does the rest. Whatever the form, the state after a piece is

    h <- P h + s        P the product, zero if there is a reset; s the state from zero

Inputs are read twice and outputs written once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_scan import forms
from pallas_kernels.linear_scan.forms import Numbers, Run


def in_pieces(
    run: Run,
    count: int,
    a: Numbers,
    x: Numbers,
    h0: Numbers,
    reset: jax.Array | None,
    states: tuple[Numbers, Numbers] | None,
    post: bool,
    reverse: bool,
    *rest: Any,
) -> tuple[Numbers, Numbers, Numbers]:
    """`run` with time cut into so many pieces; `rest` is handed on."""
    batch, length, width = x[0].shape

    def cut(array: jax.Array) -> jax.Array:
        return array.reshape(len(array) * count, length // count, *array.shape[2:])

    def by_piece(rows: Numbers) -> Numbers:
        return tuple(p.reshape(batch, count, width) for p in rows)

    def of_pieces(rows: list[Numbers]) -> Numbers:
        parts = zip(*rows, strict=True)
        return tuple(jnp.stack(part, 1).reshape(batch * count, width) for part in parts)

    if a[0].shape[1] > 1:
        a = tuple(map(cut, a))
    elif len(a[0]) > 1:
        a = tuple(jnp.repeat(p, count, axis=0) for p in a)
    x = tuple(map(cut, x))
    cleared = None
    if reset is not None:
        reset = cut(reset)
        cleared = jnp.any(reset, axis=1).reshape(batch, count, 1)

    zero = tuple(jnp.zeros((batch * count, width), p.dtype) for p in h0)
    _, ends, products = run(a, x, zero, reset, None, post, reverse, *rest, summary=True)
    ends, products = by_piece(ends), by_piece(products)
    order = range(count)[:: -1 if reverse else 1]
    h, begins = h0, [h0] * count
    for i in order:
        begins[i] = h
        kept = forms.multiply(tuple(p[:, i] for p in products), h)
        kept = forms.unless(None if cleared is None else cleared[:, i], kept)
        h = forms.add(kept, tuple(p[:, i] for p in ends))

    if states is not None:
        # What the form's first step found in a piece: the last state of the one before.
        y, start = states
        y = tuple(map(cut, y))
        edge = -1 if reverse else 0
        edges = by_piece(tuple(p[:, edge].astype(s.dtype) for p, s in zip(y, start, strict=True)))
        found = [tuple(p[:, i] for p in edges) for i in range(count)]
        found = [start, *found[:-1]] if reverse else [*found[1:], start]
        states = y, of_pieces(found)
    y, final, da = run(a, x, of_pieces(begins), reset, states, post, reverse, *rest)
    y = tuple(p.reshape(batch, length, width) for p in y)
    if da and da[0].shape[1] > 1:
        da = tuple(p.reshape(batch, length, width) for p in da)
    elif da:
        da = tuple(p.sum(1, keepdims=True) for p in by_piece(da))
    return y, tuple(p[:, order[-1]] for p in by_piece(final)), da
