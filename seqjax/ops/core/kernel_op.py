"""Ops that a kernel runs where there is one, with every derivative they have without it.

Which platform a program is compiled for is known when it is lowered, after it was differentiated
and mapped. So both ways of computing travel together, as parameters of a primitive, to the
lowering. Reverse mode is the kernel's own; forward mode and higher derivatives are those of the
XLA form, whoever computes the values.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import jax_compat
from seqjax.ops.core.backends import Use
from seqjax.ops.core.custom_adjoint import inexact, put, reverse_rule
from seqjax.types import PyTree

Function = Callable[..., PyTree]
Flat = Callable[..., Sequence[jax.Array]]


def _shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes alone, without the mesh axes that arrays vary over."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class _Layout:
    """How the residuals of JAX's own rule are put together, known once they are traced.

    Attributes:
      tree: theirs.
      known: which argument or output each of them is, None for one that is kept.
    """

    tree: Any
    known: list[int | None]


@dataclasses.dataclass
class _Kept:
    by_kernel: PyTree
    by_jax: list[jax.Array]
    layout: _Layout = dataclasses.field(metadata={"static": True})


jax.tree_util.register_dataclass(_Kept)


def kernel_call(use: Use, xla: Function, kernel: Function, smooth: Function | None = None) -> Any:
    """A function of pytrees of arrays that `kernel` computes where `use` says so, else `xla`.

    Both return the same tree of floating-point arrays; `kernel` takes the platform's module of
    `pallas_kernels` first. Its derivatives are JAX's, of `smooth`, which is `xla` unless given.
    """
    if use.never:
        return xla

    def run(*args: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(args)
        leaves = list(jax_compat.match_varying(*leaves))
        shapes, out_tree = jax.tree.flatten(jax.eval_shape(xla, *_shapes(args)))

        def flat(function: Function) -> Flat:
            return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

        like = jax.typeof(leaves[0])
        effects: frozenset[Any] = frozenset()
        if use.interpret and not use.by_tpu:  # what interprets a GPU calls back, in order
            interpreted = flat(functools.partial(kernel, use.kernels(None)))
            effects = frozenset(jax.make_jaxpr(interpreted)(*leaves).effects)
        out = kernel_p.bind(
            *leaves,
            use=use,
            xla=flat(xla),
            kernel=lambda kernels: flat(functools.partial(kernel, kernels)),
            smooth=flat(smooth or xla),
            avals=tuple(jax_compat.aval_like(like, s.shape, s.dtype) for s in shapes),
            side_effects=effects,
        )
        return jax.tree.unflatten(out_tree, out)

    return run


def kernel_op(
    use: Use,
    xla: Function,
    forward: Callable[..., tuple[PyTree, PyTree]],
    backward: Callable[..., Sequence[jax.Array]],
    saved: Callable[..., PyTree],
) -> Function:
    """An op that is `xla(*args)`, and runs as kernels, forward and backward, where `use` says so.

    Args:
      use: where the kernels run.
      xla: of pytrees of arrays (None is a leafless tree); returns a tree of floating-point arrays.
        It must not close over arrays that are differentiated.
      forward: (kernels, *args, save) -> (the same outputs, what the backward kernel wants kept),
        `kernels` being the platform's module of `pallas_kernels`. With `save` false the second is
        ().
      backward: (kernels, args, outputs, kept, cotangents) -> the cotangents of the floating-point
        leaves of `args`, in a list in their order.
      saved: *args -> the shapes and dtypes of what `forward` keeps, as a tree of
        `jax.ShapeDtypeStruct`.
    """
    if use.never:
        return xla

    def zeros(shapes: PyTree) -> PyTree:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def pulled(args: tuple[PyTree, ...]) -> tuple[PyTree, Any]:
        """The outputs, and the map from their cotangents to those of the inexact leaves."""
        leaves, tree = jax.tree.flatten(args)
        moving = inexact(leaves)

        def of_moving(*values: jax.Array) -> PyTree:
            return xla(*jax.tree.unflatten(tree, put(leaves, moving, values)))

        return jax.vjp(of_moving, *(leaves[i] for i in moving))

    def keeping(*args: PyTree) -> tuple[PyTree, _Kept]:
        """The outputs, and what the kernel and what JAX's own rule keep for the backward pass.

        What the one that does not run would have kept is zeros that nobody reads: the compiler
        drops them. Derivatives treat what is kept as if it were computed again.
        """
        layout = _Layout()

        @jax.jit  # traced once, for its shapes and to be compiled
        def xla_keeping(*args: PyTree) -> tuple[PyTree, list[jax.Array]]:
            out, pull = pulled(args)
            kept, layout.tree = jax.tree.flatten(pull)
            known = jax.tree.leaves((args, out))  # what is at hand anyway is not kept twice
            layout.known = [next((i for i, x in enumerate(known) if x is k), None) for k in kept]
            return out, [k for k, i in zip(kept, layout.known, strict=True) if i is None]

        by_jax = [] if use.always else jax.eval_shape(xla_keeping, *_shapes(args))[1]

        def by_xla(*args: PyTree) -> PyTree:
            out, kept = (xla(*args), []) if use.always else xla_keeping(*args)
            return out, (zeros(saved(*args)), kept)

        def by_kernel(kernels: Any, *args: PyTree) -> PyTree:
            out, kept = forward(kernels, *args, save=True)
            return out, (kept, zeros(by_jax))

        def smooth(*args: PyTree) -> PyTree:
            return xla(*args), (zeros(saved(*args)), zeros(by_jax))

        out, kept = kernel_call(use, by_xla, by_kernel, smooth)(*args)
        return out, _Kept(kept[0], kept[1], layout)

    def xla_backward(args: Any, out: Any, kept: _Kept, cts: PyTree) -> list[jax.Array]:
        known, rest = jax.tree.leaves((args, out)), iter(kept.by_jax)
        leaves = [next(rest) if i is None else known[i] for i in kept.layout.known]
        return list(jax.tree.unflatten(kept.layout.tree, leaves)(cts))

    def xla_again(args: Any, out: Any, kept: _Kept, cts: PyTree) -> list[jax.Array]:
        return list(pulled(args)[1](cts))

    def kernel_only(kernels: Any, *args: PyTree) -> PyTree:
        return forward(kernels, *args, save=False)[0]

    def kernel_backward(
        kernels: Any, args: Any, out: Any, kept: _Kept, cts: PyTree
    ) -> list[jax.Array]:
        return list(backward(kernels, args, out, kept.by_kernel, cts))

    return reverse_rule(
        kernel_call(use, xla, kernel_only),
        kernel_call(use, xla_again if use.always else xla_backward, kernel_backward, xla_again),
        keeping,
        xla,  # not to run the kernel for tangents that are none of its
    )


def _implementation(
    target: jax_compat.Target,
    *operands: jax.Array,
    use: Use,
    xla: Flat,
    kernel: Callable[[Any], Flat],
    **_: Any,
) -> Sequence[jax.Array]:
    return kernel(use.kernels(target))(*operands) if use.on(target, *operands) else xla(*operands)


def _abstract(*_: Any, avals: tuple[Any, ...], **__: Any) -> Sequence[Any]:
    return list(avals)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    out = kernel_p.bind(*primals, **params)
    moving = [i for i, t in enumerate(tangents) if type(t) is not jax_compat.Zero]

    def of_moving(*values: jax.Array) -> Sequence[jax.Array]:
        return params["smooth"](*put(primals, moving, values))

    changes = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])[1]
    *changes, _unused = jax_compat.match_varying(*changes, out[0])
    return out, [
        t if jnp.issubdtype(y.dtype, jnp.inexact) else jax_compat.Zero.from_primal_value(y)
        for y, t in zip(out, changes, strict=True)
    ]


def _batch(args: Any, dims: Any, *, avals: Any, **params: Any) -> Any:
    """vmap: of all functions."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    mapped = functools.partial(jax.vmap, in_axes=tuple(dims))
    kernel = params["kernel"]
    params |= {name: mapped(params[name]) for name in ("xla", "smooth")}
    params["kernel"] = lambda kernels: mapped(kernel(kernels))
    avals = tuple(jax_compat.aval_like(aval, (size, *aval.shape), aval.dtype) for aval in avals)
    out = kernel_p.bind(*args, avals=avals, **params)
    return out, [0] * len(out)


kernel_p = jax_compat.make_primitive("seqjax_kernel", _implementation, _abstract, local=True)
jax_compat.ad.primitive_jvps[kernel_p] = _jvp
jax_compat.batching.primitive_batchers[kernel_p] = _batch
