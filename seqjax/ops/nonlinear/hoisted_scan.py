"""Scan over time that computes all that does not depend on the carry outside of the loop.

A step of a cell is small. On CPU, each of its operations costs about as much to start as to run,
and slicing the gates of a step keeps XLA from vectorizing the rest. The program of a step is
therefore split in three. Values of parameters alone are computed once, values of the inputs for all
steps at once, and only the others in the loop. Values that are much larger than the inputs and the
state of a step stay in the loop too, because those of all steps would need too much memory.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxprs_in_params

from pallas_kernels.jaxpr_interpreter import interpret, primitive_names
from seqjax.types import PyTree

CONSTANT, PER_STEP, IN_LOOP = range(3)
FEW = 8  # coupled numbers of a channel; more are the channels of a head
# Largest size of a value that is computed for all steps, relative to a step's inputs and carry.
LARGEST = 2
# Functions with custom derivatives stay whole.
_INLINED = primitive_names("jit pjit closed_call")


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value of a step: CONSTANT, PER_STEP with leading axis B * T, or IN_LOOP without array."""

    kind: int
    array: Any = None


def hoisted_scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    *,
    reverse: bool = False,
) -> tuple[PyTree, PyTree]:
    """Compute a recurrence as `lax.scan` over axis 1 of `xs` does, with a loop that is minimal.

    Args:
      step: (carry, x) -> (carry, y), for one step of one sequence. It may close over arrays. If it
        has effects, such as callbacks, all of it runs in the loop.
      carry: pytree of [B, ...] arrays.
      xs: pytree of [B, T, ...] arrays.
      reverse: run from the last step to the first.

    Returns:
      (final carry, ys): ys is a pytree of [B, T, ...] arrays.
    """
    flat, tree = jax.tree.flatten(carry)
    leaves = jax.tree.leaves(xs)
    batch, length = leaves[0].shape[:2]
    row = jax.tree.map(lambda c: c[0], carry), jax.tree.map(lambda x: x[0, 0], xs)
    program, shapes = jax.make_jaxpr(step, return_shape=True)(*row)
    if program.effects:
        return _plain_scan(step, carry, xs, reverse=reverse)
    largest = LARGEST * sum(math.prod(x.shape) for x in jax.tree.leaves(row))
    loop: list[_Operation] = []

    def apply(eqn: Any, ins: list[_Value]) -> list[_Value]:
        kind = max((v.kind for v in ins), default=CONSTANT)
        if kind == IN_LOOP or (kind == PER_STEP and _size(eqn) > largest):
            operation = _in_loop(eqn, ins)
            loop.append(operation)
            return operation.outs
        run = _bind(eqn, eqn.params)
        if kind == PER_STEP:
            run = jax.vmap(run, [0 if v.kind == PER_STEP else None for v in ins])
        return [_Value(kind, array) for array in run(*(v.array for v in ins))]

    started = [_Value(IN_LOOP) for _ in flat]
    # One axis B * T: gradients of products over two axes transpose their operands on CPU.
    given = [*started, *(_Value(PER_STEP, x.reshape(-1, *x.shape[2:])) for x in leaves)]
    results = interpret(program, given, lambda array: _Value(CONSTANT, array), apply, _INLINED)
    loop = _needed(loop, results)
    used = dict.fromkeys(v for operation in loop for v in operation.ins if v.kind == PER_STEP)
    used |= dict.fromkeys(v for v in results if v.kind == PER_STEP)

    def body(carried: Sequence[Any], timed: Sequence[Any]) -> Any:
        found = dict(zip((*started, *used), (*carried, *timed), strict=True))

        def read(value: _Value) -> Any:
            return value.array if value.kind == CONSTANT else found[value]

        for run, ins, outs in loop:
            found |= zip(outs, run(*map(read, ins)), strict=True)
        done = list(map(read, results))
        return done[: len(flat)], done[len(flat) :]

    timed = [jnp.moveaxis(v.array.reshape(batch, length, *v.array.shape[1:]), 1, 0) for v in used]
    # `lax.scan` takes a symbolic T from arrays only.
    steps = None if timed else length
    final, ys = lax.scan(jax.vmap(body), flat, timed, length=steps, reverse=reverse)
    ys = jax.tree.unflatten(jax.tree.structure(shapes[1]), [jnp.moveaxis(y, 0, 1) for y in ys])
    return jax.tree.unflatten(tree, final), ys


def _plain_scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    *,
    reverse: bool,
) -> tuple[PyTree, PyTree]:
    """Compute the same in one loop, which keeps the effects of a step and their order."""
    timed = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs)
    final, ys = lax.scan(jax.vmap(step), carry, timed, reverse=reverse)
    return final, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), ys)


class _Operation(NamedTuple):
    """An operation of the loop: a function, its inputs and its outputs."""

    run: Callable[..., Sequence[Any]]
    ins: list[_Value]
    outs: list[_Value]


def _in_loop(eqn: Any, ins: list[_Value]) -> _Operation:
    """Return an equation as an operation of the loop.

    On CPU a product with a matrix whose minor axis is contracted takes twice the time. If the
    matrix is constant, transpose it once, outside of the loop.
    """
    params, outs = eqn.params, [_Value(IN_LOOP) for _ in eqn.outvars]
    if eqn.primitive.name == "dot_general" and ins[1].kind == CONSTANT:
        ((left, right), batch), matrix = params["dimension_numbers"], ins[1].array
        if matrix.ndim == 2 and tuple(right) == (1,) and not batch[1]:
            params = params | {"dimension_numbers": ((left, (0,)), batch)}
            ins = [ins[0], _Value(CONSTANT, matrix.T)]
    return _Operation(_bind(eqn, params), ins, outs)


def _size(eqn: Any) -> int:
    """Return the elements of the largest value of an operation, including those inside of it."""
    inner = (_size(e) for program in jaxprs_in_params(eqn.params) for e in program.eqns)
    return max((*(math.prod(v.aval.shape) for v in eqn.outvars), *inner), default=0)


def _bind(eqn: Any, params: Any) -> Callable[..., Sequence[Any]]:
    """Return the operation of an equation as a function of its inputs."""

    def run(*arrays: Any) -> Sequence[Any]:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(params))
        return out if eqn.primitive.multiple_results else [out]

    return run


def _needed(loop: list[_Operation], results: Sequence[_Value]) -> list[_Operation]:
    """Return the operations that the results depend on."""
    wanted, kept = set(results), []
    for operation in reversed(loop):
        if wanted.intersection(operation.outs):
            wanted |= set(operation.ins)
            kept.append(operation)
    return kept[::-1]


def state_parts(shape: Sequence[int]) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """Return functions (split, join) for states [..., D] or [..., D, k] of this shape [D (, k)].

    `split` returns the k coupled numbers separately, if they are few. On CPU, XLA vectorizes a
    step over D if each of its arrays is [D].
    """
    if len(shape) == 1 or shape[-1] > FEW:
        return lambda h: [h], lambda parts: parts[0]
    return (
        lambda h: [h[..., i] for i in range(shape[-1])],
        lambda parts: jnp.stack(parts, axis=-1),
    )
