"""How the kernels of matrix-state recurrences walk over time, on TPU.

The grid is (batch, groups of heads, chunks), chunks innermost and one after the other. A block is
[1, C, heads, K] of the arrays as they come, and may stand over their ends.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import array_like, pl, pltpu
from pallas_kernels.tpu.chunk_math import Numerics, chunk_steps
from pallas_kernels.tpu.head_layout import flat_scratch
from pallas_kernels.tpu.matrix_kernel import Core, Plan, backward_kernel, forward_kernel

GROUP = 8  # heads in a block, the sublanes of a tile
VMEM = 64 * 2**20


def _plan(core: Core, arrays: dict[str, Any], scale: float, chunk_size: int | None) -> Plan:
    q, k, v, g = (arrays[name] for name in ("q", "k", "v", "log_decay"))
    length, heads = q.shape[1:3]
    wide = jnp.float64 in (x.dtype for x in arrays.values() if x is not None)
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    block = min(heads, GROUP)
    return Plan(
        core=core,
        num=Numerics(jnp.dtype(jnp.float64 if wide else jnp.float32), narrow),
        chunk=chunk_steps(q, k, v, arrays["beta"], g, wanted=chunk_size),
        heads=block,
        groups=-(-heads // block),
        length=length,
        decay=None if g is None else "scalar" if g.ndim == 3 else "channel",
        reset=arrays["reset"] is not None,
        beta=arrays["beta"] is not None,
        scale=scale,
    )


def _specs(p: Plan, K: int, V: int) -> dict[str, pl.BlockSpec]:
    """The blocks of arrays [B, T, H, F], [B, T, H], states and resets."""
    at = (lambda t: p.chunks - 1 - t) if p.back else (lambda t: t)
    C, H = p.chunk, p.heads
    return {
        "K": pl.BlockSpec((1, C, H, K), lambda b, h, t: (b, at(t), h, 0)),
        "V": pl.BlockSpec((1, C, H, V), lambda b, h, t: (b, at(t), h, 0)),
        "H": pl.BlockSpec((1, 1, C, H), lambda b, h, t: (b, h, at(t), 0)),
        "reset": pl.BlockSpec((1, C, 1), lambda b, h, t: (b, at(t), 0)),
        "state": pl.BlockSpec((1, H, K, V), lambda b, h, t: (b, h, 0, 0)),
        "states": pl.BlockSpec((1, 1, H, K, V), lambda b, h, t: (b, at(t), h, 0, 0)),
    }


def _by_group(x: jax.Array, p: Plan) -> jax.Array:
    """[B, T, H] -> [B, groups, T, heads of a group]: for one group, no more than a new shape."""
    batch, length, heads = x.shape
    if p.groups == 1:
        return x[:, None]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, p.groups * p.heads - heads)])
    return jnp.moveaxis(x.reshape(batch, length, p.groups, p.heads), 2, 1)


def _by_time(x: jax.Array, p: Plan, heads: int) -> jax.Array:
    """The inverse of `_by_group`."""
    if p.groups == 1:
        return x[:, 0]
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], -1)[:, :, :heads]


def _call(
    p: Plan, kernel: Any, inputs: dict[str, Any], outputs: dict[str, Any], interpret: bool
) -> tuple[jax.Array, ...]:
    """Run a kernel on arrays by name; `inputs` and `outputs` have (kind of block, array)."""
    K, V = inputs["q"][1].shape[-1], inputs["v"][1].shape[-1]
    specs, num, C, H = _specs(p, K, V), p.num, p.chunk, p.heads
    scratch: dict[str, Any] = {
        name + "_s": ((H, C, size), inputs[name][1].dtype)
        for name, size in (("q", K), ("k", K), ("v", V))
    }
    scratch |= {"state_s": ((H, K, V), num.dtype), "marks_s": ((4, C, H), num.dtype)}
    if p.back:
        scratch |= {"do_s": ((H, C, V), inputs["do"][1].dtype), "ct_s": ((H, K, V), num.dtype)}
    else:
        scratch["o_s"] = ((H, C, V), outputs["o"][1].dtype)
    if p.beta:
        scratch["beta_s"] = ((C, H), num.dtype)
    if p.marked:
        scratch["g_s"] = ((C, H if p.decay else 1), num.dtype)
    if p.decay == "channel":
        scratch["g_s"] = ((H, C, K), num.dtype)
        if p.reset:
            scratch["cut_s"] = ((C, 1), num.dtype)
    flat = flat_scratch(C, H, [K, V])
    if flat is not None:
        scratch["flat_s"] = (flat, jnp.uint32)
    p = p._replace(flat=flat is not None)
    batch = inputs["q"][1].shape[0]
    return pl.pallas_call(
        functools.partial(kernel, p, [*inputs, *outputs, *scratch]),
        grid=(batch, p.groups, p.chunks),
        in_specs=[specs[kind] for kind, _ in inputs.values()],
        out_specs=[specs[kind] for kind, _ in outputs.values()],
        out_shape=[shape for _, shape in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name=p.core.name + ("_backward" if p.back else "_forward"),
    )(*(x for _, x in inputs.values()))


def _inputs(p: Plan, arrays: dict[str, Any]) -> dict[str, Any]:
    made = {name: ("V" if name == "v" else "K", arrays[name]) for name in ("q", "k", "v")}
    if p.beta:
        made["beta"] = ("H", _by_group(arrays["beta"], p))
    if p.decay == "scalar":
        made["g"] = ("H", _by_group(arrays["log_decay"], p))
    if p.decay == "channel":
        made["g"] = ("K", arrays["log_decay"])
    if p.reset:
        made["reset"] = ("reset", arrays["reset"][..., None].astype(jnp.int32))
    return made


def _named(*arrays: Any) -> dict[str, Any]:
    return dict(zip(("q", "k", "v", "beta", "log_decay", "reset"), arrays, strict=True))


def forward(
    core: Core,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    reset: jax.Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
    states: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Outputs and final state, and with `states` those that enter the chunks.

    Args:
      core: the recurrence.
      q, k: [B, T, H, K], float32 or bfloat16; float64 in interpret mode.
      v: [B, T, H, V].
      beta: [B, T, H], or None if the recurrence has none.
      log_decay: None, [B, T, H] or [B, T, H, K].
      initial_state: [B, H, K, V], float32 (float64 if any array is).
      reset: [B, T] bool or None.
      scale: of the outputs.
      chunk_size: C, rounded up to a power of two, at least 8 (bfloat16: 16); if None
        see `_chunk.chunk_steps`.
      states: whether to return the states [B, T / C, H, K, V] too.
      interpret: run it on the host, operation by operation.

    Returns:
      (o [B, T, H, V] in the dtype of v, final state, and the states if wanted).
    """
    arrays = _named(q, k, v, beta, log_decay, reset)
    p = _plan(core, arrays | {"initial": initial_state}, scale, chunk_size)._replace(states=states)
    inputs = _inputs(p, arrays) | {"initial": ("state", initial_state)}
    shape = array_like(q, initial_state.shape, p.num.dtype)
    outputs = {"o": ("V", array_like(q, v.shape, v.dtype)), "final": ("state", shape)}
    if states:
        batch, *rest = initial_state.shape
        every = array_like(q, (batch, p.chunks, *rest), p.num.dtype)
        outputs["states"] = ("states", every)
    return tuple(_call(p, forward_kernel, inputs, outputs, interpret))


