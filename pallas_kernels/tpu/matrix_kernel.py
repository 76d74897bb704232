"""What the kernels of matrix-state recurrences do with a block of steps and heads, on TPU.

The state stays in VMEM from one block to the next. Heads are taken apart into scratch
[heads, C, K], so that each is a matrix, and all heads of a block are worked on side by side: single
small products wait for their results, many of them do not.

Nothing non-finite enters a product. A block in which some number is not finite, or the last one if
it stands over the end of the arrays, is repaired first: such steps are zeroed, and the outputs and
states that they reach since the last reset, and no other, are NaN.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import pl
from pallas_kernels.tpu import chunk_math
from pallas_kernels.tpu.chunk_math import LOG_ZERO, Numerics, cols, rows
from pallas_kernels.tpu.head_layout import join_heads, split_heads


class Core(NamedTuple):
    """A recurrence: its name, and what a chunk of it does and its adjoint, for lists of heads."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Plan(NamedTuple):
    """What is known when a kernel is compiled."""

    core: Core
    num: Numerics
    chunk: int
    heads: int  # in a block
    groups: int
    length: int
    decay: str | None  # "scalar", "channel"
    reset: bool
    beta: bool
    scale: float
    states: bool = False
    back: bool = False
    flat: bool = False  # whether there is scratch for `join_heads`

    @property
    def chunks(self) -> int:
        """The number of chunks of time."""
        return -(-self.length // self.chunk)

    @property
    def marked(self) -> bool:
        """Whether logarithms of decays per head exist, be it only those of resets."""
        return self.decay == "scalar" or (self.reset and self.decay is None)


class Refs:
    """The blocks and the scratch of a kernel, by name."""

    def __init__(self, names: list[str], refs: tuple[Any, ...]) -> None:
        """From the names in the order of the refs."""
        self.__dict__.update(zip(names, refs, strict=True))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no block or scratch called {name}")


def _finite(x: jax.Array) -> jax.Array:
    return x * 0 == 0


def _stage(p: Plan, r: Refs, chunk: jax.Array) -> jax.Array:
    """Take the heads apart and clean the decays; whether the block needs repair."""
    num, zero = p.num, jnp.zeros((), p.num.dtype)
    ones = jnp.zeros((), num.dtype)
    for name in ("q", "k", "v"):
        ones = ones + split_heads(getattr(r, name), getattr(r, name + "_s"), num.dtype)
    if p.back:
        split_heads(r.do, r.do_s, num.dtype)
    if p.decay == "channel":
        ones = ones + split_heads(r.g, r.g_s, num.dtype, low=LOG_ZERO)
    if p.beta:
        r.beta_s[...] = r.beta[0, 0].astype(num.dtype)
        ones = ones + jnp.sum(r.beta_s[...] * 0)
    if p.marked:
        g = jnp.zeros_like(r.g_s) if p.decay is None else r.g[0, 0].astype(num.dtype)
        g = jnp.where(g < LOG_ZERO, jnp.full_like(g, LOG_ZERO), g)
        ones = ones + jnp.sum(g * 0)
        r.g_s[...] = jnp.where(r.reset[0] != 0, LOG_ZERO, g) if p.reset else g
    ones = ones + jnp.sum(r.state_s[...] * 0)
    odd = ones != zero
    return odd | (chunk == p.chunks - 1) if p.length % p.chunk else odd


def _repair(p: Plan, r: Refs, chunk: jax.Array) -> None:
    """Zero the steps that are not finite or not there; note what they reach."""
    num, size = p.num, p.chunk
    there = rows(size, 1) + chunk * size < p.length
    head = cols(size, p.heads)
    asks, writes = (jnp.zeros((size, p.heads), num.dtype) for _ in range(2))
    for h in range(p.heads):

        def odd(x: jax.Array) -> jax.Array:
            wrong = jnp.where(_finite(x.astype(num.dtype)), 0.0, 1.0).astype(num.dtype)
            return jnp.sum(wrong, axis=1, keepdims=True)

        wrong = odd(r.k_s[h]) + odd(r.v_s[h])
        wrong = wrong + odd(r.g_s[h]) if p.decay == "channel" else wrong
        writes = jnp.where(head == h, wrong, writes)
        asks = jnp.where(head == h, odd(r.q_s[h]), asks)
    if p.beta:
        writes = writes + jnp.where(_finite(r.beta_s[...]), 0.0, 1.0)
    if p.decay == "scalar":
        writes = writes + jnp.where(_finite(r.g_s[...]), 0.0, 1.0)
    writes, asks = ((x > 0) & there for x in (writes, asks))
    kept, asked = ~writes & there, ~asks & there
    cut = jnp.zeros((size, 1), num.dtype)
    if p.reset:
        cut = jnp.where(there & (r.reset[0] != 0), 1.0, cut)
    t, j = rows(size), cols(size)
    before = num.dot(num.ones(j <= t), cut)  # resets up to each step, as a column and as a row
    along = num.dot(cut, num.ones(t <= j), chunk_math.TN)
    same = num.ones((before == along) & (j <= t))
    reached = num.dot(same, num.ones(writes)) > 0
    for h in range(p.heads):
        state = r.state_s[h]
        lost = jnp.sum(jnp.where(_finite(state), 0.0, 1.0).astype(num.dtype))
        r.state_s[h] = jnp.where(lost > 0, jnp.zeros_like(state), state)
        reached = reached | ((head == h) & (before == 0) & (lost > 0))
        for name, mask in (("q", asked), ("k", kept), ("v", kept)):
            ref = getattr(r, name + "_s")
            ref[h] = _select(num, mask, head == h, ref[h])
        if p.decay == "channel":
            r.g_s[h] = _select(num, kept, head == h, r.g_s[h])
    reached = reached & there
    spoiled = reached | (asks & there)
    if p.back:
        for h in range(p.heads):
            r.do_s[h] = _select(num, ~spoiled & there, head == h, r.do_s[h])
    if p.beta:
        r.beta_s[...] = jnp.where(kept, r.beta_s[...], 0.0)
    if p.marked:
        width = r.g_s.shape[1]
        g = jnp.where(kept[:, :width], r.g_s[...], 0.0)
        r.g_s[...] = jnp.where(cut > 0, LOG_ZERO, g)
    marks = (kept, asked, spoiled, reached)
    for n, mark in enumerate(marks):
        r.marks_s[n] = jnp.where(mark, 1.0, 0.0).astype(num.dtype)


def _select(num: Numerics, mask: jax.Array, one: jax.Array, x: jax.Array) -> jax.Array:
    """The rows of x that the mask [C, heads] keeps in the head that `one` marks."""
    row = jnp.sum(jnp.where(mask & one, 1.0, 0.0).astype(num.dtype), axis=1, keepdims=True)
    return jnp.where(row > 0, x.astype(num.dtype), 0.0).astype(x.dtype)


def _mark(p: Plan, r: Refs, which: int, head: int) -> jax.Array:
    """Of `_repair`: the steps [C, 1] kept (0), asked (1), spoiled (2), reached (3)."""
    return r.marks_s[which][:, head : head + 1] > 0


def _lost(p: Plan, r: Refs, chunk: jax.Array, head: int) -> jax.Array:
    """Whether what is not finite reaches the last step of the chunk that is there."""
    last = jnp.minimum(p.chunk, p.length - chunk * p.chunk) - 1
    return jnp.sum(jnp.where(_mark(p, r, 3, head) & (rows(p.chunk, 1) == last), 1.0, 0.0)) > 0


def _decays(p: Plan, r: Refs) -> list[Any]:
    if p.decay == "channel":
        made: list[Any] = []
        for h in range(p.heads):
            g = r.g_s[h]
            if p.reset:
                g = jnp.where(r.cut_s[...] > 0, LOG_ZERO, g)
            made.append(chunk_math.Channels(p.num, g, r.state_s.shape[-1]))
        return made
    values = chunk_math.scalars(r.g_s[...], p.num) if p.marked else None
    return [chunk_math.Shared(p.num, p.chunk, values, h) for h in range(p.heads)]


def _heads(p: Plan, r: Refs) -> list[dict[str, jax.Array]]:
    made = []
    for h in range(p.heads):
        x = {"q": r.q_s[h], "k": r.k_s[h], "v": r.v_s[h]}
        if p.beta:
            x["beta"] = r.beta_s[:, h : h + 1]
        made.append(x)
    return made


def _prepare(p: Plan, r: Refs, chunk: jax.Array) -> jax.Array:
    odd = _stage(p, r, chunk)
    if p.reset and p.decay == "channel":
        there = rows(p.chunk, 1) + chunk * p.chunk < p.length
        r.cut_s[...] = jnp.where(there & (r.reset[0] != 0), 1.0, 0.0).astype(p.num.dtype)
    pl.when(odd)(lambda: _repair(p, r, chunk))
    return odd


def forward_kernel(p: Plan, names: list[str], *refs: Any) -> None:
    """Run one chunk of one block of heads; the state is carried in scratch memory."""
    r = Refs(names, refs)
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _() -> None:
        r.state_s[...] = r.initial[0].astype(p.num.dtype)

    if p.states:
        r.states[0, 0] = r.state_s[...]
    odd = _prepare(p, r, chunk)
    states = [r.state_s[h] for h in range(p.heads)]
    made = p.core.forward(p.num, _decays(p, r), _heads(p, r), states, p.scale)
    for h, (out, state) in enumerate(made):
        r.o_s[h] = out.astype(r.o_s.dtype)
        r.state_s[h] = state

    @pl.when(odd)
    def _() -> None:
        for h in range(p.heads):
            out = jnp.where(_mark(p, r, 2, h), jnp.nan, r.o_s[h].astype(p.num.dtype))
            r.o_s[h] = out.astype(r.o_s.dtype)
            r.state_s[h] = jnp.where(_lost(p, r, chunk, h), jnp.nan, r.state_s[h])

    join_heads(r.o_s, r.o, r.flat_s if p.flat else None)

    @pl.when(chunk == p.chunks - 1)
    def _() -> None:
        r.final[0] = r.state_s[...]


def backward_kernel(p: Plan, names: list[str], *refs: Any) -> None:
    """Run the adjoint of one chunk, from the last to the first, with the cotangent in scratch."""
    r = Refs(names, refs)
    chunk = p.chunks - 1 - pl.program_id(2)

    @pl.when(chunk == p.chunks - 1)
    def _() -> None:
        r.ct_s[...] = r.d_final[0].astype(p.num.dtype)

    r.state_s[...] = r.states[0, 0]
    odd = _prepare(p, r, chunk)

    @pl.when(odd)
    def _() -> None:
        for h in range(p.heads):
            r.ct_s[h] = jnp.where(_lost(p, r, chunk, h), 0.0, r.ct_s[h])

    states = [r.state_s[h] for h in range(p.heads)]
    d_outs = [r.do_s[h] for h in range(p.heads)]
    cts = [r.ct_s[h] for h in range(p.heads)]
    made = p.core.backward(p.num, _decays(p, r), _heads(p, r), states, p.scale, d_outs, cts)
    head = cols(p.chunk, p.heads)
    d_beta = jnp.zeros((p.chunk, p.heads), p.num.dtype)
    spans = chunk_math.SpansBack(d_beta, d_beta, d_beta)
    for h, x in enumerate(made):
        for name in ("q", "k", "v"):
            ref = getattr(r, name + "_s")
            ref[h] = x[name].astype(ref.dtype)
        r.ct_s[h] = x["state"]
        if p.beta:
            d_beta = jnp.where(head == h, x["beta"], d_beta)
        if p.decay == "scalar":
            spans = jax.tree.map(functools.partial(jnp.where, head == h), x["log_decay"], spans)
        if p.decay == "channel":
            ct = chunk_math.decay_gradient(x["log_decay"], p.num)
            g = r.g_s[h]
            ct = jnp.where(g <= LOG_ZERO, 0.0, ct)
            r.g_s[h] = jnp.where(r.cut_s[...] > 0, 0.0, ct) if p.reset else ct
    if p.beta:
        r.d_beta[0, 0] = d_beta.astype(r.d_beta.dtype)
    if p.decay == "scalar":
        d_g = jnp.where(r.g_s[...] <= LOG_ZERO, 0.0, chunk_math.decay_gradient(spans, p.num))
        r.d_g[0, 0] = d_g.astype(r.d_g.dtype)

    @pl.when(odd)
    def _() -> None:
        for h in range(p.heads):
            for name, which in (("q", 1), ("k", 0), ("v", 0)):
                ref = getattr(r, name + "_s")
                x = jnp.where(_mark(p, r, which, h), ref[h].astype(p.num.dtype), 0.0)
                ref[h] = x.astype(ref.dtype)
            if p.decay == "channel":
                r.g_s[h] = jnp.where(_mark(p, r, 0, h), r.g_s[h], 0.0)
        kept = r.marks_s[0] > 0
        for name in (["d_beta"] if p.beta else []) + (["d_g"] if p.decay == "scalar" else []):
            ref = getattr(r, name)
            x = jnp.where(kept, ref[0, 0].astype(p.num.dtype), 0.0)
            ref[0, 0] = x.astype(ref.dtype)

    flat = r.flat_s if p.flat else None
    join_heads(r.q_s, r.dq, flat)
    join_heads(r.k_s, r.dk, flat)
    join_heads(r.v_s, r.dv, flat)
    if p.decay == "channel":
        join_heads(r.g_s, r.d_g, flat)

    @pl.when(chunk == 0)
    def _() -> None:
        r.d_initial[0] = r.ct_s[...]
