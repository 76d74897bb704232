"""The elementwise linear recurrence as a primitive, closed under differentiation.

Two forms, each running over time forwards or backwards:

    pre:   h <- a_t h + x_t;   y_t = h          (post=False)
    post:  y_t = c + x_t;      c <- a_t y_t     (post=True)

They are each other's transpose with time reversed: the cotangent of `pre` obeys
lambda_t = g_t + a_{t+1} lambda_{t+1}, which is `post` run backwards with the same `a`, no array
shifted or copied. Both are linear in (x, initial state), and their derivative with respect to
`a` is the same recurrence fed with da_t h_{t-1}; so forward mode, reverse mode and every higher
order are again these two forms, and the backward pass stores `a` and `y` only.

At a step with `reset` the product with `a_t` is replaced by zero (selected, not multiplied).

For `linear_scan` on TPUs and Hopper GPUs each form is a kernel, whatever it is that is
differentiated. One backward pass is a single one, that makes the cotangents of all
arguments on the way (`with_adjoint`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.limits import whole_rows
from pallas_kernels.linear_scan import faster_on_gpu
from seqjax.ops.core import backends, jax_compat, kernel_op
from seqjax.ops.elementwise.xla_algorithms import Form, run
from seqjax.types import Array

XLA = backends.Use("linear_scan", "never")


def _abstract(a: Any, x: Any, h0: Any, *reset: Any, out_dtype: Any, **_: Any) -> tuple[Any, Any]:
    return x.update(dtype=jnp.dtype(out_dtype), weak_type=False), h0.update(weak_type=False)


def _implementation(
    target: jax_compat.Target,
    *operands: jax.Array,
    post: bool,
    reverse: bool,
    out_dtype: Any,
    use: backends.Use,
    block_sizes: tuple[int, int] | None,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    a, x, h0, *rest = operands
    reset = rest[0] if rest else None
    if use.on(target, *operands):
        a_parts, x_parts, state = _parts(h0.dtype, a, x, h0)
        y, final = use.kernels(target).scan(
            a_parts,
            x_parts,
            state,
            reset,
            post=post,
            reverse=reverse,
            out_dtype=_real(out_dtype),
            blocks=block_sizes,
            interpret=use.interpret,
        )
        return _whole(y), _whole(final)
    form = Form(post, reverse, out_dtype)
    return run(a, x, h0, reset, form, platform=target.platform, **params)


def _parts(state: Any, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
    """Each array as the kernels take it: alone, or as real and imaginary part."""
    if not jnp.issubdtype(state, jnp.complexfloating):
        return tuple((x,) for x in arrays)
    return tuple((jnp.real(x), jnp.imag(x)) for x in arrays)


def _whole(parts: tuple[jax.Array, ...]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def _real(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype


recurrence_p = jax_compat.make_primitive(
    "seqjax_linear_recurrence", _implementation, _abstract, local=True
)


def recurrence(
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
    reset: jax.Array | None,
    *,
    post: bool = False,
    reverse: bool = False,
    out_dtype: Any,
    algorithm: str | None = None,
    chunk_size: int | None = None,
    unroll: int | None = None,
    use: backends.Use = XLA,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run one of the two forms: a [B|1, T|1, D], x [B, T, D], h0 [B, D], reset [B, T] or None.

    `use` and `block_sizes` are the kernel's; without `use` XLA runs it, for ops of which a part is
    this recurrence and that were asked for XLA.
    """
    operands = (a, x, h0) if reset is None else (a, x, h0, reset)
    y, final = recurrence_p.bind(
        *jax_compat.match_varying(*operands),
        post=post,
        reverse=reverse,
        out_dtype=jnp.dtype(out_dtype),
        algorithm=algorithm,
        chunk_size=chunk_size,
        unroll=unroll,
        use=use,
        block_sizes=block_sizes,
    )
    return y, final


def kernel_use(
    algorithm: str | None,
    implementation: str | None,
    interpret: bool,
    block_sizes: tuple[int, int] | None,
    *arrays: Array,
) -> backends.Use:
    """How a call uses the kernel, for the arrays a, x and h0."""
    shape = arrays[1].shape
    narrowest = min(_real(x.dtype).itemsize for x in arrays)
    # Block sizes that suit a TPU are refused on GPU, so there a call with them names the kernel.
    on_gpu = (
        block_sizes is None
        and all(isinstance(n, int) for n in shape)  # not symbolic
        and whole_rows(shape[2], narrowest)
        and faster_on_gpu(*shape)
    )
    refused = {jnp.dtype("float16")} | (set() if interpret else {jnp.dtype("float64")})
    found = refused.intersection(_real(x.dtype) for x in arrays)
    return backends.kernel_use(
        "linear_scan",
        algorithm,
        implementation,
        interpret,
        lacking=f"takes no {found.pop()} arrays"
        if found
        else backends.unsupported_length(shape[1]),
        faster=backends.long_enough(shape[1]),
        excluded=() if on_gpu else ("cuda",),
    )


