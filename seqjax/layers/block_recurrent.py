"""Block-Recurrent Transformer: window attention, and state vectors that change once per block."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.layers import _checks, _init
from seqjax.layers._attention import Rotary, all_finite
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense, layer_normalize, merge_heads, split_heads
from seqjax.layers._window import Window
from seqjax.layers.context import Context
from seqjax.ops.core import jax_compat, sequence_parallel

Array = jax.Array
# The states that a token sees: those before its chunk of steps, those of the block that began in
# the chunk, and the learned start.
BEFORE, UPDATED, START = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class BlockRecurrent(Layer):
    """The recurrent layer of the Block-Recurrent Transformer (arXiv 2203.07852).

        q_t, k_t, v_t, p_t = x_t W_q, x_t W_k, x_t W_v, x_t W_p       tokens, per head
        n = layernorm(C) + E;   Q, K, V, P = n W_q', n W_k', n W_v', n W_p'       S states
        o_t = [attention(q_t; k, v of the last `window` tokens), attention(p_t; K, V)]
        y_t = o_t W_o
        z = [attention(Q; K, V), attention(P; k, v of the block)] W_z + b_z
        C <- g * C + (1 - g) * z,   g = sigmoid(b_g)                  after each block

    A block is `window` tokens. It begins at the start of a sequence and at every reset, so that a
    token sees the states C of the block's start. The attention over tokens slides, and has rotary
    embeddings; that over states has no positions but the learned E. All scores are scaled by
    K^-0.5. This is the variant with a fixed gate and without an inner MLP, the best one on three
    of the paper's four data sets ("fixed, skip").

    One update per block depends on the one before. All else runs in parallel. With `sequence_axis`
    the devices work in turn.

    Departures: the authors' code adds biases of relative positions in place of rotary embeddings,
    normalizes queries and keys, and lets the states also see the block before. The residual
    connections and MLPs are those of the block around the layer.

    Initialization: projections normal with variance 1/fan_in; C_0, E and b_g normal with standard
    deviation 0.1 (E has 1 in the authors' code).

    Parameters: q_proj, k_proj, v_proj, cross_proj (W_p) [dim, dim], out_proj [2 dim, dim];
    state_q_proj, state_k_proj, state_v_proj, state_cross_proj [dim, dim], state_out_proj
    [2 dim, dim], state_out_bias, state_gate [dim], state_norm [dim], state_positions, state_start
    [S, dim].
    State: {"k", "v" [B, window - 1, H, K], "valid" [B, window - 1], "states" [B, S, dim], "index"
    [B]}: the last tokens, the difference of C from C_0, and the tokens of the block so far.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = BlockRecurrent(dim=8, heads=2, window=4, states=3)
      >>> params = layer.init(jax.random.key(0))
      >>> y, state = layer.apply(params, jnp.ones((2, 5, 8)))
      >>> y_next, state = layer.step(params, jnp.ones((2, 8)), state)
      >>> y.shape, y_next.shape, state["states"].shape, state["index"].tolist()
      ((2, 5, 8), (2, 8), (2, 3, 8), [2.0, 2.0])

    Attributes:
      dim: features of input and output.
      heads: number of heads H, with K = dim / H features each, an even number.
      window: tokens in a block, and in the window of the attention.
      states: number of state vectors S.
      rotary_base: base of the rotary frequencies.
      norm_eps: constant added to the variance in the norm of the states.
    """

    dim: int
    heads: int
    window: int = 512
    states: int = 512
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        size = _checks.head_dim(self, self.dim, self.heads, None)
        _checks.positive(self, window=self.window, states=self.states)
        _checks.require(
            self,
            size % 2 == 0,
            f"`dim` / `heads` must be even for rotary embeddings, got {size}.",
        )
        _checks.above_zero(self, rotary_base=self.rotary_base, norm_eps=self.norm_eps)

    @property
    def head_dim(self) -> int:
        """Features per head K."""
        return self.dim // self.heads

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, small = self.dim, _init.normal(0.1)
        inward = Param((dim, dim), ("embed", "heads"), "weight", _init.fan_in_normal)
        outward = Param((2 * dim, dim), ("heads", "embed"), "weight", _init.fan_in_normal)
        by_state = Param((self.states, dim), (None, "embed"), "recurrence", small)
        names = ("q", "k", "v", "cross")
        return {
            **{f"{name}_proj": inward for name in names},
            "out_proj": outward,
            **{f"state_{name}_proj": inward for name in names},
            "state_out_proj": outward,
            "state_out_bias": Param((dim,), ("embed",), "bias", _init.zeros),
            "state_gate": Param((dim,), ("embed",), "recurrence", small),
            "state_norm": Param((dim,), ("embed",), "norm", _init.ones),
            "state_positions": by_state,
            "state_start": by_state,
        }

    def make_state(self, batch_size: int, dtype: Any) -> State:
        tokens = jnp.zeros((batch_size, self.window - 1, self.heads, self.head_dim), dtype)
        return {
            "k": tokens,
            "v": tokens,
            "valid": jnp.zeros((batch_size, self.window - 1), jnp.bool_),
            "states": jnp.zeros((batch_size, self.states, self.dim), dtype),
            "index": jnp.zeros((batch_size,), dtype),
        }

    def state_flops(self) -> int:
        # Scores and sums over the window and over the states by tokens; per block, those of the
        # states over the block and themselves, and six projections of each state.
        updates = self.states * (self.window + self.states + 3 * self.dim) // self.window
        return 4 * self.dim * (self.window + self.states + updates)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        tokens = {
            name: split_heads(dense(x, params[f"{name}_proj"]), self.heads)
            for name in ("q", "k", "v", "cross")
        }
        o, new_state = _run(self, params, tokens, state, context.reset, context.sequence_axis)
        return dense(o.astype(x.dtype), params["out_proj"]), new_state

    def keys_of(self, params: Params, states: Array) -> dict[str, Array]:
        """Return the queries, keys and values [B, S, H, K] of the states [B, S, dim]."""
        z = layer_normalize(states, params["state_norm"], None, self.norm_eps)
        z = z + params["state_positions"].astype(z.dtype)
        return {
            name: split_heads(dense(z, params[f"state_{name}_proj"]), self.heads)
            for name in ("q", "k", "v", "cross")
        }

    def updated(self, params: Params, states: Array, k: Array, v: Array) -> Array:
        """Return the states [B, S, dim] after a block with keys and values [B, window, H, K]."""
        own = self.keys_of(params, states)
        seen = [_attend(own["q"], own["k"], own["v"]), _attend(own["cross"], k, v)]
        z = dense(jnp.concatenate([merge_heads(z) for z in seen], -1), params["state_out_proj"])
        z = z + params["state_out_bias"].astype(z.dtype)
        gate = jax.nn.sigmoid(params["state_gate"].astype(z.dtype))
        return gate * states + (1 - gate) * z


def _attend(q: Array, k: Array, v: Array) -> Array:
    """Attend from q [B, L, H, K] to all of k, v [B, S, H, K]."""
    scores = jnp.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(scores, axis=-1), v)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _run(
    layer: BlockRecurrent,
    params: Params,
    tokens: dict[str, Array],
    state: State,
    reset: Array | None,
    sequence_axis: str | None,
) -> tuple[Array, State]:
    leaves, tree = jax.tree.flatten((params, tokens, state, reset))
    params, tokens, state, reset = jax.tree.unflatten(tree, jax_compat.match_varying(*leaves))

    def local(state: State) -> tuple[Array, State]:
        return _local(layer, params, tokens, state, reset)

    if sequence_axis is None:
        return local(state)
    return sequence_parallel.in_turn(local, state, sequence_axis)


def _local(
    layer: BlockRecurrent,
    params: Params,
    tokens: dict[str, Array],
    state: State,
    reset: Array | None,
) -> tuple[Array, State]:
    """Return [B, T, 2 dim], the sums over tokens and over states, and the final state."""
    size, wide = layer.window, state_dtype(tokens["q"].dtype)
    batch, length = tokens["q"].shape[:2]
    window = Window(size, Rotary(layer.head_dim, layer.rotary_base), layer.head_dim**-0.5)
    cache = {name: state[name] for name in ("k", "v", "valid")}
    q, k, v = tokens["q"][:, :, :, None], tokens["k"], tokens["v"]
    o, cache_after = window.attend(q, k, v, cache, Context(reset))

    # Positions in the blocks. A chunk of at most `size` steps has at most one end of a block.
    steps = jnp.arange(length, dtype=jnp.int32)
    since = jnp.full((batch, length), -1, jnp.int32)
    if reset is not None:
        since = lax.cummax(jnp.where(reset, steps, since), axis=1)
    index = state["index"].astype(jnp.int32)[:, None] + steps
    index = jnp.where(since >= 0, steps - since, index) % size
    chunk = min(size, length) if isinstance(length, int) else 1
    count = -(-length // chunk)

    def chunks(z: Array, fill: Any = 0) -> Array:
        """Reshape [B, T, ...] to [n, B, chunk, ...]."""
        if chunk > 1:
            widths = ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (z.ndim - 2)
            z = jnp.pad(z, widths, constant_values=fill)
        return jnp.moveaxis(z.reshape(batch, count, chunk, *z.shape[2:]), 1, 0)

    ends = chunks(index == size - 1, fill=False)
    cuts = jnp.zeros_like(ends) if reset is None else chunks(reset, fill=False)
    end = jnp.argmax(ends, axis=-1).astype(jnp.int32)  # [n, B]
    has_end = jnp.any(ends, axis=-1)
    place = jnp.arange(chunk, dtype=jnp.int32)
    cut_until = lax.cummax(jnp.where(cuts, place, -1), axis=2)
    ended = has_end[..., None] & (place > end[..., None])
    source = jnp.where(cut_until >= 0, START, jnp.where(ended, UPDATED, BEFORE))
    first = cuts[..., 0]  # only such a block begins and ends in the same chunk
    last_cut = cut_until[..., -1]
    after = jnp.where(last_cut >= 0, START, BEFORE)
    after = jnp.where(has_end & (end >= last_cut), UPDATED, after)

    # Tokens of the blocks that end: the cache, then the steps. Zeros in place of non-finite values
    # keep 0 * NaN out of the products.
    fine = all_finite(k) & all_finite(v)
    rows = jnp.arange(count, dtype=jnp.int32)[:, None] * chunk + end  # of the block's last token
    rows = rows[..., None] + jnp.arange(size, dtype=jnp.int32)
    rows = jnp.moveaxis(rows, 0, 1).reshape(batch, -1)

    def blocks(z: Array, cached: Array) -> Array:
        """Return [n, B, window, ...]: the tokens of the block that ends in each chunk."""
        z = jnp.concatenate([cached.astype(z.dtype), z], axis=1)
        wanted = rows.reshape(*rows.shape, *(1,) * (z.ndim - 2))
        found = jnp.take_along_axis(z, wanted, axis=1, mode="clip")
        return jnp.moveaxis(found.reshape(batch, count, size, *z.shape[2:]), 1, 0)

    cached_fine = all_finite(cache["k"]) & all_finite(cache["v"])
    good = jnp.all(blocks(fine, cached_fine), axis=-1)
    k, v = (_where(fine, z.astype(wide), 0) for z in (k, v))
    k, v = (blocks(z, _where(cached_fine, cache[n], 0)) for n, z in (("k", k), ("v", v)))
    fine_cross = all_finite(tokens["cross"])
    cross = chunks(_where(fine_cross, tokens["cross"].astype(wide), 0))

    start = params["state_start"].astype(wide)
    params = params | {"state_start": start}
    entering, lost = _finite(state["states"])
    inputs = (cross, k, v, good, source, first, after)
    chunk_of = functools.partial(_chunk, layer, params)
    # Checkpointed: the stored residuals are the inputs and one set of states per chunk.
    body = jax.checkpoint(chunk_of, prevent_cse=False)
    (states, lost), seen = lax.scan(body, (entering, lost), inputs)
    seen = jnp.moveaxis(seen, 0, 1).reshape(batch, -1, layer.dim)[:, :length]
    seen = _where(fine_cross, seen, jnp.nan)
    new_state = cache_after | {
        "states": _where(lost, jnp.full_like(states, jnp.nan), states),
        "index": ((index[:, -1] + 1) % size).astype(wide),
    }
    o = merge_heads(o[:, :, :, 0]).astype(wide)
    return jnp.concatenate([o, seen], axis=-1), new_state


def _chunk(layer: BlockRecurrent, params: Params, carry: Any, inputs: Any) -> Any:
    """Update the states in a chunk, and attend from its tokens to the states that they see."""
    (change, lost), (cross, k, v, good, source, first, after) = carry, inputs
    start = params["state_start"]
    before = start + change
    of_block = _where(first, jnp.broadcast_to(start, before.shape), before)
    if cross.shape[1] == 1:  # a step: most steps end no block, and an update costs much more
        needed = jnp.any(after == UPDATED)
        new = lax.cond(needed, lambda: layer.updated(params, of_block, k, v), lambda: of_block)
    else:
        new = layer.updated(params, of_block, k, v)
    updated, broken = _finite(new - start)
    broken = broken | ~good | (lost & ~first)
    changes = [change, updated, jnp.zeros_like(change)]
    bad = jnp.stack([lost, broken, jnp.zeros_like(lost)])
    o = jnp.zeros_like(cross)
    for which, z in enumerate(changes):
        own = layer.keys_of(params, start + z)
        o = _where(source == which, _attend(cross, own["k"], own["v"]), o)
    o = merge_heads(o)
    o = _where(jnp.take_along_axis(bad.T, source, axis=1), jnp.nan, o)
    left = _where(after == BEFORE, change, _where(after == UPDATED, updated, changes[START]))
    return (left, jnp.take_along_axis(bad, after[None], axis=0)[0]), o


def _where(mask: Array, x: Any, y: Any) -> Array:
    ndim = max(jnp.ndim(x), jnp.ndim(y))
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim)), x, y)


def _finite(z: Array) -> tuple[Array, Array]:
    """Return z [B, ...], zero in sequences that are not finite, and [B] these."""
    lost = ~all_finite(z[:, None])[:, 0]
    return _where(lost, jnp.zeros_like(z), z), lost
