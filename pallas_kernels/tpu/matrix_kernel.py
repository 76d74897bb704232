"""Kernel bodies of matrix-state recurrences on TPU, for a block of steps and heads.

The state stays in VMEM from one block to the next. Heads are copied to scratch [heads, C, K], so
that each is a matrix. The products of all heads of a block are interleaved, which hides the latency
of small products.

A non-finite number must not enter a product, where it would reach every step of the chunk. A chunk
with such numbers, or with a ragged edge, is repaired first. Repair sets the inputs of these steps
to zero. Afterwards it sets to NaN the outputs and states that depend on them, up to the next reset.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import pl
from pallas_kernels.tpu import chunk_math
from pallas_kernels.tpu.chunk_math import LOG_ZERO
from pallas_kernels.tpu.head_layout import join_heads, split_heads
from pallas_kernels.tpu.numerics import TN, Numerics, column_indices, row_indices

# Indices of the masks in `Refs.masks_s`, all of steps in bounds.
WRITES, READS, NAN_OUTPUTS, REACHED = range(4)


class ChunkRecurrence(NamedTuple):
    """A recurrence: its name, and the forward and adjoint computation of a chunk of all heads."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Variant(NamedTuple):
    """Specialization of a kernel.

    Attributes:
      recurrence: the recurrence.
      num: accuracy of products.
      chunk: steps in a chunk.
      heads: heads in a block.
      head_blocks: number of blocks of heads.
      length: T.
      decay: None, "scalar" (per head) or "channel".
      reset: whether there are resets.
      beta: whether there is a `beta`.
      vectors: names of further inputs [B, T, H, K], `a` and `b` of the generalized delta rule.
      scale: factor of the outputs.
      save_states: whether the forward kernel returns the state before each chunk.
      backward: whether this is the backward kernel.
    """

    recurrence: ChunkRecurrence
    num: Numerics
    chunk: int
    heads: int
    head_blocks: int
    length: int
    decay: str | None
    reset: bool
    beta: bool
    vectors: tuple[str, ...]
    scale: float
    save_states: bool = False
    backward: bool = False

    @property
    def chunks(self) -> int:
        """Number of chunks of time."""
        return -(-self.length // self.chunk)

    @property
    def head_logs(self) -> bool:
        """Flag for logarithms per head: of decays, or of resets alone."""
        return self.decay == "scalar" or (self.reset and self.decay is None)


@dataclasses.dataclass(frozen=True)
class Refs:
    """References of a kernel; None for an absent array. Names in `_s` are scratch.

    Attributes:
      q, k, v, a, b, beta, g, reset, initial: blocks of the inputs; `g` is the logarithm of the
        decay.
      o, final: blocks of the forward outputs.
      states: states before the chunks, an output of the forward and an input of the backward pass.
      do, d_final: blocks of the cotangents of the outputs.
      dq, dk, dv, da, db, d_beta, d_g, d_initial: blocks of the cotangents of the inputs.
      q_s, k_s, v_s, a_s, b_s, o_s, do_s: matrices of the heads [heads, C, K or V].
      beta_s: [C, heads].
      g_s: logarithms [C, heads or 1], or [heads, C, K] per channel.
      reset_s: [C, 1], for decays per channel.
      state_s: the carried states [heads, K, V]; in the backward pass those before the chunk.
      ct_s: the carried cotangents of the states.
      masks_s: masks of steps [4, C, heads], written by `_repair`.
      flat_s: scratch of `join_heads`.
    """

    q: Any
    k: Any
    v: Any
    q_s: Any
    k_s: Any
    v_s: Any
    state_s: Any
    masks_s: Any
    a: Any = None
    b: Any = None
    beta: Any = None
    g: Any = None
    reset: Any = None
    initial: Any = None
    o: Any = None
    final: Any = None
    states: Any = None
    do: Any = None
    d_final: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None
    da: Any = None
    db: Any = None
    d_beta: Any = None
    d_g: Any = None
    d_initial: Any = None
    a_s: Any = None
    b_s: Any = None
    o_s: Any = None
    do_s: Any = None
    beta_s: Any = None
    g_s: Any = None
    reset_s: Any = None
    ct_s: Any = None
    flat_s: Any = None

    def written(self, p: Variant) -> list[Any]:
        """Return the scratch of the inputs that a step writes: a number in them reaches states."""
        return [self.k_s, self.v_s, *(getattr(self, name + "_s") for name in p.vectors)]


def _finite(x: jax.Array) -> jax.Array:
    return x * 0 == 0


def _stage(p: Variant, r: Refs, chunk: jax.Array) -> jax.Array:
    """Split the heads, write finite logarithms, and return whether the block needs repair."""
    num, zero = p.num, jnp.zeros((), p.num.dtype)
    check = jnp.zeros((), num.dtype)  # NaN if a number is not finite
    for name in ("q", "k", "v", *p.vectors):
        check = check + split_heads(getattr(r, name), getattr(r, name + "_s"), num.dtype)
    if p.backward:
        split_heads(r.do, r.do_s, num.dtype)
    if p.decay == "channel":
        check = check + split_heads(r.g, r.g_s, num.dtype, low=LOG_ZERO)
    if p.beta:
        r.beta_s[...] = r.beta[0, 0].astype(num.dtype)
        check = check + jnp.sum(r.beta_s[...] * 0)
    if p.head_logs:
        g = jnp.zeros_like(r.g_s) if p.decay is None else r.g[0, 0].astype(num.dtype)
        g = jnp.where(g < LOG_ZERO, jnp.full_like(g, LOG_ZERO), g)
        check = check + jnp.sum(g * 0)
        r.g_s[...] = jnp.where(r.reset[0] != 0, LOG_ZERO, g) if p.reset else g
    check = check + jnp.sum(r.state_s[...] * 0)
    nonfinite = check != zero
    return nonfinite | (chunk == p.chunks - 1) if p.length % p.chunk else nonfinite


def _repair(p: Variant, r: Refs, chunk: jax.Array) -> None:
    """Zero the inputs of steps that are not finite or out of bounds; write the masks."""
    num, size = p.num, p.chunk
    in_bounds = row_indices(size, 1) + chunk * size < p.length
    head = column_indices(size, p.heads)
    bad_reads, bad_writes = (jnp.zeros((size, p.heads), num.dtype) for _ in range(2))
    for h in range(p.heads):

        def count_bad(x: jax.Array) -> jax.Array:
            bad = jnp.where(_finite(x.astype(num.dtype)), 0.0, 1.0).astype(num.dtype)
            return jnp.sum(bad, axis=1, keepdims=True)

        bad = sum((count_bad(ref[h]) for ref in r.written(p)), jnp.zeros((), num.dtype))
        bad = bad + count_bad(r.g_s[h]) if p.decay == "channel" else bad
        bad_writes = jnp.where(head == h, bad, bad_writes)
        bad_reads = jnp.where(head == h, count_bad(r.q_s[h]), bad_reads)
    if p.beta:
        bad_writes = bad_writes + jnp.where(_finite(r.beta_s[...]), 0.0, 1.0)
    if p.decay == "scalar":
        bad_writes = bad_writes + jnp.where(_finite(r.g_s[...]), 0.0, 1.0)
    bad_writes, bad_reads = ((x > 0) & in_bounds for x in (bad_writes, bad_reads))
    writes, reads = ~bad_writes & in_bounds, ~bad_reads & in_bounds
    reset = jnp.zeros((size, 1), num.dtype)
    if p.reset:
        reset = jnp.where(in_bounds & (r.reset[0] != 0), 1.0, reset)
    t, j = row_indices(size), column_indices(size)
    resets_column = num.dot(num.ones(j <= t), reset)  # resets up to each step
    resets_row = num.dot(reset, num.ones(t <= j), TN)
    same_segment = num.ones((resets_column == resets_row) & (j <= t))
    reached = num.dot(same_segment, num.ones(bad_writes)) > 0
    for h in range(p.heads):
        state = r.state_s[h]
        bad = jnp.sum(jnp.where(_finite(state), 0.0, 1.0).astype(num.dtype))
        r.state_s[h] = jnp.where(bad > 0, jnp.zeros_like(state), state)
        reached = reached | ((head == h) & (resets_column == 0) & (bad > 0))
        r.q_s[h] = _select_steps(num, reads, head == h, r.q_s[h])
        for ref in r.written(p):
            ref[h] = _select_steps(num, writes, head == h, ref[h])
        if p.decay == "channel":
            r.g_s[h] = _select_steps(num, writes, head == h, r.g_s[h])
    reached = reached & in_bounds
    nan_outputs = reached | (bad_reads & in_bounds)
    if p.backward:
        for h in range(p.heads):
            r.do_s[h] = _select_steps(num, ~nan_outputs & in_bounds, head == h, r.do_s[h])
    if p.beta:
        r.beta_s[...] = jnp.where(writes, r.beta_s[...], 0.0)
    if p.head_logs:
        width = r.g_s.shape[1]
        g = jnp.where(writes[:, :width], r.g_s[...], 0.0)
        r.g_s[...] = jnp.where(reset > 0, LOG_ZERO, g)
    masks = {WRITES: writes, READS: reads, NAN_OUTPUTS: nan_outputs, REACHED: reached}
    for n, mask in masks.items():
        r.masks_s[n] = jnp.where(mask, 1.0, 0.0).astype(num.dtype)


def _select_steps(num: Numerics, mask: jax.Array, one_head: jax.Array, x: jax.Array) -> jax.Array:
    """Zero the rows of x where the mask [C, heads] is false for the selected head."""
    row = jnp.sum(jnp.where(mask & one_head, 1.0, 0.0).astype(num.dtype), axis=1, keepdims=True)
    return jnp.where(row > 0, x.astype(num.dtype), 0.0).astype(x.dtype)


def _mask(r: Refs, which: int, head: int) -> jax.Array:
    """Return one of the masks of `_repair` for a head, [C, 1]."""
    return r.masks_s[which][:, head : head + 1] > 0


def _nan_state(p: Variant, r: Refs, chunk: jax.Array, head: int) -> jax.Array:
    """Return whether the state after the chunk depends on a number that is not finite."""
    last = jnp.minimum(p.chunk, p.length - chunk * p.chunk) - 1
    at_last = _mask(r, REACHED, head) & (row_indices(p.chunk, 1) == last)
    return jnp.sum(jnp.where(at_last, 1.0, 0.0)) > 0


def _decays(p: Variant, r: Refs) -> list[Any]:
    if p.decay == "channel":
        decays: list[Any] = []
        for h in range(p.heads):
            g = r.g_s[h]
            if p.reset:
                g = jnp.where(r.reset_s[...] > 0, LOG_ZERO, g)
            decays.append(chunk_math.ChannelDecays(p.num, g, r.state_s.shape[-1]))
        return decays
    values = chunk_math.head_decays(r.g_s[...], p.num) if p.head_logs else None
    return [chunk_math.SharedDecay(p.num, p.chunk, values, h) for h in range(p.heads)]


def _heads(p: Variant, r: Refs) -> list[dict[str, jax.Array]]:
    heads = []
    for h in range(p.heads):
        x = {name: getattr(r, name + "_s")[h] for name in ("q", "k", "v", *p.vectors)}
        if p.beta:
            x["beta"] = r.beta_s[:, h : h + 1]
        heads.append(x)
    return heads


def _prepare(p: Variant, r: Refs, chunk: jax.Array) -> jax.Array:
    """Stage a chunk, repair it if necessary, and return whether it was repaired."""
    needs_repair = _stage(p, r, chunk)
    if p.reset and p.decay == "channel":
        in_bounds = row_indices(p.chunk, 1) + chunk * p.chunk < p.length
        reset = jnp.where(in_bounds & (r.reset[0] != 0), 1.0, 0.0)
        r.reset_s[...] = reset.astype(p.num.dtype)
    pl.when(needs_repair)(lambda: _repair(p, r, chunk))
    return needs_repair


def forward_kernel(p: Variant, r: Refs) -> None:
    """Run one chunk of one block of heads; the state is carried in scratch memory."""
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _() -> None:
        r.state_s[...] = r.initial[0].astype(p.num.dtype)

    if p.save_states:
        r.states[0, 0] = r.state_s[...]
    repaired = _prepare(p, r, chunk)
    states = [r.state_s[h] for h in range(p.heads)]
    results = p.recurrence.forward(p.num, _decays(p, r), _heads(p, r), states, p.scale)
    for h, (out, state) in enumerate(results):
        r.o_s[h] = out.astype(r.o_s.dtype)
        r.state_s[h] = state

    @pl.when(repaired)
    def _() -> None:
        for h in range(p.heads):
            out = jnp.where(_mask(r, NAN_OUTPUTS, h), jnp.nan, r.o_s[h].astype(p.num.dtype))
            r.o_s[h] = out.astype(r.o_s.dtype)
            r.state_s[h] = jnp.where(_nan_state(p, r, chunk, h), jnp.nan, r.state_s[h])

    join_heads(r.o_s, r.o, r.flat_s)

    @pl.when(chunk == p.chunks - 1)
    def _() -> None:
        r.final[0] = r.state_s[...]


def backward_kernel(p: Variant, r: Refs) -> None:
    """Run the adjoint of one chunk, from the last to the first, with the cotangent in scratch."""
    chunk = p.chunks - 1 - pl.program_id(2)

    @pl.when(chunk == p.chunks - 1)
    def _() -> None:
        r.ct_s[...] = r.d_final[0].astype(p.num.dtype)

    r.state_s[...] = r.states[0, 0]
    repaired = _prepare(p, r, chunk)

    @pl.when(repaired)
    def _() -> None:
        for h in range(p.heads):
            r.ct_s[h] = jnp.where(_nan_state(p, r, chunk, h), 0.0, r.ct_s[h])

    states = [r.state_s[h] for h in range(p.heads)]
    d_outs = [r.do_s[h] for h in range(p.heads)]
    cts = [r.ct_s[h] for h in range(p.heads)]
    results = p.recurrence.backward(
        p.num, _decays(p, r), _heads(p, r), states, p.scale, d_outs, cts
    )
    head = column_indices(p.chunk, p.heads)
    d_beta = jnp.zeros((p.chunk, p.heads), p.num.dtype)
    decay_sums = chunk_math.DecaySumCotangents(d_beta, d_beta, d_beta)
    for h, x in enumerate(results):
        # The scratch of an input is free now, and takes the cotangent.
        for name in ("q", "k", "v", *p.vectors):
            ref = getattr(r, name + "_s")
            ref[h] = x[name].astype(ref.dtype)
        r.ct_s[h] = x["state"]
        if p.beta:
            d_beta = jnp.where(head == h, x["beta"], d_beta)
        if p.decay == "scalar":
            select = functools.partial(jnp.where, head == h)
            decay_sums = jax.tree.map(select, x["log_decay"], decay_sums)
        if p.decay == "channel":
            ct = chunk_math.decay_gradient(x["log_decay"], p.num)
            g = r.g_s[h]
            ct = jnp.where(g <= LOG_ZERO, 0.0, ct)
            r.g_s[h] = jnp.where(r.reset_s[...] > 0, 0.0, ct) if p.reset else ct
    if p.beta:
        r.d_beta[0, 0] = d_beta.astype(r.d_beta.dtype)
    if p.decay == "scalar":
        zero_decay = r.g_s[...] <= LOG_ZERO
        d_g = jnp.where(zero_decay, 0.0, chunk_math.decay_gradient(decay_sums, p.num))
        r.d_g[0, 0] = d_g.astype(r.d_g.dtype)

    @pl.when(repaired)
    def _() -> None:
        for h in range(p.heads):
            for ref, which in ((r.q_s, READS), *((ref, WRITES) for ref in r.written(p))):
                ct = jnp.where(_mask(r, which, h), ref[h].astype(p.num.dtype), 0.0)
                ref[h] = ct.astype(ref.dtype)
            if p.decay == "channel":
                r.g_s[h] = jnp.where(_mask(r, WRITES, h), r.g_s[h], 0.0)
        writes = r.masks_s[WRITES] > 0
        for ref in ([r.d_beta] if p.beta else []) + ([r.d_g] if p.decay == "scalar" else []):
            ct = jnp.where(writes, ref[0, 0].astype(p.num.dtype), 0.0)
            ref[0, 0] = ct.astype(ref.dtype)

    for name in ("q", "k", "v", *p.vectors):
        join_heads(getattr(r, name + "_s"), getattr(r, "d" + name), r.flat_s)
    if p.decay == "channel":
        join_heads(r.g_s, r.d_g, r.flat_s)

    @pl.when(chunk == 0)
    def _() -> None:
        r.d_initial[0] = r.ct_s[...]
