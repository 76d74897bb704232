"""The delta rule on TPU: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T.

With u_t the value that a step writes, S_t = diag(exp g_t) S_{t-1} + k_t u_t^T. D_{t,j} are the
decays of the steps after j and up to t, and S is the state before a chunk:

    u_t = beta_t (v_t - S^T D_{t,0} k_t - sum_{j < t} (k_t^T D_{t,j} k_j) u_j)

That is U = (I + N)^-1 R, where R = beta (V - D K S), and N is the strictly lower part of
beta_t k_t^T D_{t,j} k_j. The outputs are linear attention with values U. R includes the state, so
that (I + N)^-1 is applied to one right-hand side only. DeltaNet in chunks: arXiv 2406.06484; gated:
2412.06464; gated per channel: 2510.26692.
"""

import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import matrix_state
from pallas_kernels.tpu.chunk_math import SharedDecay
from pallas_kernels.tpu.head_layout import backward_by_head
from pallas_kernels.tpu.inverse import inverses
from pallas_kernels.tpu.numerics import NT, TN, Numerics, column_indices, row_indices
from pallas_kernels.tpu.variant import ChunkRecurrence

Inputs = dict[str, jax.Array]
Gradients = dict[str, Any]  # `log_decay` is a `DecaySumCotangents`, the others are arrays


class Solution(NamedTuple):
    """Intermediate results of a chunk of one head.

    Attributes:
      scores: q_t^T D_{t,j} k_j.
      overlaps: k_t^T D_{t,j} k_j for j < t.
      inverse: (I + N)^-1.
      change: V - D K S.
      written: U.
    """

    scores: jax.Array
    overlaps: jax.Array
    inverse: jax.Array
    change: jax.Array
    written: jax.Array


def _solve(
    num: Numerics, decays: list[SharedDecay], heads: list[Inputs], states: list[jax.Array]
) -> list[Solution]:
    """Compute U and the intermediate results for every head."""
    size = heads[0]["q"].shape[0]
    below = row_indices(size) > column_indices(size)
    # Each product for all heads before the next product, to hide the latency.
    pairs = [d.pairs([x["q"], x["k"]], x["k"]) for d, x in zip(decays, heads, strict=True)]
    overlaps = [jnp.where(below, own, 0.0) for _, own in pairs]
    changes = [
        x["v"].astype(num.dtype) - d.read(x["k"], state, exact=True)
        for d, x, state in zip(decays, heads, states, strict=True)
    ]
    inverted = inverses([x["beta"] * n for x, n in zip(heads, overlaps, strict=True)], num)
    written = [
        num.dot(inverse, x["beta"] * change, exact=True)
        for x, inverse, change in zip(heads, inverted, changes, strict=True)
    ]
    scores = [own for own, _ in pairs]
    solutions = zip(scores, overlaps, inverted, changes, written, strict=True)
    return [Solution(*solution) for solution in solutions]


def _forward(
    num: Numerics,
    decays: list[SharedDecay],
    heads: list[Inputs],
    states: list[jax.Array],
    scale: float,
) -> list[tuple[jax.Array, jax.Array]]:
    solutions = _solve(num, decays, heads, states)
    read = [d.read(x["q"], state) for d, x, state in zip(decays, heads, states, strict=True)]
    outs = [
        scale * (own + num.dot(s.scores, s.written, exact=True))
        for own, s in zip(read, solutions, strict=True)
    ]
    final = [
        d.carry(state) + d.write(x["k"], s.written, exact=True)
        for d, x, state, s in zip(decays, heads, states, solutions, strict=True)
    ]
    return list(zip(outs, final, strict=True))


def _head_backward(
    num: Numerics,
    scale: float,
    d: SharedDecay,
    x: Inputs,
    state: jax.Array,
    d_out: jax.Array,
    ct: jax.Array,
    solution: Solution,
) -> Generator[None, None, Gradients]:
    q, k, beta = x["q"], x["k"], x["beta"]
    scores, overlaps, inverse, change, u = solution
    below = row_indices(q.shape[0]) > column_indices(q.shape[0])
    d_out = scale * d_out.astype(num.dtype)
    du = num.dot(scores, d_out, TN, exact=True)
    yield
    du = du + d.write_back_values(k, ct, exact=True)
    yield
    dr = num.dot(inverse, du, TN, exact=True)
    yield
    dn = jnp.where(below, -num.dot(dr, u, NT, exact=True), 0.0)
    yield
    d_beta = jnp.sum(dr * change, axis=1, keepdims=True)
    d_beta = d_beta + jnp.sum(dn * overlaps, axis=1, keepdims=True)
    dv = beta * dr
    d_scores = num.dot(d_out, u, NT, exact=True)
    yield
    cts, pairs = [d_scores, beta * dn], [scores, overlaps]
    [dq, dk_left], dk_right, d_pairs = d.pairs_back(cts, [q, k], k, pairs, exact=True)
    yield
    q_read = d.read_back(d_out, state, exact=True)
    yield
    k_read = -d.read_back(dv, state, exact=True)
    yield
    written = d.write_back(u, ct, exact=True)
    yield
    d_state = d.carry(ct) + d.read_back_state(q, d_out)
    yield
    d_state = d_state - d.read_back_state(k, dv, exact=True)
    yield
    q, k = q.astype(num.dtype), k.astype(num.dtype)
    reads = q * q_read + k * k_read
    return {
        "q": dq + q_read,
        "k": dk_left + k_read + dk_right + written,
        "v": dv,
        "beta": d_beta,
        "state": d_state,
        "log_decay": d.decay_sums_back(d_pairs, reads, k * written, d.carry(state) * ct),
    }


_RECURRENCE = ChunkRecurrence("delta_rule", _forward, backward_by_head(_solve, _head_backward))
INPUT_MAPS, SHARED_HEADS, RECOMPUTES_STATES = True, False, False
forward = functools.partial(matrix_state.forward, _RECURRENCE)
backward = functools.partial(matrix_state.backward, _RECURRENCE)
