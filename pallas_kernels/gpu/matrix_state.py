"""Matrix-state recurrences on GPU: linear attention and the delta rule.

With D_{t,j} the decays of the steps after j and up to t, and S the state before a chunk of C steps,

    u_t = v_t                                                        linear attention
    U   = (I + N)^-1 beta (V - D K S)                                delta rule
    o_t = scale * (D_{t,0} q_t S + sum_{j <= t} scores_{t,j} u_j)
    S'  = D_{C,0} S + sum_j D_{C,j} k_j u_j^T

`matrix_pairs` computes scores and inverses of all chunks in parallel, and `matrix_pass` carries the
state. One pass would compute both between two updates of the state. The inverse alone is ten
products, each of which depends on the previous one, and with few heads most of the chip would wait.
The algebra is that of the TPU kernels, `linear_attention/tpu.py` and `delta_rule/tpu.py`. The
kernels require Hopper.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import matrix_gradients, matrix_pass
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import Arrays, Variant
from pallas_kernels.gpu.matrix_pairs import LOG_ZERO, pairs
from pallas_kernels.gpu.matrix_pass import OUTPUT_SLOTS, Chunk
from pallas_kernels.gpu.matrix_products import CHUNK, Numerics
from pallas_kernels.gpu.tma import SMEM_WHOLE

WIDTHS = (64, 128)  # supported numbers of keys
ROW_UNIT = 8  # the copy engine requires whole tiles of rows of this many steps


def forward(
    op: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    reset: jax.Array | None,
    *,
    scale: float,
    vectors: dict[str, jax.Array] | None = None,
    chunk_size: int | None = None,
    states: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Compute outputs and final state.

    Args:
      op: name of the op. With `beta` it is the delta rule.
      q, k: [B, T, G, K], float32 or bfloat16. G divides H.
      v: [B, T, H, V].
      beta: [B, T, H] or None.
      log_decay: None or [B, T, H].
      initial_state: [B, H, K, V] in float32.
      reset: [B, T] bool or None.
      scale: factor of the outputs.
      vectors: {} or None: the kernel has no further inputs.
      chunk_size: 64 or None.
      states: no effect: the backward pass has no residuals.
      interpret: run in interpret mode, without a GPU. This is slow.

    Returns:
      (o [B, T, H, V] in the dtype of v, final state).

    Raises:
      NotImplementedError: if the kernel does not support the call.
    """
    del states
    _check(op, k, v, log_decay, initial_state, vectors, chunk_size)
    length = q.shape[1]
    p, arrays = _prepare(q, k, v, beta, log_decay, reset, scale, interpret)
    out_like = _pad_steps(v)
    p = _fit(p, v.dtype.itemsize)
    arrays |= pairs(p, arrays, initial_state.shape[:2])
    timed = _of_pass(p, arrays, "q", "k", "v", "scores")
    found = matrix_pass.run(op, p, timed, initial_state, _with_outputs, out_like=out_like)
    return found["out"][:, :length], found["final"]


def _of_pass(p: Variant, arrays: Arrays, *names: str) -> Arrays:
    """Return the inputs of a pass by name: those given, and those that the variant has."""
    names += ("beta", "inverse") if p.delta else ()
    names += ("upto", "after") if p.decay else ()
    return {name: arrays[name] for name in names}


def _write_values(c: Chunk) -> tuple[list[Any], Any]:
    """Return the values U of a chunk in shared memory, and in registers if they are used there."""
    x = c.x
    value: Any = mp.joined(x["v"]) if c.p.delta or c.p.decay else None
    if not c.p.delta:
        return x["v"], value
    missing = value - c.decayed("upto", mp.product(c.p.num, x["k"], c.state))
    right = c.write(mp.by_row(x["beta"][0], missing.shape) * missing)
    value = mp.product(c.p.num, x["inverse"], right)
    return c.write(value), value


def _next_state(c: Chunk, state: jax.Array, written: list[Any], value: Any) -> jax.Array:
    if c.p.decay:
        written = c.write(c.decayed("after", value))
    return mp.product(c.p.num, mp.transposed(c.x["k"]), written, c.carried(state))


def _with_outputs(c: Chunk, state: jax.Array) -> jax.Array:
    num, x = c.p.num, c.x
    written, value = _write_values(c)
    out = c.decayed("upto", mp.product(num, x["q"], c.state[: num.inputs]))
    c.send(c.p.scale * mp.product(num, x["scores"], written, out))
    return _next_state(c, state, written, value)


def _without_outputs(c: Chunk, state: jax.Array) -> jax.Array:
    return _next_state(c, state, *_write_values(c))


