"""The generalized delta rule on TPU: S_t = D_t S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T.

z_t = S_{t-1}^T a_t is the value that step t reads before the decay D_t = diag(exp g_t). D_{t,j} are
the decays of the steps after j and up to t, and S is the state before a chunk:

    z_t = S^T D_{t-1,0} a_t + sum_{j < t} (a_t^T D_{t-1,j} b_j) z_j + (a_t^T D_{t-1,j} k_j) v_j

That is Z = (I - N)^-1 (A_S + M V), with N and M the strictly lower matrices of the two sums. A read
of the state before step t is a read of the state after step t - 1. So row t - 1 of the products
contains a_t, and the products then move down by one row. The outputs are linear attention with keys
b, k and values Z, V. The rule with transitions that are diagonal plus rank one: arXiv 2503.14456.
"""

import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax

from pallas_kernels.tpu import matrix_state
from pallas_kernels.tpu.chunk_math import SharedDecay
from pallas_kernels.tpu.head_layout import backward_by_head
from pallas_kernels.tpu.inverse import inverses
from pallas_kernels.tpu.numerics import NT, TN, Numerics, rows_down, rows_up
from pallas_kernels.tpu.variant import ChunkRecurrence

Inputs = dict[str, jax.Array]
Gradients = dict[str, Any]  # `log_decay` is a `DecaySumCotangents`, the others are arrays


class Solution(NamedTuple):
    """Intermediate results of a chunk of one head.

    Attributes:
      next_a: a_{t+1} in row t.
      by_b: [q_t^T D_{t,j} b_j, a_{t+1}^T D_{t,j} b_j].
      by_k: [q_t^T D_{t,j} k_j, a_{t+1}^T D_{t,j} k_j].
      copies: M.
      inverse: (I - N)^-1.
      read: Z.
    """

    next_a: jax.Array
    by_b: list[jax.Array]
    by_k: list[jax.Array]
    copies: jax.Array
    inverse: jax.Array
    read: jax.Array


def _solve(
    num: Numerics, decays: list[SharedDecay], heads: list[Inputs], states: list[jax.Array]
) -> list[Solution]:
    """Compute Z and the intermediate results for every head."""
    # Each product for all heads before the next product, to hide the latency.
    next_a = [rows_up(x["a"]) for x in heads]
    pairs = [
        d.pairs_with([x["q"], shifted], [x["b"], x["k"]])
        for d, x, shifted in zip(decays, heads, next_a, strict=True)
    ]
    by_b, by_k = ([own[n] for own in pairs] for n in (0, 1))
    copies = [rows_down(own) for _, own in by_k]
    right_sides = [
        d.read_before(x["a"], state, exact=True) + num.dot(copy, x["v"], exact=True)
        for d, x, state, copy in zip(decays, heads, states, copies, strict=True)
    ]
    inverted = inverses([-rows_down(own) for _, own in by_b], num)
    read = [
        num.dot(inverse, right, exact=True)
        for inverse, right in zip(inverted, right_sides, strict=True)
    ]
    solutions = zip(next_a, by_b, by_k, copies, inverted, read, strict=True)
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
        scale
        * (own + num.dot(s.by_b[0], s.read, exact=True) + num.dot(s.by_k[0], x["v"], exact=True))
        for own, x, s in zip(read, heads, solutions, strict=True)
    ]
    final = [
        d.carry(state) + d.write(x["b"], s.read, exact=True) + d.write(x["k"], x["v"], exact=True)
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
    s: Solution,
) -> Generator[None, None, Gradients]:
    q, k, v, a, b = (x[name] for name in ("q", "k", "v", "a", "b"))
    z = s.read
    d_out = scale * d_out.astype(num.dtype)
    dz = num.dot(s.by_b[0], d_out, TN, exact=True)
    yield
    dz = dz + d.write_back_values(b, ct, exact=True)
    yield
    dr = num.dot(s.inverse, dz, TN, exact=True)
    yield
    dv = num.dot(s.by_k[0], d_out, TN, exact=True)
    yield
    dv = dv + d.write_back_values(k, ct, exact=True)
    yield
    dv = dv + num.dot(s.copies, dr, TN, exact=True)
    yield
    lefts = [q, s.next_a]
    # Products of the last row's a are not used, so their cotangents are zero.
    cts = [num.dot(d_out, z, NT, exact=True), rows_up(num.dot(dr, z, NT, exact=True))]
    yield
    [dq, d_next], db, d_pairs = d.pairs_back(cts, lefts, b, s.by_b, exact=True)
    yield
    cts = [num.dot(d_out, v, NT, exact=True), rows_up(num.dot(dr, v, NT, exact=True))]
    yield
    [dq_k, d_next_k], dk, d_pairs_k = d.pairs_back(cts, lefts, k, s.by_k, exact=True)
    yield
    q_read = d.read_back(d_out, state, exact=True)
    yield
    a_read = d.read_before_back(dr, state, exact=True)
    yield
    b_written = d.write_back(z, ct, exact=True)
    yield
    k_written = d.write_back(v, ct, exact=True)
    yield
    d_state = d.carry(ct) + d.read_back_state(q, d_out)
    yield
    d_state = d_state + d.read_before_back_state(a, dr, exact=True)
    yield
    q, k, a, b = (value.astype(num.dtype) for value in (q, k, a, b))
    # Step t reads a_t with the decays up to step t - 1.
    reads = q * q_read + rows_up(a * a_read)
    writes = k * k_written + b * b_written
    return {
        "q": dq + dq_k + q_read,
        "k": dk + k_written,
        "v": dv,
        "a": rows_down(d_next + d_next_k) + a_read,
        "b": db + b_written,
        "state": d_state,
        "log_decay": d.decay_sums_back(d_pairs + d_pairs_k, reads, writes, d.carry(state) * ct),
    }


_RECURRENCE = ChunkRecurrence(
    "generalized_delta_rule", _forward, backward_by_head(_solve, _head_backward)
)
INPUT_MAPS, SHARED_HEADS, RECOMPUTES_STATES = False, False, False
forward = functools.partial(matrix_state.forward, _RECURRENCE)
backward = functools.partial(matrix_state.backward, _RECURRENCE)
