"""The elementwise linear recurrence as a primitive, closed under differentiation.

It has two forms, each of which runs over time forwards or backwards:

    pre:   h <- a_t h + x_t;   y_t = h          (post=False)
    post:  y_t = c + x_t;      c <- a_t y_t     (post=True)

Each form is the transpose of the other with time reversed. The cotangent of `pre` obeys

    lambda_t = g_t + a_{t+1} lambda_{t+1},

which is `post` run backwards with the same `a`, without a shifted copy. Both forms are linear in
(x, initial state). The derivative with respect to `a` is the same recurrence with the input
da_t h_{t-1}. So forward mode, reverse mode and every higher order are again these two forms, and
the backward pass stores `a` and `y` only. The adjoint of `pre`, which `scan` uses, is

    d x_t = lambda_t,    d a_t = lambda_t h_{t-1},    d h_0 = a_1 lambda_1.

At a step with `reset` the product with `a_t` is replaced by zero (selected, not multiplied).

On TPUs and Hopper GPUs a kernel runs each form, and one kernel computes the whole adjoint.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, jax_compat
from seqjax.ops.core.custom_adjoint import custom_adjoint
from seqjax.ops.core.kernel_op import kernel_call
from seqjax.ops.elementwise.xla_algorithms import ScanOptions, run, unless_reset
from seqjax.types import Array

XLA = backends.Backend("linear_scan")


def _abstract(
    a: Any, x: Any, h0: Any, *reset: Any, options: ScanOptions, **_: Any
) -> tuple[Any, Any]:
    return x.update(dtype=options.out_dtype, weak_type=False), h0.update(weak_type=False)


def _implementation(
    target: jax_compat.Target,
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
    *rest: jax.Array,
    options: ScanOptions,
    backend: backends.Backend,
) -> tuple[jax.Array, jax.Array]:
    reset = rest[0] if rest else None
    if not backends.runs_kernel(backend, target, a, x, h0):
        return run(a, x, h0, reset, options, platform=target.platform)
    a_parts, x_parts, state = _parts(h0.dtype, a, x, h0)
    y, final = backend.kernels(target).scan(
        a_parts,
        x_parts,
        state,
        reset,
        post=options.post,
        reverse=options.reverse,
        out_dtype=jnp.finfo(options.out_dtype).dtype,
        block_sizes=backend.block_sizes,
        interpret=backend.interpret,
    )
    return _whole(y), _whole(final)


def _parts(state: Any, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
    """Split each array as the kernels require: itself, or its real and imaginary part."""
    if not jnp.issubdtype(state, jnp.complexfloating):
        return tuple((x,) for x in arrays)
    return tuple((jnp.real(x), jnp.imag(x)) for x in arrays)


def _whole(parts: tuple[jax.Array, ...]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


recurrence_p = jax_compat.make_primitive(
    "seqjax_linear_recurrence", _implementation, _abstract, local=True
)


def recurrence(
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
    reset: jax.Array | None,
    options: ScanOptions,
    backend: backends.Backend = XLA,
) -> tuple[jax.Array, jax.Array]:
    """Run one of the two forms: a [B|1, T|1, D], x [B, T, D], h0 [B, D], reset [B, T] or None.

    Return y [B, T, D] and the final state. By default XLA runs the recurrence. Ops that contain it
    and have their own kernel use this default.
    """
    operands = (a, x, h0) if reset is None else (a, x, h0, reset)
    y, final = recurrence_p.bind(
        *jax_compat.match_varying(*operands),
        options=options,
        backend=backend,
    )
    return y, final


def scan(
    a: Array,
    x: Array,
    h0: Array,
    reset: Array | None,
    options: ScanOptions,
    backend: backends.Backend,
) -> tuple[Array, Array]:
    """Run the `pre` form with an adjoint that computes all cotangents in one pass.

    If XLA always runs the call, return the recurrence itself, whose rules above need one scan less
    in forward mode.
    """
    if backend.mode is backends.Mode.OFF:
        return recurrence(a, x, h0, reset, options)

    def forward(a: Array, x: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        return recurrence(a, x, h0, reset, options, backend)

    def adjoint(args: Any, outputs: Any, _: Any, cotangents: Any) -> list[Array]:
        a, x, h0, reset = args
        like = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in (a, x, h0)]

        def by_xla(
            a: Array, y: Array, h0: Array, reset: Any, dy: Array, d_final: Array
        ) -> list[Array]:
            backwards = options._replace(post=True, reverse=not options.reverse, out_dtype=h0.dtype)
            dx, dh0 = recurrence(a, dy, d_final, reset, backwards, backend)
            da = dx * unless_reset(reset, shift(h0, y.astype(h0.dtype), options.reverse))
            shared = tuple(axis for axis in (0, 1) if a.shape[axis] == 1)
            da = jnp.sum(da, axis=shared, keepdims=True) if shared else da
            return [_cast(ct, value) for ct, value in zip((da, dx, dh0), like, strict=True)]

        def by_kernel(kernels: Any, a: Array, *rest: Any) -> list[Array]:
            y, h0, reset, *cotangents = rest
            a_parts, y, state, dy, d_final = _parts(h0.dtype, a, y, h0, *cotangents)
            found = kernels.adjoint(
                a_parts,
                y,
                state,
                reset,
                dy,
                d_final,
                reverse=options.reverse,
                out_dtype=jnp.finfo(like[1].dtype).dtype,
                block_sizes=backend.block_sizes,
                interpret=backend.interpret,
            )
            return [_cast(_whole(ct), value) for ct, value in zip(found, like, strict=True)]

        run = kernel_call(backend, by_xla, by_kernel, out_shapes=lambda *_: like)
        return run(a, outputs[0], h0, reset, *cotangents)

    with_adjoint = custom_adjoint(
        forward, adjoint, with_residuals=lambda *args: (forward(*args), ())
    )
    return with_adjoint(a, x, h0, reset)


def _cast(cotangent: jax.Array, like: Any) -> jax.Array:
    """Cast a cotangent to the dtype of its argument; a real argument gets the real part."""
    if jnp.iscomplexobj(cotangent) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
        cotangent = jnp.real(cotangent)
    return cotangent.astype(like.dtype)


def shift(h: jax.Array, y: jax.Array, reverse: bool) -> jax.Array:
    """Return [h, y_1, ..., y_{T-1}] in the direction of time: the state before each step."""
    if reverse:
        return jnp.concatenate([y[:, 1:], h[:, None]], axis=1)
    return jnp.concatenate([h[:, None], y[:, :-1]], axis=1)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    a, x, h0, *reset = primals
    da, dx, dh0 = tangents[:3]
    y, final = recurrence_p.bind(*primals, **params)
    zero = jax_compat.Zero
    if all(type(t) is zero for t in (da, dx, dh0)):
        return (y, final), (zero.from_primal_value(y), zero.from_primal_value(final))
    dtype = h0.dtype
    dx = None if type(dx) is zero else dx
    dh0 = jnp.zeros_like(h0) if type(dh0) is zero else dh0
    dfinal = None
    options = params["options"]
    # A discarded state may be NaN. Select before multiplying: the cotangent of `a` would otherwise
    # be zero times NaN.
    if type(da) is not zero:
        cleared = reset[0] if reset else None
        if options.post:  # c_{t+1} = a_t y_t: the term enters one step later
            extra = da.astype(dtype) * unless_reset(cleared, y.astype(dtype))
            last = 0 if options.reverse else -1
            dfinal = extra[:, last]
            extra = shift(jnp.zeros_like(h0), extra, options.reverse)
        else:
            before = shift(h0, y.astype(dtype), options.reverse)
            extra = da.astype(dtype) * unless_reset(cleared, before)
        dx = extra if dx is None else extra + dx.astype(dtype)
    if dx is None:
        dx = jnp.zeros_like(x)
    dy, df = recurrence_p.bind(*jax_compat.match_varying(a, dx, dh0, *reset), **params)
    return (y, final), (dy, df if dfinal is None else df + dfinal)


def _transpose(cotangents: Any, a: Any, x: Any, h0: Any, *reset: Any, **params: Any) -> Any:
    ct_y, ct_final = cotangents
    zero = jax_compat.Zero
    x_aval = x.aval if jax_compat.ad.is_undefined_primal(x) else jax.typeof(x)
    h_aval = h0.aval if jax_compat.ad.is_undefined_primal(h0) else jax.typeof(h0)
    options = params["options"]
    ct_y = jnp.zeros(x_aval.shape, options.out_dtype) if type(ct_y) is zero else ct_y
    ct_final = jnp.zeros(h_aval.shape, h_aval.dtype) if type(ct_final) is zero else ct_final
    params["options"] = options._replace(
        post=not options.post, reverse=not options.reverse, out_dtype=x_aval.dtype
    )
    ct_x, ct_h0 = recurrence_p.bind(*jax_compat.match_varying(a, ct_y, ct_final, *reset), **params)
    return (
        None,
        ct_x if jax_compat.ad.is_undefined_primal(x) else None,
        ct_h0 if jax_compat.ad.is_undefined_primal(h0) else None,
        *(None for _ in reset),
    )


def _batch(args: Any, dims: Any, **params: Any) -> Any:
    """Map by joining the mapped axis to the batch."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    x, dim = args[1], dims[1]
    batch = x.shape[0 if dim is None or dim > 0 else 1]
    folded = []
    for position, (array, dim) in enumerate(zip(args, dims, strict=True)):
        if dim is None and position == 0 and array.shape[0] == 1:
            folded.append(array)  # shared by the whole batch, mapped or not
            continue
        if dim is None:
            array = jnp.broadcast_to(array[None], (size, *array.shape))
        else:
            array = jnp.moveaxis(array, dim, 0)
        if array.shape[1] != batch:
            array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
        folded.append(array.reshape(size * batch, *array.shape[2:]))
    y, final = recurrence_p.bind(*folded, **params)
    return (y.reshape(size, batch, *y.shape[1:]), final.reshape(size, batch, *final.shape[1:])), (
        0,
        0,
    )


jax_compat.ad.primitive_jvps[recurrence_p] = _jvp
jax_compat.ad.primitive_transposes[recurrence_p] = _transpose
jax_compat.batching.primitive_batchers[recurrence_p] = _batch