def _in_reverse(c: Chunk, cotangent: jax.Array) -> jax.Array:
    """Return the cotangent of the state before a chunk from that of the state after it.

    dU = scores^T do + D K F,     dV = beta (I + N)^-T dU      delta rule
    F' = D_{C,0} F + sum_t D_{t,0} (q_t do_t^T - k_t dv_t^T)   do = scale * d_out
    """
    num, x = c.p.num, c.x
    d_out = c.p.scale * mp.joined(x["d_out"])
    carried = c.carried(cotangent)
    if c.p.delta:
        own = mp.product(num, mp.transposed(x["scores"]), x["d_out"])
        du = c.p.scale * own + c.decayed("after", mp.product(num, x["k"], c.state))
        dr = mp.product(num, mp.transposed(x["inverse"]), c.write(du))
        dv = mp.by_row(x["beta"][0], dr.shape) * dr
        right = c.write(-c.decayed("upto", dv))
        carried = mp.product(num, mp.transposed(x["k"]), right, carried)
    right = c.write(c.decayed("upto", d_out), num.inputs)
    return mp.product(num, mp.transposed(x["q"]), right, carried)


def _prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    log_decay: jax.Array | None,
    reset: jax.Array | None,
    scale: float,
    interpret: bool,
) -> tuple[Variant, Arrays]:
    """Return the variant, and the arrays by name in the layout of blocks."""
    batch, length, heads, _ = v.shape
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    chunks = -(-length // CHUNK)
    p = Variant(
        num=Numerics(1, 2, 128, interpret) if narrow else Numerics(3, 3, 128, interpret),
        group=heads // q.shape[2],
        keys=k.shape[-1],
        columns=64,
        chunks=chunks,
        scale=scale,
        decay=log_decay is not None or reset is not None,
        delta=beta is not None,
    )
    arrays: Arrays = {
        name: mp.split(_pad_steps(x), p.num.inputs) for name, x in (("q", q), ("k", k), ("v", v))
    }
    if beta is not None:
        arrays["beta"] = [_by_head(beta.astype(jnp.float32), chunks)]
    if p.decay:
        logs = _by_head(_logarithms(log_decay, reset, (batch, length, heads)), chunks)
        upto, after = _sums(logs)
        arrays |= {"log_decay": [logs], "upto": [upto], "after": [after]}
    return p, arrays


def _check(
    op: str,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    vectors: dict[str, jax.Array] | None,
    chunk_size: int | None,
) -> None:
    """Raise NotImplementedError if the kernel does not support a call."""
    hint = "use implementation='xla' or None."
    if vectors:
        raise NotImplementedError(f"{op}: there is no GPU kernel with `a` and `b` yet; {hint}")
    if log_decay is not None and log_decay.ndim == 4:
        raise NotImplementedError(
            f"{op}: `log_decay` must be None or [B, T, H] in the GPU kernel, got decays per"
            f" channel; {hint}"
        )
    if state.dtype != jnp.float32:
        raise NotImplementedError(
            f"{op}: the GPU kernel must have a float32 state, got {state.dtype}; {hint}"
        )
    if k.shape[-1] not in WIDTHS or v.shape[-1] % 64:
        raise NotImplementedError(
            f"{op}: the GPU kernel must have keys of 64 or 128 numbers and values of a multiple of"
            f" 64, got {k.shape[-1]} and {v.shape[-1]}; {hint}"
        )
    if chunk_size not in (None, CHUNK):
        raise NotImplementedError(
            f"{op}: the GPU kernel must have chunks of {CHUNK} steps, got `chunk_size`"
            f" {chunk_size}; leave it out."
        )


def _fit(p: Variant, out_bytes: int) -> Variant:
    """Choose the columns and the prefetch depth that fit the shared memory."""
    for columns, depth in ((64, 2), (64, 1), (32, 1)):
        # All factors of a product have the same swizzle, at most a row of the narrowest.
        p = p._replace(num=p.num._replace(swizzle=2 * columns), columns=columns, depth=depth)
        block = p.num.inputs * (2 * p.keys + columns) + p.computed * CHUNK * (1 + p.delta)
        vectors = 3 * 4 * CHUNK
        own = 2 * p.computed * columns * (p.keys + CHUNK)
        outputs = OUTPUT_SLOTS * CHUNK * columns * out_bytes
        if depth * (2 * CHUNK * block + vectors) + own + outputs <= SMEM_WHOLE:
            break
    return p


def _pad_steps(x: jax.Array) -> jax.Array:
    count = -x.shape[1] % ROW_UNIT
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x


def _by_head(x: jax.Array, chunks: int) -> jax.Array:
    """Convert [B, T, H] to [B, H, chunks * 64], with zeros after the last step."""
    x = jnp.pad(x, ((0, 0), (0, chunks * CHUNK - x.shape[1]), (0, 0)))
    return jnp.moveaxis(x, 1, 2)


def _logarithms(
    log_decay: jax.Array | None, reset: jax.Array | None, shape: tuple[int, int, int]
) -> jax.Array:
    """Return finite logarithms of the decays [B, T, H], with resets."""
    logs = jnp.zeros(shape, jnp.float32)
    if log_decay is not None:
        logs = log_decay.astype(jnp.float32)
        logs = jnp.where(logs < LOG_ZERO, LOG_ZERO, logs)
    return logs if reset is None else jnp.where(reset[..., None], LOG_ZERO, logs)


def _sums(logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return exp(g_1 + ... + g_t) and exp(g_{t+1} + ... + g_C) within the chunks."""
    steps = logs.reshape(*logs.shape[:2], -1, CHUNK)
    later = jnp.pad(steps[..., 1:], [(0, 0)] * 3 + [(0, 1)])
    upto, after = jnp.cumsum(steps, axis=-1), lax.cumsum(later, axis=3, reverse=True)
    return jnp.exp(upto).reshape(logs.shape), jnp.exp(after).reshape(logs.shape)


def backward(
    op: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    reset: jax.Array | None,
    d_out: jax.Array,
    d_final: jax.Array,
    *,
    scale: float,
    vectors: dict[str, jax.Array] | None = None,
    chunk_size: int | None = None,
    interpret: bool = False,
) -> dict[str, jax.Array]:
    """Compute the cotangents of all arrays but `reset`, by name.

    One pass computes the states before the chunks, one in reverse the cotangents of the states
    after them, and `matrix_gradients` the cotangents of the inputs. Args as for `forward`; heads do
    not share queries and keys. `d_out` and `d_final` are the cotangents of its results.

    Raises:
      NotImplementedError: if the kernel does not support the call.
    """
    _check(op, k, v, log_decay, initial_state, vectors, chunk_size)
    length = q.shape[1]
    p, arrays = _prepare(q, k, v, beta, log_decay, reset, scale, interpret)
    arrays["d_out"] = mp.split(_pad_steps(d_out.astype(v.dtype)), p.num.inputs)
    p = _fit(p, 0)
    arrays |= pairs(p, arrays, initial_state.shape[:2])
    timed = _of_pass(p, arrays, "k", "v")
    found = matrix_pass.run(op + "_states", p, timed, initial_state, _without_outputs, states=True)
    arrays["states"] = [found["states"]]
    timed = _of_pass(p, arrays, "q", "d_out", *(("k", "scores") if p.delta else ()))
    found = matrix_pass.run(
        op + "_cotangents", p, timed, d_final, _in_reverse, states=True, reverse=True
    )
    arrays["cotangents"] = [found["states"]]
    p = matrix_gradients.fit(p)
    results = matrix_gradients.gradients(op + "_gradients", p, arrays, {"q": q, "k": k, "v": v})
    cotangents = {name: results[name][:, :length] for name in ("q", "k", "v")}
    cotangents["initial_state"] = found["final"]
    if beta is not None:
        cotangents["beta"] = _by_step(results["d_beta"], length).astype(beta.dtype)
    if log_decay is not None:
        gradient = _decay_gradient(arrays, results)
        cotangents["log_decay"] = _by_step(gradient, length).astype(log_decay.dtype)
    return cotangents


def _by_step(x: jax.Array, length: int) -> jax.Array:
    """Invert `_by_head`."""
    return jnp.moveaxis(x, 1, 2)[:, :length]


def _decay_gradient(arrays: Arrays, results: dict[str, jax.Array]) -> jax.Array:
    """Return the cotangents of the logarithms [B, H, chunks * 64].

    The logarithm of step i is in the sums up to t >= i, and in the sums after j < i.
    """
    [logs], [upto] = arrays["log_decay"], arrays["upto"]
    names = ("d_reads", "d_writes", "d_spans")
    chunked = (*logs.shape[:2], -1, CHUNK)
    reads, writes, spans = (results[name].reshape(chunked) for name in names)
    states, cotangents = (
        jnp.sum(arrays[name][0].astype(jnp.float32), axis=3) for name in ("states", "cotangents")
    )
    last = upto.reshape(chunked)[..., -1] * jnp.sum(states * cotangents, axis=(-2, -1))
    before = jnp.pad(writes[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    total = spans + last[..., None] + lax.cumsum(reads, axis=3, reverse=True)
    total = total + jnp.cumsum(before, axis=-1)
    return jnp.where(logs <= LOG_ZERO, 0.0, total.reshape(logs.shape))
