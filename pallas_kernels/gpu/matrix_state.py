"""Matrix-state recurrences on GPU: linear attention and the delta rule.

With D_{t,j} the decays of the steps after j and up to t, and S the state before a chunk of C steps,

    u_t = v_t                                                        linear attention
    U   = (I + N)^-1 beta (V - D K S)                                delta rule
    o_t = scale * (D_{t,0} q_t S + sum_{j <= t} scores_{t,j} u_j)
    S'  = D_{C,0} S + sum_j D_{C,j} k_j u_j^T

The generalized delta rule, S_t = D_t S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, has U = V and

    Z   = (I - N)^-1 (D_{t-1,0} A S + M V)                           z_t = S_{t-1}^T a_t
    o_t = (...) + scale * sum_{j <= t} b_scores_{t,j} z_j
    S'  = (...) + sum_j D_{C,j} b_j z_j^T

with M the copies, a_t^T D_{t-1,j} k_j for j < t, and N the same with b_j. Z is stored as "written".
`matrix_pairs`, or `matrix_channels` for decays per channel, computes scores and inverses of all
chunks in parallel, and `matrix_pass` carries the state. One pass would compute both between two
updates of the state. The inverse alone is ten products, each of which depends on the previous one,
and with few heads most of the chip would wait. The algebra is that of the TPU kernels,
`linear_attention/tpu.py` and `delta_rule/tpu.py`. The kernels require Hopper.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import matrix_blocks, matrix_decays, matrix_gradients, matrix_pass
from pallas_kernels.gpu import matrix_products as mp
from pallas_kernels.gpu.matrix_blocks import Arrays, Variant, by_head, by_step
from pallas_kernels.gpu.matrix_channels import channels
from pallas_kernels.gpu.matrix_pairs import LOG_PIECES, LOG_ZERO, pairs
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
      op: name of the op. With `beta` it is the delta rule, with `vectors` the generalized one.
      q, k: [B, T, G, K], float32 or bfloat16. G divides H.
      v: [B, T, H, V].
      beta: [B, T, H] or None.
      log_decay: None, [B, T, H] or [B, T, H, K].
      initial_state: [B, H, K, V] in float32.
      reset: [B, T] bool or None.
      scale: factor of the outputs.
      vectors: "a" and "b" of the generalized delta rule, [B, T, H, K], else {} or None. Then G is
        H. "a" is zero where `reset` is true.
      chunk_size: 64 or None.
      states: no effect: the backward pass has no residuals.
      interpret: run in interpret mode, without a GPU. This is slow.

    Returns:
      (o [B, T, H, V] in the dtype of v, final state).

    Raises:
      NotImplementedError: if the kernel does not support the call.
    """
    del states
    _check(op, q, k, v, initial_state, vectors, chunk_size)
    length = q.shape[1]
    p, arrays = _prepare(q, k, v, beta, log_decay, reset, vectors, scale, interpret)
    out_like = _pad_steps(v)
    arrays |= _of_pairs(p, arrays, initial_state)
    timed = _of_pass(p, arrays, "q", "k_write", "v", "scores")
    p = _fit(op, p, timed, v.dtype.itemsize)
    found = matrix_pass.run(op, p, timed, initial_state, _with_outputs, out_like=out_like)
    return found["out"][0][:, :length], found["final"][0]


def _of_pairs(p: Variant, arrays: Arrays, state: jax.Array) -> Arrays:
    compute = channels if p.channel else pairs
    return compute(p, arrays, state.shape[:2])


def _of_pass(p: Variant, arrays: Arrays, *names: str) -> Arrays:
    """Return the inputs of a pass by name: those given, and those that the variant has.

    With decays per channel, queries and keys are the rows with their decays in the chunk. Without
    them, the keys that read and write are the same.
    """
    names += ("k_read", "beta", "inverse") if p.delta else ()
    names += ("a_read", "b_write", "copies", "inverse") if p.vectors else ()
    names += ("b_scores",) if p.vectors and "scores" in names else ()
    decayed = {"q": "q_read"} if p.channel else {"k_read": "k", "k_write": "k"}
    names = tuple(decayed.get(name, name) for name in names)
    names += tuple(name for name in ("upto", "after", "carry") if name in arrays)
    return {name: arrays[name] for name in names}


def _write_values(c: Chunk) -> tuple[list[Any], Any]:
    """Return the values U or Z of a chunk in shared memory, and in registers if used there."""
    x = c.x
    value: Any = None
    if c.p.vectors:
        read = c.decayed("upto", mp.product(c.p.num, x["a_read"], c.state))
        right = c.write(mp.product(c.p.num, x["copies"], x["v"], read))
        value = mp.product(c.p.num, x["inverse"], right)
        return c.write(value), value
    if c.p.delta or c.p.decay:
        value = mp.joined(x["v"])
    if not c.p.delta:
        return x["v"], value
    missing = value - c.decayed("upto", mp.product(c.p.num, c.k_read, c.state))
    right = c.write(mp.by_row(x["beta"][0], missing.shape) * missing)
    value = mp.product(c.p.num, x["inverse"], right)
    return c.write(value), value


