"""Linear attention on TPU: o_t = scale * S_t^T q_t, S_t = diag(exp g_t) S_{t-1} + k_t v_t^T.

With D_{t,j} the decays of the steps after j and up to t, and S the state that enters a chunk of C,

    o_t = scale * (S^T D_{t,0} q_t + sum_{j <= t} (q_t^T D_{t,j} k_j) v_j)
    S'  = D_{C,0} S + sum_j D_{C,j} k_j v_j^T

The chunked form of GLA, arXiv 2312.06635; one decay per head: 2405.21060; none: 2006.16236.
"""

from collections.abc import Callable, Generator
from typing import Any

import jax

from pallas_kernels.tpu import matrix_state
from pallas_kernels.tpu.chunk_math import NT, TN, Numerics, Shared
from pallas_kernels.tpu.head_layout import in_step

Inputs = dict[str, jax.Array]
Gradients = dict[str, Any]  # decays: a `SpansBack`, the others arrays
Steps = Generator[None, None, Any]


def _forward(
    num: Numerics, d: Shared, x: Inputs, state: jax.Array, scale: float
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
    d: Shared,
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
    [dq], dk, spans = d.pairs_back([d_scores], [q], k, [scores])
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
    d_decay = d.spans_back(spans, q * read, k * written, d.carry(state) * ct)
    return {"q": dq + read, "k": dk, "v": dv, "state": d_state, "log_decay": d_decay}


def _each(function: Callable[..., Steps]) -> Callable[..., list[Any]]:
    def run(num: Numerics, decays: Any, heads: Any, states: Any, scale: float, *cts: Any) -> Any:
        given = zip(decays, heads, states, *cts, strict=True)
        return in_step([function(num, d, x, state, scale, *ct) for d, x, state, *ct in given])

    return run


_CORE = matrix_state.Core("linear_attention", _each(_forward), _each(_backward))


def forward(*args: Any, **keywords: Any) -> Any:
    """See `matrix_state.forward`; `beta` is None."""
    return matrix_state.forward(_CORE, *args, **keywords)


def backward(*args: Any, **keywords: Any) -> Any:
    """See `matrix_state.backward`; `beta` is None."""
    return matrix_state.backward(_CORE, *args, **keywords)
