"""Functions with a reverse rule of their own that keep forward mode and higher derivatives.

`jax.custom_vjp` gives up forward mode. Here the tangent of a function is a primitive: evaluated,
it is the function's own `jvp`; transposed, it is the given adjoint; differentiated once more, it
is again plain JAX. So only the first reverse pass is replaced, and everything else is JAX's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import jax_compat
from seqjax.types import PyTree

Flat = Callable[..., Sequence[jax.Array]]


def inexact(leaves: Sequence[jax.Array]) -> list[int]:
    """Where the leaves are that can be differentiated."""
    return [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]


def put(
    leaves: Sequence[jax.Array], which: Sequence[int], values: Sequence[jax.Array]
) -> list[jax.Array]:
    """The leaves, with other values in these places."""
    filled = list(leaves)
    for i, value in zip(which, values, strict=True):
        filled[i] = value
    return filled


def reverse_rule(
    function: Callable[..., PyTree],
    adjoint: Callable[..., Sequence[jax.Array]],
    keeping: Callable[..., tuple[PyTree, PyTree]] | None = None,
    smooth: Callable[..., PyTree] | None = None,
) -> Callable[..., PyTree]:
    """`function(*args)`, whose reverse pass is `adjoint(args, cotangents)`.

    Args:
      function: of pytrees of arrays; returns a pytree of floating-point arrays. It must not close
        over arrays that are differentiated.
      adjoint: returns the cotangents of the floating-point leaves of `args`, in a list in their
        order.
      keeping: *args -> (the outputs, a tree of arrays that the adjoint wants kept): evaluated in
        place of `function` where it is differentiated. The adjoint then is
        `adjoint(args, outputs, kept, cotangents)`.
      smooth: what the tangents are those of, where JAX can differentiate it more cheaply than
        `function`, which it must equal.
    """

    @jax.custom_jvp
    def run(*args: PyTree) -> PyTree:
        return function(*args)

    @run.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:
        leaves, tree = jax.tree.flatten(primals)
        moving = [jax.tree.leaves(tangents)[i] for i in inexact(leaves)]
        value, kept = (run(*primals), ()) if keeping is None else keeping(*primals)
        out, out_tree = jax.tree.flatten(value)
        held, held_tree = jax.tree.flatten(() if keeping is None else (value, kept))

        def flat(*leaves: jax.Array) -> Sequence[jax.Array]:
            return jax.tree.leaves((smooth or function)(*jax.tree.unflatten(tree, leaves)))

        def flat_adjoint(leaves: Any, held: Any, cts: Any) -> Any:
            args, kept = jax.tree.unflatten(tree, leaves), jax.tree.unflatten(held_tree, held)
            return adjoint(args, *kept, jax.tree.unflatten(out_tree, cts))

        changes = tangent_p.bind(
            *jax_compat.match_varying(*leaves, *held, *moving),
            function=flat,
            adjoint=flat_adjoint,
            primals=len(leaves),
            held=len(held),
            avals=tuple(jax.typeof(y) for y in out),
        )
        return jax.tree.unflatten(out_tree, out), jax.tree.unflatten(out_tree, changes)

    return run


def _push(
    *operands: jax.Array, function: Flat, primals: int, held: int, **_: Any
) -> Sequence[jax.Array]:
    """The tangent as JAX computes it, from the primals and the tangents of the inexact ones."""
    leaves, tangents = list(operands[:primals]), operands[primals + held :]
    moving = inexact(leaves)

    def of_moving(*values: jax.Array) -> Sequence[jax.Array]:
        return function(*put(leaves, moving, values))

    return jax.jvp(of_moving, tuple(leaves[i] for i in moving), tangents)[1]


def _implementation(
    target: jax_compat.Target, *operands: jax.Array, **params: Any
) -> Sequence[jax.Array]:
    del target
    return _push(*operands, **params)


def _abstract(*_: Any, avals: tuple[Any, ...], **__: Any) -> Sequence[Any]:
    return list(avals)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    moving = [i for i, t in enumerate(tangents) if type(t) is not jax_compat.Zero]

    def of_moving(*values: jax.Array) -> Sequence[jax.Array]:
        return _push(*put(primals, moving, values), **params)

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])


def _transpose(
    cotangents: Any, *operands: Any, adjoint: Any, primals: int, held: int, avals: Any, **_: Any
) -> Any:
    cts = [
        jnp.zeros(aval.shape, aval.dtype) if type(ct) is jax_compat.Zero else ct
        for ct, aval in zip(cotangents, avals, strict=True)
    ]
    leaves, kept = operands[:primals], operands[primals : primals + held]
    *cts, _unused = jax_compat.match_varying(*cts, leaves[0])
    given = adjoint(leaves, kept, cts)
    tangents = operands[primals + held :]
    wanted = [
        ct if jax_compat.ad.is_undefined_primal(t) else None
        for ct, t in zip(given, tangents, strict=True)
    ]
    return [None] * (primals + held) + wanted


def _batch(args: Any, dims: Any, *, function: Any, adjoint: Any, avals: Any, **params: Any) -> Any:
    """vmap: of the function and of its adjoint."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    mapped = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    ]
    out = tangent_p.bind(
        *mapped,
        function=jax.vmap(function),
        adjoint=jax.vmap(adjoint),
        avals=tuple(jax_compat.aval_like(aval, (size, *aval.shape), aval.dtype) for aval in avals),
        **params,
    )
    return out, [0] * len(out)


tangent_p = jax_compat.make_primitive("seqjax_tangent", _implementation, _abstract)
jax_compat.ad.primitive_jvps[tangent_p] = _jvp
jax_compat.ad.primitive_transposes[tangent_p] = _transpose
jax_compat.batching.primitive_batchers[tangent_p] = _batch