def _next_state(c: Chunk, state: jax.Array, written: list[Any], value: Any) -> jax.Array:
    carried = c.carried(state)
    if c.p.vectors:
        carried = mp.product(c.p.num, mp.transposed(c.x["b_write"]), written, carried)
        written = c.x["v"]
    if c.p.decay:
        written = c.write(c.decayed("after", value))
    return mp.product(c.p.num, mp.transposed(c.k_write), written, carried)


def _with_outputs(c: Chunk, state: jax.Array) -> jax.Array:
    num, x = c.p.num, c.x
    written, value = _write_values(c)
    out = c.decayed("upto", mp.product(num, c.q_read, c.state[: num.inputs]))
    if c.p.vectors:
        out = mp.product(num, x["b_scores"], written, out)
    values = x["v"] if c.p.vectors else written
    c.send(c.p.scale * mp.product(num, x["scores"], values, out))
    return _next_state(c, state, written, value)


def _without_outputs(c: Chunk, state: jax.Array) -> jax.Array:
    written, value = _write_values(c)
    if c.p.solved:
        c.keep(value)
    return _next_state(c, state, written, value)


def _in_reverse(c: Chunk, cotangent: jax.Array) -> jax.Array:
    """Return the cotangent of the state before a chunk from that of the state after it.

    dU = scores^T do + D K F                               do = scale * d_out
    dR = (I + N)^-T dU,     dV = beta dR                   delta rule, else dV = dU
    F' = D_{C,0} F + sum_t D_{t,0} (q_t do_t^T - k_t dv_t^T)     dv_t for the delta rule only

    For the generalized delta rule, dR = (I - N)^-T (scale b_scores^T do + D B F) adds M^T dR to dV,
    and A^T D dR to F' in place of the keys.
    """
    num, x = c.p.num, c.x
    own = mp.product(num, mp.transposed(x["scores"]), x["d_out"])
    du = c.p.scale * own + c.decayed("after", mp.product(num, c.k_write, c.state))
    carried = c.carried(cotangent)
    if c.p.vectors:
        dz = c.p.scale * mp.product(num, mp.transposed(x["b_scores"]), x["d_out"])
        dz = dz + mp.product(num, x["b_write"], c.state)
        dr = mp.product(num, mp.transposed(x["inverse"]), c.write(dz))
        c.keep(dr)
        right = c.write(dr)
        c.send(mp.product(num, mp.transposed(x["copies"]), right, du))
        right = c.write(c.decayed("upto", dr))
        carried = mp.product(num, mp.transposed(x["a_read"]), right, carried)
    elif c.p.delta:
        dr = mp.product(num, mp.transposed(x["inverse"]), c.write(du))
        c.keep(dr)
        dv = mp.by_row(x["beta"][0], dr.shape) * dr
        c.send(dv)
        right = c.write(-c.decayed("upto", dv))
        carried = mp.product(num, mp.transposed(c.k_read), right, carried)
    else:
        c.send(du)
    d_out = c.p.scale * mp.joined(x["d_out"])
    right = c.write(c.decayed("upto", d_out), num.inputs)
    return mp.product(num, mp.transposed(c.q_read), right, carried)


