"""Ops that a Pallas kernel runs where it is available, with all derivatives of the XLA form.

The platform of a program is known when the program is lowered, after it was differentiated and
mapped. So both backends travel to the lowering as parameters of a primitive, `kernel_call`.

`kernel_op` adds a backward kernel as a custom adjoint. Forward mode and higher derivatives come
from the XLA form on every backend.

The residuals of both backends travel together. The backend that does not run contributes zeros,
which the compiler removes. The alternative is to recompute XLA's residuals in the backward pass. On
two CPU cores, at [4, 1024, 4, 64], value and gradient were then slower: 1.35 times for
`delta_rule`, 1.02 times for `linear_attention`, and 1.16 times for `selective_scan`, at equal
temporary memory. Compiled for TPU v5e, a scan over four `delta_rule` layers has the same operations
and memory either way.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import jax_compat
from seqjax.ops.core.backends import KERNEL_ONLY, Backend, Mode, runs_kernel
from seqjax.ops.core.custom_adjoint import custom_adjoint, inexact, put, with_precision
from seqjax.ops.core.residual_names import OUTPUTS, RESIDUALS, named
from seqjax.types import PyTree

Function = Callable[..., PyTree]
Flat = Callable[..., Sequence[jax.Array]]


def _shapes(tree: PyTree) -> PyTree:
    """Return shapes and dtypes alone, without the mesh axes that arrays vary over."""
    return jax.tree.map(_shape, tree)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    # The weak type is kept, so that lowering finds the trace of these shapes in the cache.
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type)


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


class _Layout:
    """The layout of the residuals of JAX's own rule, known once the rule is traced.

    Attributes:
      tree: the tree of the residuals.
      known: for each residual, the index of the argument or output that equals it, or None.
    """

    tree: Any
    known: list[int | None]


@dataclasses.dataclass
class _Residuals:
    of_kernel: PyTree
    of_xla: list[jax.Array]
    layout: _Layout = dataclasses.field(metadata={"static": True})


jax.tree_util.register_dataclass(_Residuals)


def kernel_call(
    backend: Backend,
    xla: Function,
    kernel: Function,
    *,
    tangent_of: Function | None = None,
    out_shapes: Callable[..., PyTree] | None = None,
) -> Function:
    """Return a function of pytrees of arrays that `kernel` or `xla` computes.

    `runs_kernel` decides at lowering. Derivatives are those that JAX takes of `tangent_of`.

    Args:
      backend: the backend of the call.
      xla: a function of pytrees of arrays that returns a pytree of floating-point arrays.
      kernel: (kernels, *args) -> the same outputs. `kernels` is the module of `pallas_kernels` for
        the platform.
      tangent_of: `xla` by default.
      out_shapes: *args -> the shapes and dtypes of the outputs. By default `xla` is traced for
        them.
    """
    if backend.mode is Mode.OFF:
        return xla
    tangent_of = tangent_of or xla
    # `with_precision` tests this too. Here it saves a call where no precision is set.
    if jax.default_matmul_precision.value is not None:
        xla, kernel, tangent_of = with_precision(xla, kernel, tangent_of)

    def run(*args: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(args)
        leaves = list(jax_compat.match_varying(*leaves))
        wanted = out_shapes(*args) if out_shapes else jax.eval_shape(xla, *_shapes(args))
        shapes, out_tree = jax.tree.flatten(wanted)

        def flat(function: Function) -> Flat:
            return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

        effects: frozenset[Any] = frozenset()
        # The interpreter of GPU kernels calls back to the host.
        if backend.mode is Mode.INTERPRET and backend.interpreted != "tpu":
            interpreted = flat(functools.partial(kernel, backend.kernels()))
            effects = frozenset(jax.make_jaxpr(interpreted)(*leaves).effects)
        out = kernel_p.bind(
            *leaves,
            backend=backend,
            xla=flat(xla),
            kernel=lambda kernels: flat(functools.partial(kernel, kernels)),
            tangent_of=flat(tangent_of),
            avals=jax_compat.avals_like(leaves[0], shapes),
            side_effects=effects,
        )
        return jax.tree.unflatten(out_tree, out)

    return run


def kernel_op(
    backend: Backend,
    xla: Function,
    forward: Callable[..., tuple[PyTree, PyTree]],
    backward: Callable[..., Sequence[jax.Array]],
    shapes: Callable[..., tuple[PyTree, PyTree]],
) -> Function:
    """Return the op `xla(*args)` with kernels for its forward and its backward pass.

    Args:
      backend: the backend of the call.
      xla: a function of pytrees of arrays that returns a pytree of floating-point arrays. It must
        not close over arrays that are differentiated. Arguments may be `None`.
      forward: (kernels, *args, save) -> (the same outputs, the residuals of the backward kernel).
        `kernels` is the module of `pallas_kernels` for the platform. With `save` false the
        residuals are ().
      backward: (kernels, args, outputs, residuals, cotangents) -> the cotangents of the
        floating-point leaves of `args`, in a list in their order.
      shapes: *args -> the shapes and dtypes of the outputs and of the residuals of `forward`, two
        pytrees of `jax.ShapeDtypeStruct`.
    """
    if backend.mode is Mode.OFF:
        return lambda *args: named(xla(*args), OUTPUTS)
    kernel_only = backend.mode in KERNEL_ONLY
    if jax.default_matmul_precision.value is not None:
        xla, forward, backward = with_precision(xla, forward, backward)

    def pulled(args: tuple[PyTree, ...]) -> tuple[PyTree, Any]:
        """Return the outputs, and the map from their cotangents to those of the inexact leaves."""
        leaves, tree = jax.tree.flatten(args)
        moving = inexact(leaves)

        def of_moving(*values: jax.Array) -> PyTree:
            return xla(*jax.tree.unflatten(tree, put(leaves, moving, values)))

        return jax.vjp(of_moving, *(leaves[i] for i in moving))

    def with_residuals(*args: PyTree) -> tuple[PyTree, _Residuals]:
        """Return the outputs and the residuals of both backends.

        Derivatives treat residuals as if they were computed again.
        """
        layout = _Layout()

        @jax.jit  # traced once, for its shapes and to be compiled
        def xla_with_residuals(*args: PyTree) -> tuple[PyTree, list[jax.Array]]:
            out, pull = pulled(args)
            residuals, layout.tree = jax.tree.flatten(pull)
            known = jax.tree.leaves((args, out))  # not saved twice
            layout.known = [
                next((i for i, x in enumerate(known) if x is r), None) for r in residuals
            ]
            pairs = zip(residuals, layout.known, strict=True)
            return out, [r for r, i in pairs if i is None]

        out_shapes, of_kernel = shapes(*args)
        of_xla = []
        if not kernel_only:
            of_xla = jax.eval_shape(xla_with_residuals, *_shapes(args))[1]

        def by_xla(*args: PyTree) -> PyTree:
            out, residuals = (xla(*args), []) if kernel_only else xla_with_residuals(*args)
            return out, (_zeros(of_kernel), residuals)

        def by_kernel(kernels: Any, *args: PyTree) -> PyTree:
            out, residuals = forward(kernels, *args, save=True)
            return out, (residuals, _zeros(of_xla))

        def tangent_of(*args: PyTree) -> PyTree:
            return xla(*args), (_zeros(of_kernel), _zeros(of_xla))

        run = kernel_call(
            backend,
            by_xla,
            by_kernel,
            tangent_of=tangent_of,
            out_shapes=lambda *_: (out_shapes, (of_kernel, of_xla)),
        )
        out, residuals = run(*args)
        kernel_residuals, xla_residuals = named(residuals, RESIDUALS)
        return out, _Residuals(kernel_residuals, xla_residuals, layout)

    def adjoint(args: Any, out: Any, residuals: _Residuals, cts: PyTree) -> list[jax.Array]:
        run = kernel_call(
            backend,
            xla_again if kernel_only else xla_backward,
            kernel_backward,
            tangent_of=xla_again,
            out_shapes=lambda args, *_: _shapes(inexact_leaves(args)),
        )
        return run(args, out, residuals, cts)

    def xla_backward(args: Any, out: Any, residuals: _Residuals, cts: PyTree) -> list[jax.Array]:
        known, rest = jax.tree.leaves((args, out)), iter(residuals.of_xla)
        leaves = [next(rest) if i is None else known[i] for i in residuals.layout.known]
        return list(jax.tree.unflatten(residuals.layout.tree, leaves)(cts))

    def xla_again(args: Any, out: Any, residuals: _Residuals, cts: PyTree) -> list[jax.Array]:
        return list(pulled(args)[1](cts))

    def kernel_forward(kernels: Any, *args: PyTree) -> PyTree:
        return forward(kernels, *args, save=False)[0]

    def kernel_backward(
        kernels: Any, args: Any, out: Any, residuals: _Residuals, cts: PyTree
    ) -> list[jax.Array]:
        return list(backward(kernels, args, out, residuals.of_kernel, cts))

    # Tangents come from the XLA form, so the kernel does not run for them.
    op = custom_adjoint(
        kernel_call(backend, xla, kernel_forward, out_shapes=lambda *args: shapes(*args)[0]),
        adjoint,
        with_residuals=with_residuals,
        tangent_of=xla,
    )
    return lambda *args: named(op(*args), OUTPUTS)


def inexact_leaves(tree: PyTree) -> list[jax.Array]:
    """Return the leaves that can be differentiated."""
    leaves = jax.tree.leaves(tree)
    return [leaves[i] for i in inexact(leaves)]


def _implementation(
    target: jax_compat.Target,
    *operands: jax.Array,
    backend: Backend,
    xla: Flat,
    kernel: Callable[[Any], Flat],
    **_: Any,
) -> Sequence[jax.Array]:
    if runs_kernel(backend, target, *operands):
        return kernel(backend.kernels(target))(*operands)
    return xla(*operands)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    out = kernel_p.bind(*primals, **params)
    moving = [i for i, t in enumerate(tangents) if type(t) is not jax_compat.Zero]

    def of_moving(*values: jax.Array) -> Sequence[jax.Array]:
        return params["tangent_of"](*put(primals, moving, values))

    changes = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])[1]
    *changes, _unused = jax_compat.match_varying(*changes, out[0])
    return out, [
        t if jnp.issubdtype(y.dtype, jnp.inexact) else jax_compat.Zero.from_primal_value(y)
        for y, t in zip(out, changes, strict=True)
    ]


def _batch(args: Any, dims: Any, *, avals: Any, **params: Any) -> Any:
    """Map all functions."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    mapped = functools.partial(jax.vmap, in_axes=tuple(dims))
    kernel = params["kernel"]
    params |= {name: mapped(params[name]) for name in ("xla", "tangent_of")}
    params["kernel"] = lambda kernels: mapped(kernel(kernels))
    avals = jax_compat.mapped_avals(avals, size)
    out = kernel_p.bind(*args, avals=avals, **params)
    return out, [0] * len(out)


kernel_p = jax_compat.make_primitive("seqjax_kernel", _implementation, local=True)
jax_compat.ad.primitive_jvps[kernel_p] = _jvp
jax_compat.batching.primitive_batchers[kernel_p] = _batch
