"""Scan over time that computes all that does not depend on the carry outside of the loop.

A step of a cell is small. On CPU, each of its operations costs about as much to start as to run,
and slicing the gates of a step keeps XLA from vectorizing the rest. The program of a step is
therefore split in three. Values of parameters alone are computed once, values of the inputs for all
steps at once, and only the others in the loop. Values that are much larger than the inputs and the
state of a step stay in the loop too, because those of all steps would need too much memory.

On CPU the loop slices [B, T, ...] arrays and writes its outputs in place. With the time-first
arrays of `lax.scan`, transposes took up to half the time of a gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxprs_in_params

from pallas_kernels.jaxpr_interpreter import bind, interpret, primitive_names
from seqjax.ops.core import backends, jax_compat
from seqjax.ops.core.custom_adjoint import unless_differentiated
from seqjax.ops.nonlinear.state_columns import FEW, INLINED
from seqjax.types import PyTree

CONSTANT, PER_STEP, IN_LOOP = range(3)
# Largest size of a value that is computed for all steps, relative to a step's inputs and carry.
LARGEST = 2
# Operations that cost less in the loop than reading their results from memory.
_CHEAP = primitive_names("add sub mul neg integer_pow square")
_VIEWS = primitive_names("slice squeeze")
# Largest number of cheap operations that replace the reading of one result. It also bounds the
# work of a trace: the operations of a slice are those of its terms.
MOST_CHEAP = 8


class _Block(NamedTuple):
    """A contiguous block of an array, which the loop reads without a copy for all steps."""

    array: jax.Array
    start: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value of a step: CONSTANT, PER_STEP with leading axis B * T, or IN_LOOP without array.

    A PER_STEP value may be a block of a larger one, or the result of `cost` cheap operations.
    """

    kind: int
    array: Any = None
    block: _Block | None = None
    cost: int = 0


class _Operation(NamedTuple):
    """An operation of the loop: a function, its inputs and its outputs."""

    run: Callable[..., Sequence[Any]]
    ins: list[_Value]
    outs: list[_Value]


class _Read(NamedTuple):
    """A block of a row of the array number `source`, and its shape without axes of size 1."""

    source: int
    start: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]


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
    hoisted = _Hoisted()

    def apply(eqn: Any, ins: list[_Value]) -> list[_Value]:
        kind = max((v.kind for v in ins), default=CONSTANT)
        if kind == IN_LOOP or (kind == PER_STEP and _size(eqn) > largest):
            operation = _in_loop(eqn, ins)
            loop.append(operation)
            return operation.outs
        return hoisted.apply(eqn, ins)

    started = [_Value(IN_LOOP) for _ in flat]
    # One axis B * T: gradients of products over two axes transpose their operands on CPU.
    given = [*started, *(_Value(PER_STEP, x.reshape(-1, *x.shape[2:])) for x in leaves)]
    results = interpret(program, given, lambda array: _Value(CONSTANT, array), apply, INLINED)
    loop = _needed(loop, results)
    loop, used = _fewer_inputs(loop, results, hoisted.cheap)
    read = [*(v for operation in loop for v in operation.ins), *results]
    fixed = dict.fromkeys(v for v in read if v.kind == CONSTANT and isinstance(v.array, jax.Array))
    body = jax.vmap(_body(loop, results, (*started, *used, *fixed), len(flat)), (0, 0, None))

    blocks = [v.block or _Block(v.array, *_whole(v.array)) for v in used]
    sources = list({id(block.array): block.array for block in blocks}.values())
    index = {id(array): i for i, array in enumerate(sources)}
    reads = [
        _Read(index[id(b.array)], b.start, b.sizes, v.array.shape[1:])
        for b, v in zip(blocks, used, strict=True)
    ]
    timed = [x.reshape(batch, length, *x.shape[1:]) for x in sources]
    options = {"body": body, "reads": reads, "length": length, "reverse": reverse}
    by_scan = functools.partial(_by_scan, **options)

    def forward(*operands: Any) -> tuple[Any, Any]:
        in_place = functools.partial(_in_place, **options)
        return backends.by_platform(lambda run, *ops: run(*ops), in_place, by_scan, *operands)

    operands = flat, timed, [v.array for v in fixed]
    final, ys = unless_differentiated(forward, by_scan)(*operands)
    ys = jax.tree.unflatten(jax.tree.structure(shapes[1]), ys)
    return jax.tree.unflatten(tree, final), ys


