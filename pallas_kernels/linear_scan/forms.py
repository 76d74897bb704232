"""The two forms of the elementwise linear recurrence, shared by the platforms.

    pre:      h <- a_t h + x_t;   y_t = h
    post:     y_t = c + x_t;      c <- a_t y_t
    adjoint:  post, run on cotangents against time, and  da_t = y_t h_{t-1}

Where `reset` is true the product with a_t is replaced by zero. A complex array is a pair of real
arrays. `seqjax.ops.elementwise.linear_recurrence` explains why these forms suffice.

Each platform's module has one function that runs a `Pass`, and from it `scan` and `adjoint`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.selection import Arrays, zero_where

Numbers = Arrays  # one real array, or a real and an imaginary one


class States(NamedTuple):
    """States of the differentiated form, the residuals of its adjoint.

    Attributes:
      outputs: parts [B, T, D], the states after each step.
      initial: parts [B, D], the state before the first step.
    """

    outputs: Numbers
    initial: Numbers


class Pass(NamedTuple):
    """Arguments of one kernel run over time.

    Attributes:
      a: parts [B|1, T|1, D].
      x: parts [B, T, D].
      h0: parts [B, D] in the dtype of the state.
      reset: [B, T] bool or None.
      states: residuals if the pass also computes the cotangent of `a`, else None.
      post: whether this is the `post` form.
      reverse: whether time runs from the last row to the first.
      out_dtype: dtype of the outputs.
      block_sizes: rows and columns of a block, or None to choose automatically.
      interpret: whether to run in interpret mode, without the hardware.
    """

    a: Numbers
    x: Numbers
    h0: Numbers
    reset: jax.Array | None
    states: States | None
    post: bool
    reverse: bool
    out_dtype: Any
    block_sizes: tuple[int, int] | None
    interpret: bool


class PassResult(NamedTuple):
    """Results of a pass.

    Attributes:
      y: outputs, parts [B, T, D].
      final: final state, parts [B, D].
      da: cotangent of `a` before sums over the batch or over time, () without `states`.
    """

    y: Numbers
    final: Numbers
    da: Numbers


RunPass = Callable[[Pass], PassResult]


def scan(
    run_pass: RunPass,
    a: Numbers,
    x: Numbers,
    h0: Numbers,
    reset: jax.Array | None,
    *,
    post: bool,
    reverse: bool,
    out_dtype: Any,
    block_sizes: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Numbers, Numbers]:
    """Run one of the two forms.

    Args:
      run_pass: the platform's function.
      a: parts [B|1, T|1, D].
      x: parts [B, T, D].
      h0: parts [B, D] in the dtype of the state.
      reset: [B, T] bool or None.
      post: whether to run the `post` form.
      reverse: whether time runs from the last row to the first.
      out_dtype: dtype of the outputs.
      block_sizes: rows (a multiple of 16) and columns (a multiple of 128, or all) of a block.
      interpret: run in interpret mode, without the hardware. This is slow.

    Returns:
      (y, parts [B, T, D]; final state, parts [B, D]).

    Raises:
      NotImplementedError: if the platform's kernel does not support the arguments.
    """
    result = run_pass(Pass(a, x, h0, reset, None, post, reverse, out_dtype, block_sizes, interpret))
    return result.y, result.final


def adjoint(
    run_pass: RunPass,
    a: Numbers,
    y: Numbers,
    h0: Numbers,
    reset: jax.Array | None,
    dy: Numbers,
    d_final: Numbers,
    *,
    reverse: bool,
    out_dtype: Any,
    block_sizes: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Numbers, Numbers, Numbers]:
    """Compute the cotangents of (a, x, h0) of the `pre` form from its outputs and their cotangents.

    `reverse` is the direction of the `pre` form; `out_dtype` is the dtype of dx.
    """
    states = States(y, h0)
    result = run_pass(
        Pass(a, dy, d_final, reset, states, True, not reverse, out_dtype, block_sizes, interpret)
    )
    axes = tuple(i for i in range(3) if a[0].shape[i] == 1)
    da = tuple(jnp.sum(p, axis=axes, keepdims=True).astype(a[0].dtype) for p in result.da)
    return da, result.y, result.final


def advance(post: bool, h: Numbers, a: Numbers, x: Numbers, reset: Any) -> tuple[Numbers, Numbers]:
    """Run one step of a form and return (y_t, the next carry)."""
    if post:
        y = add(h, x)
        return y, zero_where(reset, multiply(a, y))
    y = add(zero_where(reset, multiply(a, h)), x)
    return y, y


def multiply(u: Numbers, v: Numbers) -> Numbers:
    """Multiply two real arrays or two pairs."""
    if len(u) == 1:
        return (u[0] * v[0],)
    return u[0] * v[0] - u[1] * v[1], u[0] * v[1] + u[1] * v[0]


def add(u: Numbers, v: Numbers) -> Numbers:
    """Add two real arrays or two pairs."""
    return tuple(p + q for p, q in zip(u, v, strict=True))
