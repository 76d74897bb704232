"""Linear attention that reads a prefix of each document in both directions."""

import jax
import jax.numpy as jnp

from seqjax.ops.core import checks
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.previous import previous
from seqjax.types import Array, Bool, Float, Reset


def prefix_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    prefix_k: Float[Array, "B T H K"],
    prefix_v: Float[Array, "B T H V"],
    in_prefix: Bool[Array, "B T"],
    *,
    scale: float | Array | None = None,
    reset: Reset | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute linear attention that is causal after a prefix and not inside of it.

        o_t = scale q_t^T (sum_{i <= t} k_i v_i^T + sum_{j in prefix} prefix_k_j prefix_v_j^T)

    Prefix linear attention of Just read twice (arXiv 2407.05483), without decay and normalizer. All
    steps of a document read its whole prefix, the steps of the prefix too: do not train a language
    model on those. Sums run over one document, which `reset` starts.

    Args:
      q, k, v: queries, keys and values, after the feature map.
      prefix_k, prefix_v: keys and values of the prefix, from separate projections. Steps
        outside of the prefix are ignored.
      in_prefix: true at the steps of a document's prefix.
      scale: factor of q, by default K^-0.5.
      reset: [B, T] bool, true at the first step of a document.

    Returns:
      (o, final state [B, H, K, V] of the last document). Continue with `linear_attention`, whose
      steps read the prefix too.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> x, in_prefix = jnp.ones((1, 3, 1, 1)), jnp.array([[True, True, False]])
      >>> y, _ = seqjax.methods.prefix_linear_attention(x, x, x, x, x, in_prefix)
      >>> y.ravel().tolist()
      [3.0, 4.0, 5.0]
    """
    op = "prefix_linear_attention"
    for name, given, wanted in (
        ("prefix_k", prefix_k, k.shape),
        ("prefix_v", prefix_v, v.shape),
        ("in_prefix", in_prefix, k.shape[:2]),
    ):
        if given.shape != wanted:
            raise ValueError(
                f"{op}: `{name}` must have shape {list(wanted)}, got {list(given.shape)}."
            )
    reset = checks.check_reset(op, reset, *k.shape[:2])
    y, state = linear_attention(q, k, v, scale=scale, reset=reset)
    mask = in_prefix[:, :, None, None]
    pairs = tuple(jnp.where(mask, x, jnp.zeros_like(x)) for x in (prefix_k, prefix_v))
    early, prefix = linear_attention(q, *pairs, scale=scale, reset=reset)

    def flipped(x: jax.Array) -> jax.Array:
        return jnp.flip(x, axis=1)

    # The rest of the prefix: the same sums from the end of a document, without the step itself.
    cut = None if reset is None else flipped(jnp.pad(reset[:, 1:], ((0, 0), (0, 1))))
    later, _ = previous(tuple(map(flipped, pairs)), reset=cut)
    late, _ = linear_attention(flipped(q), *later, scale=scale, reset=cut)
    return y + early + flipped(late), state + prefix
