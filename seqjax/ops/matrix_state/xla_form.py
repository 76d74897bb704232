"""XLA form of a matrix-state recurrence: step by step, or in chunks."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import backends, linalg
from seqjax.ops.core.checkpointed_scan import time_scan
from seqjax.ops.core.linalg import along_rows
from seqjax.ops.matrix_state import chunk_sizes, chunked, decays, grouped_heads, input_maps
from seqjax.ops.matrix_state.algorithm_choice import CallOptions

if TYPE_CHECKING:
    from seqjax.ops.matrix_state.recurrence import MatrixRecurrence


def run(
    recurrence: "MatrixRecurrence",
    options: CallOptions,
    out: Any,
    differentiated: bool,
    arrays: Any,
    log_decay: Any,
    S0: jax.Array,
    reset: Any,
    scale: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs, of dtype `out`, and the final state of a call.

    Args:
      recurrence: the recurrence.
      options: the static options of the call.
      out: the dtype of the outputs.
      differentiated: whether the call is differentiated, which changes the algorithm on CPU.
      arrays: the inputs by name.
      log_decay: None, an array, or the input of a gate and the gate.
      S0: the initial state.
      reset: [B, T] bool or None.
      scale: factor of the queries, or None for that of the options.
    """
    state = S0.dtype
    if options.normalize:
        arrays = input_maps.normalize(arrays)
    if isinstance(log_decay, tuple):
        log_decay = input_maps.open_gate(log_decay)
    vectors = [name for name, x in arrays.items() if x.ndim == 4]
    arrays = {name: x if x.ndim == 4 else x[..., None] for name, x in arrays.items()}
    sizes = (arrays["v"].shape, options.chunk_size)
    if log_decay is not None:
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    if shared := arrays["q"].shape[2] != S0.shape[1]:
        arrays, log_decay, S0, ungroup = grouped_heads.group(arrays, log_decay, S0)
    factor = jnp.asarray(options.scale if scale is None else scale, state)

    def cleared(x: jax.Array, reset: jax.Array) -> jax.Array:
        reset = jnp.expand_dims(reset, range(reset.ndim, x.ndim))
        return jnp.where(reset, jnp.zeros_like(x), x)

    if reset is not None:  # decays of -inf do not clear the state before the decay
        for name in recurrence.reads_before_decay:
            arrays[name] = cleared(arrays[name], reset)

    def step(S: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        x, decay, reset = inputs
        x = {name: value.astype(state) for name, value in x.items()}
        if reset is not None:
            S = cleared(S, reset)
        decayed = S
        if decay is not None:
            x["decay"] = decay
            decayed = along_rows(decay, S.shape[-1]) * S
        S = recurrence.step(S, decayed, x)
        return S, linalg.read(S, x["q"]).astype(out)

    # A complex decay makes the states complex, for which there is no bfloat16.
    mixable = recurrence.mixed and not jnp.issubdtype(state, jnp.complexfloating)
    narrow = mixable and all(arrays[name].dtype == jnp.bfloat16 for name in vectors)

    def divided(division: chunk_sizes.Division | None, S0: jax.Array, inputs: Any) -> Any:
        mixed = division is not None and division.mixed
        if not mixed:
            inputs = inputs | {"q": inputs["q"].astype(state) * factor}
        if division is None:
            decay = decays.by_step(log_decay, inputs["q"], repeat=differentiated)
            # The adjoint stores the states of one chunk: few enough for a cache.
            return time_scan(step, S0, (inputs, decay, reset), options.chunk_size or 16)
        if log_decay is not None:
            inputs = inputs | {"log_decay": log_decay}
        assert recurrence.chunk is not None
        return chunked.scan_chunks(
            recurrence.chunk,
            inputs,
            S0,
            reset,
            division=division,
            out_dtype=out,
            vectors=vectors,
            scale=factor if mixed else None,
        )

    algorithm = options.on_cpu if differentiated else options.forward_on_cpu
    on_cpu = chunk_sizes.divide(algorithm, chunk_sizes.CPU, *sizes, narrow)
    elsewhere = chunk_sizes.divide(options.elsewhere, chunk_sizes.ACCELERATOR, *sizes, narrow)
    results = backends.by_platform(divided, on_cpu, elsewhere, S0, arrays)
    return ungroup(*results) if shared else results