def with_adjoint(
    a: Array,
    x: Array,
    h0: Array,
    reset: Array | None,
    *,
    reverse: bool,
    out_dtype: Any,
    use: backends.Use,
    block_sizes: tuple[int, int] | None,
    **params: Any,
) -> tuple[Array, Array]:
    """The `pre` form with a backward pass that the kernel makes in one go."""

    def form(a: Array, x: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
        return recurrence(
            a,
            x,
            h0,
            reset,
            reverse=reverse,
            out_dtype=out_dtype,
            use=use,
            block_sizes=block_sizes,
            **params,
        )

    def forward(kernels: Any, *args: Any, save: bool) -> Any:
        del kernels, save  # the form finds its own; the outputs are all that is needed
        return form(*args), ()

    def backward(kernels: Any, args: Any, outputs: Any, kept: Any, cotangents: Any) -> list[Array]:
        a, x, h0, reset = args
        a_parts, y, state, dy, d_final = _parts(h0.dtype, a, outputs[0], h0, *cotangents)
        given = kernels.adjoint(
            a_parts,
            y,
            state,
            reset,
            dy,
            d_final,
            reverse=reverse,
            out_dtype=_real(x.dtype),
            blocks=block_sizes,
            interpret=use.interpret,
        )
        return [
            (_whole(ct) if jnp.iscomplexobj(like) else ct[0]).astype(like.dtype)
            for ct, like in zip(given, (a, x, h0), strict=True)
        ]

    return kernel_op.kernel_op(use, form, forward, backward, lambda *_: ())(a, x, h0, reset)


def shift(h: jax.Array, y: jax.Array, reverse: bool) -> jax.Array:
    """[h, y_1, ..., y_{T-1}] in the direction of time: what each step found."""
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
    # What a reset discards is discarded before it is multiplied: it may be NaN, and da's cotangent
    # would be zero times that.
    if type(da) is not zero:
        if params["post"]:  # c_{t+1} = a_t y_t: the term enters one step later
            extra = da.astype(dtype) * _select(reset, y.astype(dtype))
            last = 0 if params["reverse"] else -1
            dfinal = extra[:, last]
            extra = shift(jnp.zeros_like(h0), extra, params["reverse"])
        else:
            found = shift(h0, y.astype(dtype), params["reverse"])
            extra = da.astype(dtype) * _select(reset, found)
        dx = extra if dx is None else extra + dx.astype(dtype)
    if dx is None:
        dx = jnp.zeros_like(x)
    dy, df = recurrence_p.bind(*jax_compat.match_varying(a, dx, dh0, *reset), **params)
    return (y, final), (dy, df if dfinal is None else df + dfinal)


def _select(reset: list[jax.Array], value: jax.Array) -> jax.Array:
    if not reset:
        return value
    return jnp.where(reset[0][..., None], jnp.zeros_like(value), value)


def _transpose(cotangents: Any, a: Any, x: Any, h0: Any, *reset: Any, **params: Any) -> Any:
    ct_y, ct_final = cotangents
    zero = jax_compat.Zero
    x_aval = x.aval if jax_compat.ad.is_undefined_primal(x) else jax.typeof(x)
    h_aval = h0.aval if jax_compat.ad.is_undefined_primal(h0) else jax.typeof(h0)
    ct_y = jnp.zeros(x_aval.shape, params["out_dtype"]) if type(ct_y) is zero else ct_y
    ct_final = jnp.zeros(h_aval.shape, h_aval.dtype) if type(ct_final) is zero else ct_final
    params = dict(
        params, post=not params["post"], reverse=not params["reverse"], out_dtype=x_aval.dtype
    )
    ct_x, ct_h0 = recurrence_p.bind(*jax_compat.match_varying(a, ct_y, ct_final, *reset), **params)
    return (
        None,
        ct_x if jax_compat.ad.is_undefined_primal(x) else None,
        ct_h0 if jax_compat.ad.is_undefined_primal(h0) else None,
        *(None for _ in reset),
    )


def _batch(args: Any, dims: Any, **params: Any) -> Any:
    """vmap: the mapped axis joins the batch."""
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