class _Hoisted:
    """The operations outside of the loop.

    `cheap` has those that the loop could run instead of reading their results.
    """

    def __init__(self) -> None:
        self.cheap: dict[_Value, _Operation] = {}
        self._views: dict[Any, list[_Value]] = {}

    def apply(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        """Run an operation, once for constants or for all steps."""
        if all(v.kind == CONSTANT for v in ins):
            arrays = bind(eqn, eqn.params)(*(v.array for v in ins))
            return [_Value(CONSTANT, array) for array in arrays]
        if eqn.primitive.name not in _VIEWS:
            return self._for_all_steps(eqn, ins)
        # Equal slices are one value, so that the loop reads it once.
        key = ins[0], eqn.primitive.name, *eqn.params.items()
        if key not in self._views:
            self._views[key] = self._for_all_steps(eqn, ins)
        return self._views[key]

    def _for_all_steps(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        run, name = bind(eqn, eqn.params), eqn.primitive.name
        mapped = jax.vmap(run, [0 if v.kind == PER_STEP else None for v in ins])
        arrays = mapped(*(v.array for v in ins))
        if name in _VIEWS and ins[0] in self.cheap and self._has_equal_shapes(ins[0]):
            # A slice of a sum: the loop reads slices of the terms in place and adds them.
            run, terms, _ = self.cheap[ins[0]]
            terms = [self.apply(eqn, [v])[0] if _shape(v) else v for v in terms]
        elif name in _CHEAP:
            terms = ins
        else:
            return [_Value(PER_STEP, array, _block(eqn, ins)) for array in arrays]
        cost = 1 + sum(v.cost for v in terms)
        [value] = outs = [_Value(PER_STEP, array, cost=cost) for array in arrays]
        if cost <= MOST_CHEAP:
            self.cheap[value] = _Operation(run, terms, outs)
        return outs

    def _has_equal_shapes(self, value: _Value) -> bool:
        """Return whether the indices of a value are those of its terms, except of scalars."""
        return all(_shape(v) in ((), _shape(value)) for v in self.cheap[value].ins)


def _body(
    loop: Sequence[_Operation], results: Sequence[_Value], inputs: Sequence[_Value], carried: int
) -> Callable[..., Any]:
    """Return the loop's step, (carry, values of the step, constants) -> (carry, outputs).

    The step contains no arrays of the trace, because JAX stores the step for derivatives.
    """
    copies: dict[_Value, _Value] = {}

    def copy(values: Sequence[_Value]) -> list[_Value]:
        for v in values:
            kept = None if isinstance(v.array, jax.Array) else v.array
            copies.setdefault(v, _Value(v.kind, kept))
        return [copies[v] for v in values]

    program = [_Operation(run, copy(ins), copy(outs)) for run, ins, outs in loop]
    given, wanted = copy(inputs), copy(results)

    def body(carry: Sequence[Any], timed: Sequence[Any], constants: Sequence[Any]) -> Any:
        found = dict(zip(given, (*carry, *timed, *constants), strict=True))

        def array(value: _Value) -> Any:
            return found.get(value, value.array)

        for run, ins, outs in program:
            found |= zip(outs, run(*map(array, ins)), strict=True)
        done = list(map(array, wanted))
        return done[:carried], done[carried:]

    return body


def _rows(xs: Sequence[Any], reads: Sequence[_Read], t: Any) -> list[jax.Array]:
    """Return the blocks [B, ...] of step t."""

    def row(r: _Read) -> jax.Array:
        x, zero = xs[r.source], jnp.uint32(0)
        start = (zero, jnp.asarray(t, jnp.uint32), *map(jnp.uint32, r.start))
        block = lax.dynamic_slice(x, start, (x.shape[0], 1, *r.sizes))
        return block.reshape(x.shape[0], *r.shape)

    return list(map(row, reads))


def _in_place(
    carry: Sequence[Any],
    xs: Sequence[Any],
    constants: Sequence[Any],
    *,
    body: Callable[..., Any],
    reads: Sequence[_Read],
    length: Any,
    reverse: bool,
) -> tuple[Any, Any]:
    """Run the loop on CPU: slice [B, T, ...] arrays and write the outputs without transposes."""
    shapes = jax.eval_shape(body, carry, _rows(xs, reads, 0), constants)[1]
    # Forward and reverse loops start from different values: XLA merges equal buffers, and then
    # copies the merged buffer for each loop.
    ys = [jnp.full((y.shape[0], length, *y.shape[1:]), int(reverse), y.dtype) for y in shapes]
    leaves, tree = jax.tree.flatten((carry, ys, xs, constants))
    carry, ys, xs, constants = jax.tree.unflatten(tree, jax_compat.match_varying(*leaves))

    def step(i: jax.Array, carried: Any) -> Any:
        # An unsigned index saves a kernel call per step: XLA need not handle negative indices.
        t = (length - 1 - i if reverse else i).astype(jnp.uint32)
        carry, row = body(carried[0], _rows(xs, reads, t), constants)
        pairs = zip(carried[1], row, strict=True)
        return carry, [lax.dynamic_update_index_in_dim(y, new, t, 1) for y, new in pairs]

    return lax.fori_loop(0, length, step, (list(carry), ys))


def _by_scan(
    carry: Sequence[Any],
    xs: Sequence[Any],
    constants: Sequence[Any],
    *,
    body: Callable[..., Any],
    reads: Sequence[_Read],
    length: Any,
    reverse: bool,
) -> tuple[Any, Any]:
    """Run the loop as `lax.scan`, which transposes the arrays and which JAX can differentiate."""
    timed = [_moved(xs[r.source], r) for r in reads]
    # `lax.scan` takes a symbolic T from arrays only.
    final, ys = lax.scan(
        lambda carry, row: body(carry, row, constants),
        carry,
        timed,
        length=None if timed else length,
        reverse=reverse,
    )
    return final, [jnp.moveaxis(y, 0, 1) for y in ys]


def _moved(x: jax.Array, r: _Read) -> jax.Array:
    """Return the blocks of all steps, time first."""
    end = map(sum, zip(r.start, r.sizes, strict=True))
    block = x[:, :, *map(slice, r.start, end)]
    return jnp.moveaxis(block.reshape(*x.shape[:2], *r.shape), 1, 0)


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


def _whole(array: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (0,) * (array.ndim - 1), array.shape[1:]


def _shape(value: _Value) -> tuple[int, ...]:
    """Return the shape of a value of one step."""
    return jnp.shape(value.array)[value.kind == PER_STEP :]


def _block(eqn: Any, ins: list[_Value]) -> _Block | None:
    """Return the result of a slice as a block, if the loop reads whole vectors of it."""
    if eqn.primitive.name == "squeeze":
        return ins[0].block
    if eqn.primitive.name != "slice" or eqn.params["strides"] is not None:
        return None
    size, row = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
    if size[-1] < row[-1] and size[-1] <= FEW:
        return None
    return _Block(ins[0].array, eqn.params["start_indices"], size)


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
    return _Operation(bind(eqn, params), ins, outs)


def _fewer_inputs(
    loop: list[_Operation], results: Sequence[_Value], cheap: dict[_Value, _Operation]
) -> tuple[list[_Operation], list[_Value]]:
    """Move cheap operations into the loop where it then reads no more arrays than before.

    Returns:
      The operations of the loop, and the values of all steps that the loop reads.
    """
    read = [v for operation in loop for v in operation.ins] + list(results)
    used = dict.fromkeys(v for v in read if v.kind == PER_STEP)
    moved: set[_Value] = set()

    def inputs(value: _Value, operations: set[_Value]) -> set[_Value]:
        """Return what the loop has to read for a value, and add operations that compute it."""
        operations.add(value)
        needed: set[_Value] = set()
        for v in (v for v in cheap[value].ins if v.kind == PER_STEP):
            if v in used or v not in cheap:
                needed.add(v)
            elif v not in operations and v not in moved:
                needed |= inputs(v, operations)
        return needed

    for value in [v for v in cheap if v in used][::-1]:
        operations: set[_Value] = set()
        new = inputs(value, operations) - used.keys()
        if len(new) <= 1:
            del used[value]
            used |= dict.fromkeys(new)
            moved |= operations
    return [operation for v, operation in cheap.items() if v in moved] + loop, list(used)


def _size(eqn: Any) -> int:
    """Return the elements of the largest value of an operation, including those inside of it."""
    inner = (_size(e) for program in jaxprs_in_params(eqn.params) for e in program.eqns)
    return max((*(math.prod(v.aval.shape) for v in eqn.outvars), *inner), default=0)


def _needed(loop: list[_Operation], results: Sequence[_Value]) -> list[_Operation]:
    """Return the operations that the results depend on."""
    wanted, kept = set(results), []
    for operation in reversed(loop):
        if wanted.intersection(operation.outs):
            wanted |= set(operation.ins)
            kept.append(operation)
    return kept[::-1]
