"""The delta rule on TPU: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T.

By what each step writes, S_t = diag(exp g_t) S_{t-1} + k_t u_t^T. With D_{t,j} the decays of the
steps after j and up to t, and S the state that enters a chunk,

    u_t = beta_t (v_t - S^T D_{t,0} k_t - sum_{j < t} (k_t^T D_{t,j} k_j) u_j)

that is U = (I + N)^-1 R with R = beta (V - D K S) and N the strictly lower part of
beta_t k_t^T D_{t,j} k_j; what remains is linear attention to U. R holds the state, so that nothing
is multiplied by (I + N)^-1 that the outputs do not need. DeltaNet in chunks: arXiv 2406.06484;
gated: 2412.06464; gated per channel: 2510.26692.
"""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import matrix_state
from pallas_kernels.tpu.chunk_math import NT, TN, Numerics, Shared, cols, rows
from pallas_kernels.tpu.head_layout import in_step
from pallas_kernels.tpu.inverse import inverses

Inputs = dict[str, jax.Array]
Gradients = dict[str, Any]  # decays: a `SpansBack`, the others arrays


def _solved(
    num: Numerics, decays: list[Shared], heads: list[Inputs], states: list[jax.Array]
) -> list[Any]:
    """For every head the scores, the overlaps, (I + N)^-1, V - D K S and U."""
    size = heads[0]["q"].shape[0]
    below = rows(size) > cols(size)
    # Every step of all heads before the next one: none waits for its own last product.
    pairs = [d.pairs([x["q"], x["k"]], x["k"]) for d, x in zip(decays, heads, strict=True)]
    overlaps = [jnp.where(below, own, 0.0) for _, own in pairs]
    found = [
        x["v"].astype(num.dtype) - d.read(x["k"], state, exact=True)
        for d, x, state in zip(decays, heads, states, strict=True)
    ]
    solve = inverses([x["beta"] * n for x, n in zip(heads, overlaps, strict=True)], num)
    written = [
        num.dot(inverse, x["beta"] * change, exact=True)
        for x, inverse, change in zip(heads, solve, found, strict=True)
    ]
    scores = [own for own, _ in pairs]
    return list(zip(scores, overlaps, solve, found, written, strict=True))


def _forward(
    num: Numerics, decays: list[Shared], heads: list[Inputs], states: list[jax.Array], scale: float
) -> list[tuple[jax.Array, jax.Array]]:
    solved = _solved(num, decays, heads, states)
    read = [d.read(x["q"], state) for d, x, state in zip(decays, heads, states, strict=True)]
    outs = [
        scale * (own + num.dot(scores, u, exact=True))
        for own, (scores, _, _, _, u) in zip(read, solved, strict=True)
    ]
    left = [
        d.carry(state) + d.write(x["k"], u, exact=True)
        for d, x, state, (*_, u) in zip(decays, heads, states, solved, strict=True)
    ]
    return list(zip(outs, left, strict=True))


def _backward(
    num: Numerics,
    decays: list[Shared],
    heads: list[Inputs],
    states: list[jax.Array],
    scale: float,
    d_outs: list[jax.Array],
    d_states: list[jax.Array],
) -> list[dict[str, Any]]:
    solved = _solved(num, decays, heads, states)
    given = zip(decays, heads, states, d_outs, d_states, solved, strict=True)
    return in_step([_pull(num, scale, *head) for head in given])


def _pull(
    num: Numerics,
    scale: float,
    d: Shared,
    x: Inputs,
    state: jax.Array,
    d_out: jax.Array,
    ct: jax.Array,
    solved: tuple[jax.Array, ...],
) -> Generator[None, None, Gradients]:
    q, k, beta = x["q"], x["k"], x["beta"]
    scores, overlaps, inverse, change, u = solved
    below = rows(q.shape[0]) > cols(q.shape[0])
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
    [dq, dk_left], dk_right, spans = d.pairs_back(cts, [q, k], k, pairs, exact=True)
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
        "log_decay": d.spans_back(spans, reads, k * written, d.carry(state) * ct),
    }


_CORE = matrix_state.Core("delta_rule", _forward, _backward)


def forward(*args: Any, **keywords: Any) -> Any:
    """See `matrix_state.forward`."""
    return matrix_state.forward(_CORE, *args, **keywords)


def backward(*args: Any, **keywords: Any) -> Any:
    """See `matrix_state.backward`."""
    return matrix_state.backward(_CORE, *args, **keywords)
