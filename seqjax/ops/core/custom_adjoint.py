"""Functions with a custom reverse rule that keep forward mode and higher derivatives.

`jax.custom_vjp` does not support forward mode. Here a primitive computes the tangent of a function.
Its evaluation is the function's `jvp`, its transpose is the custom adjoint, and its derivative is
plain JAX. So only the first reverse pass is replaced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import jax_compat
from seqjax.types import PyTree

Flat = Callable[..., Sequence[jax.Array]]


def inexact(leaves: Sequence[jax.Array]) -> list[int]:
    """Return the positions of the leaves that can be differentiated."""
    return [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]


def put(
    leaves: Sequence[jax.Array], which: Sequence[int], values: Sequence[jax.Array]
) -> list[jax.Array]:
    """Return the leaves with other values at these positions."""
    filled = list(leaves)
    for i, value in zip(which, values, strict=True):
        filled[i] = value
    return filled


def with_precision(*functions: Callable[..., Any]) -> Sequence[Callable[..., Any]]:
    """Return functions that compute with the default precision of products at this moment.

    Lowering calls them, after a `with jax.default_matmul_precision(...)` block around the op.
    Outside of such a block they are returned as they are.
    """
    precision = jax.default_matmul_precision.value
    if precision is None:
        return functions

    def at_precision(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            with jax.default_matmul_precision(precision):
                return function(*args, **keywords)

        return run

    return list(map(at_precision, functions))


def custom_adjoint(
    function: Callable[..., PyTree],
    adjoint: Callable[..., Sequence[jax.Array]],
    *,
    with_residuals: Callable[..., tuple[PyTree, PyTree]] | None = None,
    tangent_of: Callable[..., PyTree] | None = None,
) -> Callable[..., PyTree]:
    """Return `function` with `adjoint` as its reverse pass.

    Forward mode, `vmap` and higher derivatives stay those of `function`, unlike with
    `jax.custom_vjp`.

    Args:
      function: takes pytrees of arrays and returns a pytree of floating-point arrays. It must not
        close over arrays that are differentiated.
      adjoint: `adjoint(args, cotangents)` returns the cotangents of the floating-point leaves of
        `args`, in a list in their order.
      with_residuals: `with_residuals(*args)` returns the outputs and a pytree of arrays to save for
        the adjoint. It runs in place of `function` when the call is differentiated. The adjoint is
        then called as `adjoint(args, outputs, residuals, cotangents)`.
      tangent_of: a function equal to `function` that JAX differentiates at lower cost. Tangents and
        higher derivatives come from it.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> def softplus_adjoint(args, cotangents):
      ...     return [cotangents * jax.nn.sigmoid(args[0])]
      >>> softplus = seqjax.ops.custom_adjoint(lambda x: jnp.logaddexp(x, 0.0), softplus_adjoint)
      >>> float(jax.grad(softplus)(0.0)), float(jax.jvp(softplus, (0.0,), (1.0,))[1])
      (0.5, 0.5)
    """

    run = jax.custom_jvp(function)

    @run.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, primals))
        moving = [jax.tree.leaves(tangents)[i] for i in inexact(leaves)]
        extra: tuple[PyTree, ...] = ()
        if with_residuals is None:
            value = run(*primals)
        else:
            value, residuals = with_residuals(*primals)
            extra = (value, residuals)
        out, out_tree = jax.tree.flatten(value)
        saved, saved_tree = jax.tree.flatten(extra)

        def flat(*leaves: jax.Array) -> Sequence[jax.Array]:
            return jax.tree.leaves((tangent_of or function)(*jax.tree.unflatten(tree, leaves)))

        def flat_adjoint(leaves: Any, saved: Any, cts: Any) -> Any:
            args, extra = jax.tree.unflatten(tree, leaves), jax.tree.unflatten(saved_tree, saved)
            return adjoint(args, *extra, jax.tree.unflatten(out_tree, cts))

        at_lowering, adjoint_at_lowering = with_precision(flat, flat_adjoint)
        changes = tangent_p.bind(
            *jax_compat.match_varying(*leaves, *saved, *moving),
            function=at_lowering,
            adjoint=adjoint_at_lowering,
            primals=len(leaves),
            saved=len(saved),
            avals=tuple(jax.typeof(y) for y in out),
        )
        return jax.tree.unflatten(out_tree, out), jax.tree.unflatten(out_tree, changes)

    return run


def unless_differentiated(
    forward: Callable[..., PyTree], differentiated: Callable[..., PyTree]
) -> Callable[..., PyTree]:
    """Return `forward`, with `differentiated` in its place where JAX takes derivatives.

    An algorithm that saves memory in the backward pass may be slower in a forward pass alone, which
    prefill and evaluation consist of.

    Args:
      forward: takes pytrees of arrays and returns a pytree of arrays. It must not close over arrays
        that are differentiated.
      differentiated: a function with the same results up to rounding.
    """
    run = jax.custom_jvp(forward)
    run.defjvp(lambda primals, tangents: jax.jvp(differentiated, primals, tangents))
    return run


def _push(
    *operands: jax.Array, function: Flat, primals: int, saved: int, **_: Any
) -> Sequence[jax.Array]:
    """Return JAX's tangents from the primals and the tangents of the inexact primals."""
    leaves, tangents = list(operands[:primals]), operands[primals + saved :]
    moving = inexact(leaves)

    def of_moving(*values: jax.Array) -> Sequence[jax.Array]:
        return function(*put(leaves, moving, values))

    return jax.jvp(of_moving, tuple(leaves[i] for i in moving), tangents)[1]


def _implementation(
    target: jax_compat.Target, *operands: jax.Array, **params: Any
) -> Sequence[jax.Array]:
    del target
    return _push(*operands, **params)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    moving = [i for i, t in enumerate(tangents) if type(t) is not jax_compat.Zero]

    def of_moving(*values: jax.Array) -> Sequence[jax.Array]:
        return _push(*put(primals, moving, values), **params)

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])


def _transpose(
    cotangents: Any, *operands: Any, adjoint: Any, primals: int, saved: int, avals: Any, **_: Any
) -> Any:
    cts = [
        jnp.zeros(aval.shape, aval.dtype) if type(ct) is jax_compat.Zero else ct
        for ct, aval in zip(cotangents, avals, strict=True)
    ]
    leaves, residuals = operands[:primals], operands[primals : primals + saved]
    *cts, _unused = jax_compat.match_varying(*cts, leaves[0])
    found = adjoint(leaves, residuals, cts)
    tangents = operands[primals + saved :]
    wanted = [
        ct if jax_compat.ad.is_undefined_primal(t) else None
        for ct, t in zip(found, tangents, strict=True)
    ]
    return [None] * (primals + saved) + wanted


def _batch(args: Any, dims: Any, *, function: Any, adjoint: Any, avals: Any, **params: Any) -> Any:
    """Map the function and its adjoint."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    mapped = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    ]
    out = tangent_p.bind(
        *mapped,
        function=jax.vmap(function),
        adjoint=jax.vmap(adjoint),
        avals=jax_compat.mapped_avals(avals, size),
        **params,
    )
    return out, [0] * len(out)


tangent_p = jax_compat.make_primitive("seqjax_tangent", _implementation)
jax_compat.ad.primitive_jvps[tangent_p] = _jvp
jax_compat.ad.primitive_transposes[tangent_p] = _transpose
jax_compat.batching.primitive_batchers[tangent_p] = _batch
