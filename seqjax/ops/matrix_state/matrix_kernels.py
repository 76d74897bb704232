"""Calls of the kernels of the matrix-state ops.

The kernels take at most 256 columns, and those for TPU equal numbers of heads. `_layout` repeats
the queries and keys of shared heads, and divides wide values into slices: columns of a state are
independent, so a slice is one more head.

The module of a kernel declares three features:

- INPUT_MAPS: it normalizes q and k, and computes the gate of the decays.
- SHARED_HEADS: in its forward pass, heads may share queries and keys.
- RECOMPUTES_STATES: its backward pass takes the initial state, not those of the chunks.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import chunk_steps
from seqjax.ops.core import checks
from seqjax.ops.matrix_state import grouped_heads, input_maps
from seqjax.ops.matrix_state.algorithm_choice import CallOptions

KERNEL_WIDTH = 256  # the largest K and V whose blocks fit the memory of every chip
VALUE_WIDTH = 512  # the largest V, in slices of at most KERNEL_WIDTH


def unsupported(given: Mapping[str, Any], interpret: bool) -> str | None:
    """Return the reason why the kernels do not support a call, or None."""
    dtypes = {x.dtype for x in given.values() if x is not None}
    if given.get("value_log_decay") is not None:
        return "has no decays of values"
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return "has no complex form"
    if jnp.dtype(jnp.float16) in dtypes:
        return "does not support float16; cast to bfloat16 or float32"
    if jnp.dtype(jnp.float64) in dtypes and not interpret:
        return "does not support float64"
    for name, what, width in (("q", "keys", KERNEL_WIDTH), ("v", "values", VALUE_WIDTH)):
        if given[name].shape[-1] > width:
            return f"supports {what} of at most {width} numbers, got {given[name].shape[-1]}"
    return None


def check_block_sizes(op: str, block_sizes: Any, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Check the caller's steps and heads of a block; slices of wide values count as heads."""
    heads = sizes["H"] * -(-sizes["V"] // KERNEL_WIDTH)
    return checks.check_block_sizes(op, block_sizes, "H", heads, unit=8, powers=True)


def functions(options: CallOptions, interpret: bool, dtype: Any) -> tuple[Callable[..., Any], ...]:
    """Return the functions forward, backward and shapes for `kernel_op`.

    Args:
      options: the static options of the call.
      interpret: the caller's choice.
      dtype: the dtype of the outputs.
    """
    # A kernel is compiled with the default scale. Other scales multiply the queries beforehand,
    # after they were normalized.
    shared: dict[str, Any] = {
        "scale": 1.0 if options.scale is None else options.scale,
        "chunk_size": options.chunk_size,
        "interpret": interpret,
    }
    if options.backend.block_sizes is not None:  # a kernel for TPU: others take no block sizes
        shared["chunk_size"], shared["block_heads"] = options.backend.block_sizes

    def layout(kernels: Any, reset: Any, repeat: bool) -> Callable[..., Any]:
        inside = kernels.INPUT_MAPS
        outside = options.normalize and (options.scale is None or not inside)
        return functools.partial(_layout, reset, repeat, outside, not inside)

    def maps(kernels: Any, gate: Any) -> dict[str, Any]:
        """Return the maps of inputs that the kernels compute themselves."""
        if not kernels.INPUT_MAPS:
            return {}
        return {"normalize": options.normalize and options.scale is not None, "gate": gate}

    def forward(
        kernels: Any, arrays: Any, log_decay: Any, S0: Any, reset: Any, scale: Any, *, save: bool
    ) -> Any:
        repeat = not kernels.SHARED_HEADS
        run = layout(kernels, reset, repeat)
        *inputs, gate, vectors, state = run(arrays, log_decay, S0, scale)
        out, final, *states = kernels.forward(
            *inputs, state, reset, vectors=vectors, states=save, **maps(kernels, gate), **shared
        )
        if save and not states:  # this kernel computes the states again for its backward pass
            _, residuals = shapes(arrays, log_decay, S0, reset, scale)
            states = [jnp.zeros(s.shape, s.dtype) for s in residuals]
        heads, values = arrays["v"].shape[2:]
        out = _join(out[..., None, :], heads, values)[..., 0, :]
        return (out, _join(final, heads, values)), states

    def backward(
        kernels: Any, args: Any, outputs: Any, residuals: Any, cotangents: Any
    ) -> list[jax.Array]:
        del outputs
        arrays, log_decay, S0, reset, scale = args
        [states], (d_out, d_final) = residuals, cotangents
        run = layout(kernels, reset, True)
        (*inputs, gate, vectors, state), transpose = jax.vjp(run, arrays, log_decay, S0, scale)
        if kernels.RECOMPUTES_STATES:
            states = state
        inputs += [states, reset, _columns(d_out), _slices(d_final)]
        grads = kernels.backward(*inputs, vectors=vectors, **maps(kernels, gate), **shared)
        found = tuple(grads.get(name) for name in ("q", "k", "v", "beta", "log_decay"))
        of_gate = None if gate is None else (grads["rate"], grads["bias"])
        of_vectors = {name: grads[name] for name in vectors}
        return jax.tree.leaves(transpose((*found, of_gate, of_vectors, grads["initial_state"])))

    def shapes(arrays: Any, log_decay: Any, S0: Any, reset: Any, scale: Any) -> Any:
        outputs = jax.ShapeDtypeStruct(arrays["v"].shape, dtype)
        v, state = jax.eval_shape(_columns, arrays["v"]), jax.eval_shape(_slices, S0)
        vectors = (arrays[name] for name in ("a", "b") if name in arrays)
        decay = log_decay[0] if isinstance(log_decay, tuple) else log_decay
        inputs = (arrays["q"], arrays["k"], v, arrays.get("beta"), decay, *vectors)
        count = -(-arrays["q"].shape[1] // chunk_steps(*inputs, wanted=shared["chunk_size"]))
        batch, *rest = state.shape
        states = jax.ShapeDtypeStruct((batch, count, *rest), S0.dtype)
        return (outputs, jax.ShapeDtypeStruct(S0.shape, S0.dtype)), [states]

    return forward, backward, shapes


def _layout(
    reset: Any,
    repeat: bool,
    normalize: bool,
    open_gate: bool,
    arrays: Any,
    log_decay: Any,
    S0: jax.Array,
    scale: Any,
) -> tuple[Any, ...]:
    """Return q, k, v, beta, log_decay, gate, a dict of a and b, and the initial state.

    Arrays are [B, T, heads, F]. The gate is None, or its rate and bias [heads, F]. The dict is
    empty for ops without a and b. Where the state is cleared before a step, its a is zero, because
    it reads the state before the decay.

    Args:
      reset: None or [B, T].
      repeat: whether to repeat q and k that heads share.
      normalize: whether to normalize q and k here, not in the kernel.
      open_gate: whether to compute the decays here, not in the kernel.
      arrays, log_decay, S0, scale: operands of the op.
    """
    if normalize:
        arrays = input_maps.normalize(arrays)
    if open_gate:
        log_decay = input_maps.open_gate(log_decay)
    gate: tuple[jax.Array, ...] | None = None
    if isinstance(log_decay, tuple):
        log_decay, (A_log, bias) = log_decay
        rate = input_maps.SoftplusGate(A_log, bias).rate(log_decay, S0.dtype)
        gate = (rate, bias.astype(S0.dtype))
    q, v = arrays["q"], _columns(arrays["v"])
    if scale is not None:
        q = (q.astype(scale.dtype) * scale).astype(q.dtype)
    heads = v.shape[2]
    k = arrays["k"]
    if repeat:
        q, k = (grouped_heads.repeat(x, heads) for x in (q, k))
    beta, decay = (
        None if x is None else grouped_heads.repeat(x, heads)
        for x in (arrays.get("beta"), log_decay)
    )
    if gate is not None:  # as heads of a single step
        gate = tuple(grouped_heads.repeat(x[None, None], heads)[0, 0] for x in gate)
    vectors = {
        name: grouped_heads.repeat(arrays[name], heads) for name in ("a", "b") if name in arrays
    }
    if vectors and reset is not None:
        vectors["a"] = jnp.where(reset[..., None, None], 0, vectors["a"])
    return q, k, v, beta, decay, gate, vectors, _slices(S0)


def _columns(x: jax.Array) -> jax.Array:
    """Divide [..., H, V] into slices of columns that are heads; see `_slices`."""
    return _slices(x[..., None, :])[..., 0, :]


def _slices(x: jax.Array) -> jax.Array:
    """Divide [..., H, K, V] into n slices of at most `KERNEL_WIDTH` columns: [..., n H, K, V / n].

    The last slice is filled with zeros. Slices are in the order of their heads.
    """
    *lead, heads, keys, values = x.shape
    count = -(-values // KERNEL_WIDTH)
    if count == 1:
        return x
    width = -(-values // count)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * width - values)])
    x = jnp.moveaxis(x.reshape(*lead, heads, keys, count, width), -2, -3)
    return x.reshape(*lead, heads * count, keys, width)


def _join(x: jax.Array, heads: int, values: int) -> jax.Array:
    """Invert `_slices`: [..., n H, K, V / n] to [..., H, K, V]."""
    *lead, total, keys, width = x.shape
    if total == heads:
        return x
    x = jnp.moveaxis(x.reshape(*lead, heads, total // heads, keys, width), -3, -2)
    return x.reshape(*lead, heads, keys, -1)[..., :values]
