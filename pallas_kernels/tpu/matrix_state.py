"""Calls of the kernels of matrix-state recurrences on TPU: blocks, grid and scratch.

The grid is (batch, blocks of heads, chunks), with chunks innermost and in order. A block is
[1, C, heads, K] of an array in the user's layout [B, T, H, K], and may have a ragged edge.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import array_like, pl, pltpu
from pallas_kernels.tpu.chunk_math import chunk_steps
from pallas_kernels.tpu.head_layout import flat_scratch
from pallas_kernels.tpu.matrix_kernel import backward_kernel, forward_kernel
from pallas_kernels.tpu.numerics import Numerics
from pallas_kernels.tpu.variant import ChunkRecurrence, Refs, Variant

BLOCK_HEADS = 8  # heads in a block by default, the sublanes of a tile
VMEM_BYTES = 64 * 2**20

Blocks = dict[str, tuple[str, Any]]  # by name, (kind of block in `_specs`, array or its type)


def _variant(
    recurrence: ChunkRecurrence,
    arrays: dict[str, Any],
    scale: float,
    chunk_size: int | None,
    block_heads: int | None,
    normalize: bool,
) -> Variant:
    q, k, v, g = (arrays[name] for name in ("q", "k", "v", "log_decay"))
    length, heads = q.shape[1:3]
    float64 = jnp.float64 in (x.dtype for x in arrays.values() if x is not None)
    vectors = tuple(name for name in ("a", "b") if name in arrays)
    factors = (q, k, v, *(arrays[name] for name in vectors))
    bfloat16 = all(x.dtype == jnp.bfloat16 for x in factors)
    block_heads = min(heads, block_heads or BLOCK_HEADS)
    return Variant(
        recurrence=recurrence,
        num=Numerics(jnp.dtype(jnp.float64 if float64 else jnp.float32), bfloat16),
        chunk=chunk_steps(
            q, k, v, arrays["beta"], g, *(arrays[name] for name in vectors), wanted=chunk_size
        ),
        heads=block_heads,
        head_blocks=-(-heads // block_heads),
        length=length,
        decay=None if g is None else "scalar" if g.ndim == 3 else "channel",
        reset=arrays["reset"] is not None,
        beta=arrays["beta"] is not None,
        vectors=vectors,
        scale=scale,
        normalize=normalize,
        gate="rate" in arrays,
    )


def _specs(p: Variant, K: int, V: int) -> dict[str, pl.BlockSpec]:
    """Return the block specs of arrays [B, T, H, F], [B, T, H], of states and of resets."""
    at = (lambda t: p.chunks - 1 - t) if p.backward else (lambda t: t)
    C, H = p.chunk, p.heads
    row = (H, K) if p.decay == "channel" else (1, H)
    return {
        "K": pl.BlockSpec((1, C, H, K), lambda b, h, t: (b, at(t), h, 0)),
        "V": pl.BlockSpec((1, C, H, V), lambda b, h, t: (b, at(t), h, 0)),
        "H": pl.BlockSpec((1, 1, C, H), lambda b, h, t: (b, h, at(t), 0)),
        "reset": pl.BlockSpec((1, C, 1), lambda b, h, t: (b, at(t), 0)),
        "gate": pl.BlockSpec((1, *row), lambda b, h, t: (h, 0, 0)),
        "gate_sum": pl.BlockSpec((1, 1, *row), lambda b, h, t: (b, h, 0, 0)),
        "state": pl.BlockSpec((1, H, K, V), lambda b, h, t: (b, h, 0, 0)),
        "states": pl.BlockSpec((1, 1, H, K, V), lambda b, h, t: (b, at(t), h, 0, 0)),
    }


def _split_head_blocks(x: jax.Array, p: Variant) -> jax.Array:
    """Convert [B, T, H] to [B, head blocks, T, heads]; only a reshape if there is one block."""
    batch, length, heads = x.shape
    if p.head_blocks == 1:
        return x[:, None]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, p.head_blocks * p.heads - heads)])
    return jnp.moveaxis(x.reshape(batch, length, p.head_blocks, p.heads), 2, 1)


def _join_head_blocks(x: jax.Array, p: Variant, heads: int) -> jax.Array:
    """Invert `_split_head_blocks`."""
    if p.head_blocks == 1:
        return x[:, 0]
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], -1)[:, :, :heads]


def _gate_blocks(x: jax.Array, p: Variant) -> jax.Array:
    """Convert [H, K] or [H] to [head blocks, heads, K] or [head blocks, 1, heads]."""
    x = jnp.pad(x, [(0, p.head_blocks * p.heads - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    row = (p.heads, *x.shape[1:]) if p.decay == "channel" else (1, p.heads)
    return x.reshape(p.head_blocks, *row)


def _call(
    p: Variant,
    kernel: Callable[[Variant, Refs], None],
    inputs: Blocks,
    outputs: Blocks,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Run a kernel on arrays by name."""
    K, V = inputs["q"][1].shape[-1], inputs["v"][1].shape[-1]
    specs, num, C, H = _specs(p, K, V), p.num, p.chunk, p.heads
    scratch: dict[str, Any] = {
        name + "_s": ((H, C, size), inputs[name][1].dtype)
        for name, size in (("q", K), ("k", K), ("v", V), *((name, K) for name in p.vectors))
    }
    scratch |= {"state_s": ((H, K, V), num.dtype), "masks_s": ((4, C, H), num.dtype)}
    if p.backward:
        scratch |= {"do_s": ((H, C, V), inputs["do"][1].dtype), "ct_s": ((H, K, V), num.dtype)}
        raw = ["q", "k"] if p.normalize else []
        raw += ["g"] if p.gate and p.decay == "channel" else []
        scratch |= {name + "_raw_s": ((H, C, K), inputs[name][1].dtype) for name in raw}
    else:
        scratch["o_s"] = ((H, C, V), outputs["o"][1].dtype)
    if p.beta:
        scratch["beta_s"] = ((C, H), num.dtype)
    if p.head_logs:
        scratch["g_s"] = ((C, H if p.decay else 1), num.dtype)
    if p.decay == "channel":
        scratch["g_s"] = ((H, C, K), num.dtype)
        if p.reset:
            scratch["reset_s"] = ((C, 1), num.dtype)
    flat = flat_scratch(C, H, [K, V])
    if flat is not None:
        scratch["flat_s"] = (flat, jnp.uint32)
    names = [*inputs, *outputs, *scratch]

    def body(*refs: Any) -> None:
        kernel(p, Refs(**dict(zip(names, refs, strict=True))))

    batch = inputs["q"][1].shape[0]
    return pl.pallas_call(
        body,
        grid=(batch, p.head_blocks, p.chunks),
        in_specs=[specs[kind] for kind, _ in inputs.values()],
        out_specs=[specs[kind] for kind, _ in outputs.values()],
        out_shape=[shape for _, shape in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=p.recurrence.name + ("_backward" if p.backward else "_forward"),
    )(*(x for _, x in inputs.values()))


def _inputs(p: Variant, arrays: dict[str, Any]) -> Blocks:
    names = ("q", "k", "v", *p.vectors)
    inputs = {name: ("V" if name == "v" else "K", arrays[name]) for name in names}
    if p.beta:
        inputs["beta"] = ("H", _split_head_blocks(arrays["beta"], p))
    if p.decay == "scalar":
        inputs["g"] = ("H", _split_head_blocks(arrays["log_decay"], p))
    if p.decay == "channel":
        inputs["g"] = ("K", arrays["log_decay"])
    if p.gate:
        for name in ("rate", "bias"):
            inputs[name] = ("gate", _gate_blocks(arrays[name].astype(p.num.dtype), p))
    if p.reset:
        inputs["reset"] = ("reset", arrays["reset"][..., None].astype(jnp.int32))
    return inputs


def _by_name(
    vectors: dict[str, Any] | None, gate: tuple[Any, Any] | None, *arrays: Any
) -> dict[str, Any]:
    names = ("q", "k", "v", "beta", "log_decay", "reset")
    named = dict(zip(names, arrays, strict=True)) | (vectors or {})
    return named if gate is None else named | dict(zip(("rate", "bias"), gate, strict=True))


def forward(
    recurrence: ChunkRecurrence,
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
    normalize: bool = False,
    gate: tuple[jax.Array, jax.Array] | None = None,
    chunk_size: int | None = None,
    block_heads: int | None = None,
    states: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Compute outputs and final state, and with `states` the states before the chunks.

    Args:
      recurrence: the recurrence.
      q, k: [B, T, H, K], float32 or bfloat16; float64 in interpret mode.
      v: [B, T, H, V].
      beta: [B, T, H], or None if the recurrence has no beta.
      log_decay: None, [B, T, H] or [B, T, H, K]; with `gate` the input of the gate.
      initial_state: [B, H, K, V], float32 (float64 if any array is).
      reset: [B, T] bool or None.
      scale: factor of the outputs.
      vectors: `a` and `b` [B, T, H, K] by name, for the recurrence that has them.
      normalize: whether to divide q and k by their lengths.
      gate: None, or the rate and the bias [H] or [H, K] of the gate of the decays.
      chunk_size: C, rounded up to a power of two, at least 8 (bfloat16: 16). By default
        `chunk_steps` chooses it.
      block_heads: heads in a block, a multiple of 8 or H; by default 8.
      states: whether to return the residuals of `backward`.
      interpret: run in interpret mode, without a TPU. This is slow.

    Returns:
      (o [B, T, H, V] in the dtype of v, final state, and with `states` the states before the
      chunks [B, T / C, H, K, V]).
    """
    arrays = _by_name(vectors, gate, q, k, v, beta, log_decay, reset)
    p = _variant(
        recurrence, arrays | {"initial": initial_state}, scale, chunk_size, block_heads, normalize
    )
    p = p._replace(save_states=states)
    inputs = _inputs(p, arrays) | {"initial": ("state", initial_state)}
    shape = array_like(q, initial_state.shape, p.num.dtype)
    outputs = {"o": ("V", array_like(q, v.shape, v.dtype)), "final": ("state", shape)}
    if states:
        batch, *rest = initial_state.shape
        saved = array_like(q, (batch, p.chunks, *rest), p.num.dtype)
        outputs["states"] = ("states", saved)
    return tuple(_call(p, forward_kernel, inputs, outputs, interpret))


def backward(
    recurrence: ChunkRecurrence,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    log_decay: jax.Array | None,
    states: jax.Array,
    reset: jax.Array | None,
    d_out: jax.Array,
    d_final: jax.Array,
    *,
    scale: float,
    vectors: dict[str, jax.Array] | None = None,
    normalize: bool = False,
    gate: tuple[jax.Array, jax.Array] | None = None,
    chunk_size: int | None = None,
    block_heads: int | None = None,
    interpret: bool = False,
) -> dict[str, jax.Array]:
    """Compute the cotangents of all arrays but `reset`, by name.

    Args as for `forward`. `states` are its residuals for the same `chunk_size`. `d_out` and
    `d_final` are the cotangents of its outputs and of its final state.
    """
    arrays = _by_name(vectors, gate, q, k, v, beta, log_decay, reset)
    p = _variant(
        recurrence, arrays | {"initial": states}, scale, chunk_size, block_heads, normalize
    )
    p = p._replace(backward=True)
    inputs = _inputs(p, arrays) | {
        "states": ("states", states),
        "do": ("V", d_out),
        "d_final": ("state", d_final),
    }
    outputs = {}
    for name in ("q", "k", "v", *p.vectors):
        x = arrays[name]
        outputs["d" + name] = ("V" if name == "v" else "K", array_like(q, x.shape, x.dtype))
    for name in ("beta", "g"):
        if name in inputs:
            kind, x = inputs[name]
            outputs["d_" + name] = (kind, array_like(q, x.shape, x.dtype))
    for name in ("rate", "bias") if p.gate else ():
        sums = array_like(q, (q.shape[0], *inputs[name][1].shape), p.num.dtype)
        outputs["d_" + name] = ("gate_sum", sums)
    outputs["d_initial"] = ("state", array_like(q, d_final.shape, p.num.dtype))
    results = dict(zip(outputs, _call(p, backward_kernel, inputs, outputs, interpret), strict=True))
    heads = q.shape[2]
    cotangents = {name: results["d" + name] for name in ("q", "k", "v", *p.vectors)}
    if p.beta:
        cotangents["beta"] = _join_head_blocks(results["d_beta"], p, heads)
    if p.decay is not None:
        d_g = results["d_g"]
        cotangents["log_decay"] = _join_head_blocks(d_g, p, heads) if p.decay == "scalar" else d_g
    for name in ("rate", "bias") if p.gate else ():
        total = jnp.sum(results["d_" + name], axis=0)
        shape = arrays["log_decay"].shape[2:]
        cotangents[name] = total.reshape(-1, *shape[1:])[:heads]
    return cotangents | {"initial_state": results["d_initial"]}