def backward(
    core: Core,
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
    chunk_size: int | None = None,
    interpret: bool = False,
) -> dict[str, jax.Array]:
    """The cotangents of q, k, v, beta, log_decay (where given) and initial_state, by name.

    Args as `forward`; `states` as it returns them with the same `chunk_size`, `d_out` and
    `d_final` the cotangents of its outputs and of its final state.
    """
    arrays = _named(q, k, v, beta, log_decay, reset)
    p = _plan(core, arrays | {"initial": states}, scale, chunk_size)._replace(back=True)
    inputs = _inputs(p, arrays) | {
        "states": ("states", states),
        "do": ("V", d_out),
        "d_final": ("state", d_final),
    }
    outputs = {}
    for name in ("q", "k", "v"):
        x = arrays[name]
        outputs["d" + name] = ("V" if name == "v" else "K", array_like(q, x.shape, x.dtype))
    for name in ("beta", "g"):
        if name in inputs:
            kind, x = inputs[name]
            outputs["d_" + name] = (kind, array_like(q, x.shape, x.dtype))
    outputs["d_initial"] = ("state", array_like(q, d_final.shape, p.num.dtype))
    made = dict(zip(outputs, _call(p, backward_kernel, inputs, outputs, interpret), strict=True))
    heads = q.shape[2]
    found = {name: made["d" + name] for name in ("q", "k", "v")}
    if p.beta:
        found["beta"] = _by_time(made["d_beta"], p, heads)
    if p.decay is not None:
        d_g = made["d_g"]
        found["log_decay"] = _by_time(d_g, p, heads) if p.decay == "scalar" else d_g
    return found | {"initial_state": made["d_initial"]}
