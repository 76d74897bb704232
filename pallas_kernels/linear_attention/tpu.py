"""Linear attention on TPU: o_t = scale * S_t^T q_t, S_t = diag(exp g_t) S_{t-1} + k_t v_t^T.

D_{t,j} are the decays of the steps after j and up to t, and S is the state before a chunk of C:

    o_t = scale * (S^T D_{t,0} q_t + sum_{j <= t} (q_t^T D_{t,j} k_j) v_j)
    S'  = D_{C,0} S + sum_j D_{C,j} k_j v_j^T

`matrix_state` runs the chunks in order, with the state in VMEM, and `chunk_math` has the products.
This is the chunked form of GLA, arXiv 2312.06635; one decay per head: 2405.21060; none: 2006.16236.
"""

import functools
from collections.abc import Callable, Generator
from typing import Any

import jax

from pallas_kernels.tpu import matrix_state
from pallas_kernels.tpu.chunk_math import SharedDecay
from pallas_kernels.tpu.head_layout import interleave
from pallas_kernels.tpu.numerics import NT, TN, Numerics
from pallas_kernels.tpu.variant import ChunkRecurrence

Inputs = dict[str, jax.Array]
Gradients = dict[str, Any]  # `log_decay` is a `DecaySumCotangents`, the others are arrays
Steps = Generator[None, None, Any]


def _forward(
    num: Numerics, d: SharedDecay, x: Inputs, state: jax.Array, scale: float
) -> Generator[None, None, tuple[jax.Array, jax.Array]]:
    [scores] = d.pairs([x["q"]], x["k"])
    yield
    read = d.read(x["q"], state)
    yield
    out = scale * (read + num.dot(scores, x["v"]))
    yield
    return out, d.carry(state) + d.write(x["k"], x["v"])


def _backward(
    num: Numerics,
    d: SharedDecay,
    x: Inputs,
    state: jax.Array,
    scale: float,
    d_out: jax.Array,
    ct: jax.Array,
) -> Generator[None, None, Gradients]:
    q, k, v = x["q"], x["k"], x["v"]
    d_out = scale * d_out.astype(num.dtype)
    [scores] = d.pairs([q], k)
    yield
    d_scores = num.dot(d_out, v, NT)
    yield
    [dq], dk, d_pairs = d.pairs_back([d_scores], [q], k, [scores])
    yield
    read = d.read_back(d_out, state)
    yield
    written = d.write_back(v, ct)
    dk = dk + written
    yield
    dv = num.dot(scores, d_out, TN) + d.write_back_values(k, ct)
    yield
    d_state = d.carry(ct) + d.read_back_state(q, d_out)
    yield
    q, k = q.astype(num.dtype), k.astype(num.dtype)
    d_decay = d.decay_sums_back(d_pairs, q * read, k * written, d.carry(state) * ct)
    return {"q": dq + read, "k": dk, "v": dv, "state": d_state, "log_decay": d_decay}


def _for_heads(function: Callable[..., Steps]) -> Callable[..., list[Any]]:
    """Convert a function of one head to a function of lists of heads, which it interleaves."""

    def of_heads(
        num: Numerics, decays: Any, heads: Any, states: Any, scale: float, *cts: Any
    ) -> Any:
        by_head = zip(decays, heads, states, *cts, strict=True)
        return interleave([function(num, d, x, state, scale, *ct) for d, x, state, *ct in by_head])

    return of_heads


_RECURRENCE = ChunkRecurrence("linear_attention", _for_heads(_forward), _for_heads(_backward))

# `beta` is None for this recurrence.
INPUT_MAPS, SHARED_HEADS, RECOMPUTES_STATES = False, False, False
forward = functools.partial(matrix_state.forward, _RECURRENCE)
backward = functools.partial(matrix_state.backward, _RECURRENCE)
