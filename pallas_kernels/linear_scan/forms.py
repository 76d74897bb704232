"""What the kernels of the elementwise linear recurrence are, whatever they run on.

    pre:      h <- a_t h + x_t;   y_t = h
    post:     y_t = c + x_t;      c <- a_t y_t
    adjoint:  post, run on cotangents against time, and  da_t = y_t h_{t-1}  beside it

Where `reset` is set the product with a_t is replaced by zero. Complex numbers are pairs of real
arrays. Why these forms are enough is in `seqjax.ops.elementwise.linear_recurrence`.

A platform's module has `scan` and `adjoint`, which are these with its own `run`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Numbers = tuple[jax.Array, ...]  # one real array, or a real and an imaginary one
# (a, x, h0, reset, (states, start) or None, post, reverse, out_dtype, blocks, interpret)
# -> (y, final state, da or ()): both forms, and the adjoint if there are states.
Run = Callable[..., tuple[Numbers, Numbers, Numbers]]


def scan(
    run: Run,
    a: Numbers,
    x: Numbers,
    h0: Numbers,
    reset: jax.Array | None,
    *,
    post: bool,
    reverse: bool,
    out_dtype: Any,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Numbers, Numbers]:
    """Run one of the two forms.

    Args:
      run: the platform's.
      a: parts [B|1, T|1, D].
      x: parts [B, T, D].
      h0: parts [B, D] in the dtype of the state.
      reset: [B, T] bool or None.
      post: the form.
      reverse: time runs from the last row to the first.
      out_dtype: of the outputs.
      blocks: rows (a multiple of 16) and columns (of 128, or all) of a block.
      interpret: run without the hardware, slowly.

    Returns:
      (y, parts [B, T, D]; final state, parts [B, D]).

    Raises:
      NotImplementedError: for what the platform's kernel cannot do.
    """
    y, final, _ = run(a, x, h0, reset, None, post, reverse, out_dtype, blocks, interpret)
    return y, final


def adjoint(
    run: Run,
    a: Numbers,
    y: Numbers,
    h0: Numbers,
    reset: jax.Array | None,
    dy: Numbers,
    d_final: Numbers,
    *,
    reverse: bool,
    out_dtype: Any,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Numbers, Numbers, Numbers]:
    """The cotangents of (a, x, h0) of the `pre` form, from its outputs `y` and their cotangents.

    `reverse` is that of the form itself; `out_dtype` is that of dx.
    """
    dx, d_h0, da = run(
        a, dy, d_final, reset, (y, h0), True, not reverse, out_dtype, blocks, interpret
    )
    axes = tuple(i for i in range(3) if a[0].shape[i] == 1)
    da = tuple(jnp.sum(p, axis=axes, keepdims=True).astype(a[0].dtype) for p in da)
    return da, dx, d_h0


def named(counts: Mapping[str, int], refs: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """A kernel's refs by the names of its arrays, so many parts each."""
    found = {}
    first = 0
    for name, count in counts.items():
        found[name] = refs[first : first + count]
        first += count
    return found


def step(post: bool, h: Numbers, a: Numbers, x: Numbers, cut: Any) -> tuple[Numbers, Numbers]:
    """One step of a form: (y_t, what is carried on)."""
    if post:
        y = add(h, x)
        return y, unless(cut, multiply(a, y))
    y = add(unless(cut, multiply(a, h)), x)
    return y, y


def multiply(u: Numbers, v: Numbers) -> Numbers:
    """Of real numbers or of pairs."""
    if len(u) == 1:
        return (u[0] * v[0],)
    return u[0] * v[0] - u[1] * v[1], u[0] * v[1] + u[1] * v[0]


def add(u: Numbers, v: Numbers) -> Numbers:
    """Of real numbers or of pairs."""
    return tuple(p + q for p, q in zip(u, v, strict=True))


def unless(cut: Any, u: Numbers) -> Numbers:
    """Zero where `cut`, by selection: what was there may be NaN."""
    return u if cut is None else tuple(jnp.where(cut, jnp.zeros_like(p), p) for p in u)


def either(condition: Any, u: Numbers, v: Numbers) -> Numbers:
    """`u` where the condition holds, else `v`; None always holds."""
    if condition is None:
        return u
    return tuple(jnp.where(condition, p, q) for p, q in zip(u, v, strict=True))
