"""Kernel bodies of matrix-state recurrences on TPU, for a block of steps and heads.

The state stays in VMEM from one block to the next. Heads are copied to scratch [heads, C, K], so
that each is a matrix. The products of all heads of a block are interleaved, which hides the latency
of small products.

A non-finite number must not enter a product, where it would reach every step of the chunk. A chunk
with such numbers, or with a ragged edge, is repaired first. Repair sets the inputs of these steps
to zero. Afterwards it sets to NaN the outputs and states that depend on them, up to the next reset.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import pl
from pallas_kernels.tpu import chunk_math, input_maps
from pallas_kernels.tpu.channel_decays import ChannelDecays
from pallas_kernels.tpu.chunk_math import LOG_ZERO
from pallas_kernels.tpu.head_layout import join_heads, split_heads
from pallas_kernels.tpu.numerics import TN, Numerics, column_indices, row_indices
from pallas_kernels.tpu.variant import Refs, Variant

# Indices of the masks in `Refs.masks_s`, all of steps in bounds.
WRITES, READS, NAN_OUTPUTS, REACHED = range(4)


def _finite(x: jax.Array) -> jax.Array:
    return x * 0 == 0


def _unit(head: int, x: jax.Array) -> jax.Array:
    del head
    return input_maps.normalized(x)


def _gate_rows(r: Refs, head: int) -> tuple[jax.Array, jax.Array]:
    """Return the rate and the bias of a head; of all heads if there is one row."""
    return r.rate[0, head : head + 1], r.bias[0, head : head + 1]


def _log_decay(p: Variant, r: Refs, head: int, x: jax.Array) -> jax.Array:
    """Compute finite logarithms of decays from logarithms, or from the inputs of the gate."""
    g = input_maps.gate(x, *_gate_rows(r, head)) if p.gate else x
    return jnp.where(g < LOG_ZERO, jnp.full_like(g, LOG_ZERO), g)


def _stage(p: Variant, r: Refs, chunk: jax.Array) -> jax.Array:
    """Split the heads, write finite logarithms, and return whether the block needs repair."""
    num, zero = p.num, jnp.zeros((), p.num.dtype)
    check = jnp.zeros((), num.dtype)  # NaN if a number is not finite
    for name in ("q", "k", "v", *p.vectors):
        change = _unit if p.normalize and name in ("q", "k") else None
        raw = getattr(r, name + "_raw_s", None)
        check = check + split_heads(
            getattr(r, name), getattr(r, name + "_s"), num.dtype, change, raw
        )
    if p.backward:
        split_heads(r.do, r.do_s, num.dtype)
    if p.decay == "channel":
        log_decay = functools.partial(_log_decay, p, r)
        check = check + split_heads(r.g, r.g_s, num.dtype, log_decay, r.g_raw_s)
    if p.beta:
        r.beta_s[...] = r.beta[0, 0].astype(num.dtype)
        check = check + jnp.sum(r.beta_s[...] * 0)
    if p.head_logs:
        g = jnp.zeros_like(r.g_s)
        g = g if p.decay is None else _log_decay(p, r, 0, r.g[0, 0].astype(num.dtype))
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

        def load(h: int) -> jax.Array:
            g = r.g_s[h]
            return jnp.where(r.reset_s[...] > 0, LOG_ZERO, g) if p.reset else g

        values = r.state_s.shape[-1]
        loads = [functools.partial(load, h) for h in range(p.heads)]
        return [ChannelDecays(p.num, p.chunk, each, values) for each in loads]
    values = chunk_math.head_decays(r.g_s[...], p.num) if p.head_logs else None
    return [chunk_math.SharedDecay(p.num, p.chunk, values, h) for h in range(p.heads)]


class _Inputs(Mapping[str, jax.Array]):
    """Inputs of a head by name, read from memory wherever they are used.

    The inputs of all heads together do not fit the registers.
    """

    def __init__(self, reads: dict[str, Callable[[], jax.Array]]) -> None:
        self.reads = reads

    def __getitem__(self, name: str) -> jax.Array:
        return self.reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)


class _Matrices(Sequence[jax.Array]):
    """Matrices of all heads, read from memory wherever they are used."""

    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def __getitem__(self, head: Any) -> Any:
        if head >= len(self):
            raise IndexError(head)
        return self.ref[head]

    def __len__(self) -> int:
        return int(self.ref.shape[0])


def _heads(p: Variant, r: Refs) -> list[Mapping[str, jax.Array]]:
    def reads(h: int) -> dict[str, Callable[[], jax.Array]]:
        names = ("q", "k", "v", *p.vectors)
        made = {name: functools.partial(getattr(r, name + "_s").__getitem__, h) for name in names}
        return made | ({"beta": lambda: r.beta_s[:, h : h + 1]} if p.beta else {})

    return [_Inputs(reads(h)) for h in range(p.heads)]


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
    states = _Matrices(r.state_s)
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

    states, d_outs, cts = (_Matrices(ref) for ref in (r.state_s, r.do_s, r.ct_s))
    results = p.recurrence.backward(
        p.num, _decays(p, r), _heads(p, r), states, p.scale, d_outs, cts
    )
    head = column_indices(p.chunk, p.heads)
    d_beta = jnp.zeros((p.chunk, p.heads), p.num.dtype)
    decay_sums = chunk_math.DecaySumCotangents(d_beta, d_beta, d_beta)
    for h, x in enumerate(results):
        # The scratch of an input is free now, and takes the cotangent.
        for name in ("q", "k", "v", *p.vectors):
            ref, ct = getattr(r, name + "_s"), x[name]
            if p.normalize and name in ("q", "k"):
                ct = input_maps.normalized_back(getattr(r, name + "_raw_s")[h], ct, p.num)
            ref[h] = ct.astype(ref.dtype)
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
        r.g_s[...] = jnp.where(zero_decay, 0.0, chunk_math.decay_gradient(decay_sums, p.num))

    @pl.when(repaired)
    def _() -> None:
        for h in range(p.heads):
            for ref, which in ((r.q_s, READS), *((ref, WRITES) for ref in r.written(p))):
                ct = jnp.where(_mask(r, which, h), ref[h].astype(p.num.dtype), 0.0)
                ref[h] = ct.astype(ref.dtype)
            if p.decay == "channel":
                r.g_s[h] = jnp.where(_mask(r, WRITES, h), r.g_s[h], 0.0)
        writes = r.masks_s[WRITES] > 0
        if p.beta:
            ct = jnp.where(writes, r.d_beta[0, 0].astype(p.num.dtype), 0.0)
            r.d_beta[0, 0] = ct.astype(r.d_beta.dtype)
        if p.decay == "scalar":
            r.g_s[...] = jnp.where(writes, r.g_s[...], 0.0)

    if p.gate:
        _gate_gradients(p, r, chunk)
    for name in ("q", "k", "v", *p.vectors):
        join_heads(getattr(r, name + "_s"), getattr(r, "d" + name), r.flat_s)
    if p.decay == "channel":
        join_heads(r.g_s, r.d_g, r.flat_s)
    if p.decay == "scalar":
        r.d_g[0, 0] = r.g_s[...].astype(r.d_g.dtype)

    @pl.when(chunk == 0)
    def _() -> None:
        r.d_initial[0] = r.ct_s[...]


def _gate_gradients(p: Variant, r: Refs, chunk: jax.Array) -> None:
    """Convert the cotangents of logarithms, in `g_s`, to those of the inputs of the gate."""

    @pl.when(chunk == p.chunks - 1)
    def _() -> None:
        r.d_rate[...] = jnp.zeros_like(r.d_rate)
        r.d_bias[...] = jnp.zeros_like(r.d_bias)

    for h in range(p.heads if p.decay == "channel" else 1):
        at = h if p.decay == "channel" else ...
        x = (r.g_raw_s[h] if p.decay == "channel" else r.g[0, 0]).astype(p.num.dtype)
        d = input_maps.gate_back(x, *_gate_rows(r, h), r.g_s[at])
        r.g_s[at] = d.x
        r.d_rate[0, 0, h : h + 1] += d.rate
        r.d_bias[0, 0, h : h + 1] += d.bias
