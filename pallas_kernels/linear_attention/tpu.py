"""Linear attention on TPU: o_t = scale * S_t^T q_t, S_t = diag(exp g_t) S_{t-1} + k_t v_t^T.

With D_{t,j} the decays of the steps after j and up to t, and S the state that enters a chunk of C,

    o_t = scale * (S^T D_{t,0} q_t + sum_{j <= t} (q_t^T D_{t,j} k_j) v_j)
    S'  = D_{C,0} S + sum_j D_{C,j} k_j v_j^T

The chunked form of GLA, arXiv 2312.06635; one decay per head: 2405.21060; none: 2006.16236.
"""

from typing import Any

import jax

from pallas_kernels import _matrix_state
from pallas_kernels._chunk import NT, TN, Numerics, Shared

Inputs = dict[str, jax.Array]


def _forward(
    num: Numerics, decays: list[Shared], heads: list[Inputs], states: list[jax.Array], scale: float
) -> list[tuple[jax.Array, jax.Array]]:
    made = []
    for d, x, state in zip(decays, heads, states, strict=True):
        [scores] = d.pairs([x["q"]], x["k"])
        out = scale * (d.read(x["q"], state) + num.dot(scores, x["v"]))
        made.append((out, d.carry(state) + d.write(x["k"], x["v"])))
    return made


def _backward(
    num: Numerics,
    decays: list[Shared],
    heads: list[Inputs],
    states: list[jax.Array],
    scale: float,
    d_outs: list[jax.Array],
    d_states: list[jax.Array],
) -> list[Inputs]:
    made = []
    for d, x, state, d_out, ct in zip(decays, heads, states, d_outs, d_states, strict=True):
        q, k, v = x["q"], x["k"], x["v"]
        d_out = scale * d_out.astype(num.dtype)
        [scores] = d.pairs([q], k)
        [dq], dk = d.pairs_back([num.dot(d_out, v, NT)], [q], k)
        dq = dq + d.read_back(d_out, state)
        dk_written = d.write_back(v, ct)
        dk = dk + dk_written
        q, k = q.astype(num.dtype), k.astype(num.dtype)
        made.append(
            {
                "q": dq,
                "k": dk,
                "v": num.dot(scores, d_out, TN) + d.write_back_values(k, ct),
                "state": d.carry(ct) + d.read_back_state(q, d_out),
                "log_decay": d.log_gradient(q * dq - k * dk, k * dk_written, d.carry(state) * ct),
            }
        )
    return made


_CORE = _matrix_state.Core("linear_attention", _forward, _backward)


def forward(*args: Any, **keywords: Any) -> Any:
    """See `_matrix_state.forward`; `beta` is None."""
    return _matrix_state.forward(_CORE, *args, **keywords)


def backward(*args: Any, **keywords: Any) -> Any:
    """See `_matrix_state.backward`; `beta` is None."""
    return _matrix_state.backward(_CORE, *args, **keywords)