def _prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    log_decay: jax.Array | None,
    reset: jax.Array | None,
    vectors: dict[str, jax.Array] | None,
    scale: float,
    interpret: bool,
) -> tuple[Variant, Arrays]:
    """Return the variant, and the arrays by name in the layout of blocks."""
    batch, length, heads, _ = v.shape
    vectors = vectors or {}
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v, *vectors.values()))
    channel = bool(vectors) or (log_decay is not None and log_decay.ndim == 4)
    if channel and (log_decay is None or log_decay.ndim == 3):
        logs = jnp.zeros(k.shape, jnp.float32)
        log_decay = logs if log_decay is None else logs + log_decay[..., None]
    chunks = -(-length // CHUNK)
    p = Variant(
        num=Numerics(1, 2, 128, interpret) if narrow else Numerics(3, 3, 128, interpret),
        group=heads // q.shape[2],
        keys=k.shape[-1],
        columns=64,
        chunks=chunks,
        scale=scale,
        decay=not channel and (log_decay is not None or reset is not None),
        channel=channel,
        delta=beta is not None,
        vectors=bool(vectors),
    )
    arrays: Arrays = {
        name: mp.split(_pad_steps(x), p.num.inputs)
        for name, x in {"q": q, "k": k, "v": v, **vectors}.items()
    }
    if beta is not None:
        arrays["beta"] = [by_head(beta.astype(jnp.float32), chunks)]
    if p.channel:
        logs = matrix_decays.logarithms(log_decay, reset, k.shape)
        arrays |= {
            "logs": mp.split(_pad_steps(logs), LOG_PIECES),
            "carry": [matrix_decays.carry(logs, chunks)],
        }
        if reset is not None:  # the rows are zero after a reset; this mask also stops NaN
            cleared = jnp.broadcast_to(reset[..., None], v.shape[:3]).astype(jnp.float32)
            arrays["upto"] = [matrix_decays.sums(LOG_ZERO * by_head(cleared, chunks))[0]]
    if p.decay:
        logs = by_head(matrix_decays.logarithms(log_decay, reset, (batch, length, heads)), chunks)
        upto, after = matrix_decays.sums(logs)
        arrays |= {"log_decay": [logs], "upto": [upto], "after": [after]}
    return p, arrays


def _check(
    op: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array,
    vectors: dict[str, jax.Array] | None,
    chunk_size: int | None,
) -> None:
    """Raise NotImplementedError if the kernel does not support a call."""
    hint = "use implementation='xla' or None."
    wide = [x.dtype for x in (q, k, v, *(vectors or {}).values()) if x.dtype != jnp.bfloat16]
    if vectors and wide:
        raise NotImplementedError(
            f"{op}: the GPU kernel must have bfloat16 inputs, because blocks of float32 numbers do"
            f" not fit the shared memory, got {wide[0]}; cast them, or {hint}"
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


def _fit(op: str, p: Variant, timed: Arrays, out_bytes: int) -> Variant:
    """Choose the columns and the prefetch depth of a pass that fit the shared memory.

    Raises:
      NotImplementedError: if there are none.
    """
    for columns, depth in ((64, 2), (64, 1), (32, 1)):
        p = p.tiled(columns, depth)
        own = 2 * p.computed * columns * (p.keys + CHUNK)
        outputs = OUTPUT_SLOTS * CHUNK * columns * out_bytes
        if depth * matrix_blocks.nbytes(p, timed) + own + outputs <= SMEM_WHOLE:
            return p
    raise NotImplementedError(
        f"{op}: with decays per channel in float32, the GPU kernel must have keys of 64 numbers,"
        f" got {p.keys}; use bfloat16, or implementation='xla' or None."
    )


def _pad_steps(x: jax.Array) -> jax.Array:
    count = -x.shape[1] % ROW_UNIT
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x


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
    _check(op, q, k, v, initial_state, vectors, chunk_size)
    length = q.shape[1]
    vectors = vectors or {}
    p, arrays = _prepare(q, k, v, beta, log_decay, reset, vectors, scale, interpret)
    arrays["d_out"] = mp.split(_pad_steps(d_out.astype(v.dtype)), p.num.inputs)
    arrays |= _of_pairs(p, arrays, initial_state)
    timed = _of_pass(p, arrays, "k_write", "v")
    kept = "written" if p.solved else None
    found = matrix_pass.run(
        op + "_states",
        _fit(op, p, timed, 0),
        timed,
        initial_state,
        _without_outputs,
        kept=kept,
        states=True,
    )
    arrays |= {name: found[name] for name in ("states", kept) if name}
    timed = _of_pass(p, arrays, "q", "k_write", "scores", "d_out")
    found = matrix_pass.run(
        op + "_cotangents",
        _fit(op, p, timed, v.dtype.itemsize),
        timed,
        d_final,
        _in_reverse,
        out_like=_pad_steps(v),
        kept="d_right" if p.solved else None,
        states=True,
        reverse=True,
    )
    arrays["cotangents"] = found["states"]
    results = {"initial_state": found["final"][0], "v": found["out"][0][:, :length]}
    if p.solved:
        arrays["d_right"] = found["d_right"]
    like = {"q": q, "k": k, **vectors}
    sums = matrix_gradients.gradients(op + "_gradients", p, arrays, like)
    results |= {name: sums[name][:, :length] for name in like}
    if beta is not None:
        right = matrix_blocks.total(found["d_right"])[:, :length]
        d_beta = jnp.sum(right * v.astype(jnp.float32), axis=-1)
        results["beta"] = (d_beta + by_step(sums["d_beta"], length)).astype(beta.dtype)
    if log_decay is not None:
        gradient = matrix_gradients.decay_gradient(p, arrays, sums, length)
        if gradient.ndim > log_decay.ndim:  # of decays per head, computed per channel
            gradient = jnp.sum(gradient, axis=-1)
        results["log_decay"] = gradient.astype(log_decay.dtype)
    return results
