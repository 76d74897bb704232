"""Calls of the TPU kernels of the matrix-state ops."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import chunk_steps
from seqjax.ops.core import checks

KERNEL_WIDTH = 256  # the largest K and V whose blocks fit the memory of every chip


def unsupported(given: Mapping[str, Any], interpret: bool) -> str | None:
    """Return the reason why the kernels do not support a call, or None."""
    dtypes = {x.dtype for x in given.values() if x is not None}
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return "has no complex form"
    if jnp.dtype(jnp.float16) in dtypes:
        return "does not support float16; cast to bfloat16 or float32"
    if jnp.dtype(jnp.float64) in dtypes and not interpret:
        return "does not support float64, which TPUs do not have"
    widest = max(given["q"].shape[-1], given["v"].shape[-1])
    if widest > KERNEL_WIDTH:
        return f"supports keys and values of at most {KERNEL_WIDTH} numbers, got {widest}"
    return None


def functions(
    default_scale: float | None, chunk_size: int | None, interpret: bool
) -> tuple[Callable[..., Any], ...]:
    """Return the functions forward, backward and shapes for `kernel_op`.

    Args:
      default_scale: K**-0.5, or None if the caller passes a scale, which is then an operand.
      chunk_size: the caller's choice.
      interpret: the caller's choice.
    """
    # A kernel is compiled with the default scale. Other scales multiply the queries beforehand.
    shared = {
        "scale": 1.0 if default_scale is None else default_scale,
        "chunk_size": chunk_size,
        "interpret": interpret,
    }

    def inputs(arrays: Any, log_decay: Any, scale: Any) -> tuple[Any, ...]:
        q = arrays["q"]
        if scale is not None:
            q = (q.astype(scale.dtype) * scale).astype(q.dtype)
        return q, arrays["k"], arrays["v"], arrays.get("beta"), log_decay

    def vectors(arrays: Any, reset: Any) -> dict[str, Any]:
        """Return `a` and `b`, if the op has them. `a` reads nothing where the state is cleared."""
        found = {name: arrays[name] for name in ("a", "b") if name in arrays}
        if "a" in found and reset is not None:
            a = found["a"]
            found["a"] = jnp.where(reset[..., None, None], jnp.zeros_like(a), a)
        return {"vectors": found} if found else {}

    def forward(
        kernels: Any, arrays: Any, log_decay: Any, S0: Any, reset: Any, scale: Any, *, save: bool
    ) -> Any:
        out, final, *states = kernels.forward(
            *inputs(arrays, log_decay, scale),
            S0,
            reset,
            states=save,
            **vectors(arrays, reset),
            **shared,
        )
        return (out, final), states

    def backward(
        kernels: Any, args: Any, outputs: Any, residuals: Any, cotangents: Any
    ) -> list[jax.Array]:
        del outputs
        arrays, log_decay, _, reset, scale = args
        [states] = residuals
        grads = kernels.backward(
            *inputs(arrays, log_decay, scale),
            states,
            reset,
            *cotangents,
            **vectors(arrays, reset),
            **shared,
        )
        if "a" in grads and reset is not None:
            grads |= {"a": jnp.where(reset[..., None, None], 0, grads["a"])}
        d_scale = []
        if scale is not None:
            q, d_scaled = arrays["q"], grads["q"].astype(scale.dtype)
            d_scale = [jnp.sum(d_scaled * q.astype(scale.dtype))]
            grads |= {"q": (d_scaled * scale).astype(q.dtype)}
        last = [] if log_decay is None else [grads["log_decay"]]
        return [*(grads[name] for name in sorted(arrays)), *last, grads["initial_state"], *d_scale]

    def shapes(arrays: Any, log_decay: Any, S0: Any, reset: Any, scale: Any) -> Any:
        del reset
        dtype = checks.output_dtype(arrays["v"], *arrays.values(), log_decay, S0)
        outputs = jax.ShapeDtypeStruct(arrays["v"].shape, dtype)
        steps = chunk_steps(*inputs(arrays, log_decay, scale), wanted=chunk_size)
        count = -(-arrays["q"].shape[1] // steps)
        batch, *rest = S0.shape
        states = jax.ShapeDtypeStruct((batch, count, *rest), S0.dtype)
        return (outputs, jax.ShapeDtypeStruct(S0.shape, S0.dtype)), [states]

    return forward, backward, shapes
