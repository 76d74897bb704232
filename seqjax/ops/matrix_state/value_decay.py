"""Linear attention with a decay per value channel.

    S_t = S_{t-1} diag(exp h_t) + k_t v_t^T        S [K, V],  h = value_log_decay [V]
    o_t = scale * S_t^T q_t

In a chunk that starts from the state S, with E_t = exp(h_1 + ... + h_t) and E_{t,j} = E_t / E_j,

    o_t = E_t * (S^T q_t) + sum_{j <= t} (q_t . k_j) E_{t,j} * v_j

The scores have no decay. The decays from j to t factor at the middle of the smallest block of 1, 2,
4, ... steps that contains both: one factor scales the values, the other the result (`decays`).
"""

import jax.numpy as jnp

from seqjax.ops.core import linalg
from seqjax.ops.matrix_state import block_decays, chunked, decays
from seqjax.ops.matrix_state.recurrence import MatrixRecurrence
from seqjax.types import Array


def decayed_sums(scores: Array, v: Array, g: Array) -> tuple[Array, Array, Array]:
    """Return sums of values that decay per channel, and the decays of a chunk.

        y_t = sum over j <= t of scores[t, j] a_{j+1} ... a_t v_j         a = exp(g)

    Args:
      scores: [..., C, C], C a power of two; elements above the diagonal are not read.
      v: [..., C, V].
      g: [..., C, V].

    Returns:
      (y [..., C, V], a_1 ... a_t [..., C, V], a_{t+1} ... a_C [..., C, V]).
    """
    upto, after = block_decays.block_decays(g, False)
    size = v.shape[-2]
    base = min(size, decays.SUB)

    def corners(width: int, rows: int, columns: int) -> Array:
        """Return a part [width, width] of the scores of every block of rows: [..., n, w, w]."""
        block = max(rows, columns) + width
        starts = range(0, size, block)
        parts = [
            scores[..., i + rows : i + rows + width, i + columns : i + columns + width]
            for i in starts
        ]
        return jnp.stack(parts, axis=-3)

    def blocks(x: Array) -> Array:
        return x.reshape(*x.shape[:-2], size // base, base, x.shape[-1])

    own, steps = corners(base, 0, 0), jnp.arange(base)
    t, j = steps[:, None], steps
    made = linalg.product(jnp.where(t == j, own, jnp.zeros_like(own)), blocks(v))
    for level, width in enumerate(block_decays.widths(1, base)):
        met = (t // (2 * width) == j // (2 * width)) & (t // width > j // width)
        pairs = jnp.where(met, own, jnp.zeros_like(own))
        made = made + blocks(upto[level]) * linalg.product(pairs, blocks(after[level] * v))
    made = made.reshape(*made.shape[:-3], size, made.shape[-1])
    for width in block_decays.widths(base, size):
        level = width.bit_length() - 1
        first, _ = block_decays.halves(after[level] * v, width)
        _, second = block_decays.halves(upto[level], width)
        late = second * linalg.product(corners(width, width, 0), first)
        made = made + block_decays.join(jnp.zeros_like(late), late, made.shape)
    return made, upto[-1], after[-1]


def _step(S: Array, decayed: Array, x: chunked.Arrays) -> Array:
    del decayed
    decay = linalg.down_columns(block_decays.decay_of(x["value_log_decay"]), S.shape[-2])
    return decay * S + linalg.outer(x["k"], x["v"])


def _chunk(x: chunked.Arrays) -> chunked.ChunkMap:
    q, k, v, g = (x[name] for name in ("q", "k", "v", "value_log_decay"))
    g = jnp.where(x["log_decay"], -jnp.inf, g)  # true at resets
    scores = linalg.product(q, k, decays.NT)
    outputs, from_start, to_end = decayed_sums(scores, v, g)
    return chunked.ChunkMap(
        outputs=outputs,
        reads=q,
        offset=linalg.product(k, to_end * v, "ck,cv->kv"),
        transition=from_start[..., -1:, :],
        gain=from_start,
    )


VALUE_DECAY = MatrixRecurrence(
    "linear_attention",
    _step,
    _chunk,
    {"k": "B T G K", "value_log_decay": "B T H V"},
    complex_ok=True,
    has_kernels=True,
    diagonal=True,
)
