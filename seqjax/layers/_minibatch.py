"""Memories that learn at test time: small networks whose weights are updated in mini-batches.

A state is a list of n arrays S_0 .. S_{n-1}, each shaped like the weights of the network, per head:

    S_0        the anchor, the weights at the start of the mini-batch
    g_t        the gradient of the loss of token t at the anchor
    S         <- F_t S + e_t g_t                    F_t [n, n] and e_t [n] per token and head
    y_t        = network(c_t . S, q_t)              c_t [n]
    S_0       <- c_t . S, the others times `kept`   after the last token of a mini-batch

Every sequence counts its mini-batches from its start or its last reset.

Algorithm: time is cut into blocks of at most one mini-batch. A gradient of an affine map is an
outer product x_t d_t^T. So inside a block, every S is a sum of the learned start, the n entering
states and the outer products of the block. `_coordinates` computes the coefficients of these sums
for all blocks at once: they do not depend on the weights, and contain resets and mini-batches that
start anywhere. The products with S are then masked matrix products.

At most one anchor in a block depends on gradients of the same block: the one of a mini-batch that
follows the entering one. After a reset the anchor is the learned start, and the block ends before
the mini-batch does. So gradients are computed twice: the second pass has all anchors right.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.layers._attention import all_finite
from seqjax.layers._base import Layer, Params, State
from seqjax.layers._network import Network
from seqjax.layers.context import Context
from seqjax.ops.core import jax_compat, sequence_parallel
from seqjax.ops.core.linalg import matmul

Array = jax.Array


class Updates(NamedTuple):
    """Updates of all tokens: the arrays of the module's equations."""

    q: Array  # [B, T, H, K]
    k: Array  # [B, T, H, K]
    v: Array  # [B, T, H, V]
    write: Array  # e, [B, T, H, n]
    read: Array  # c, [B, T, H, n]
    transition: Array | None = None  # F, [B, T, H, n, n]; None for the identity


class MemoryLayer(Layer):
    """Base class of layers whose memory is a network that learns in mini-batches.

    A subclass defines `network`, `updates` and `inner_loss`, has a field `mini_batch`, and calls
    `scan_memory`.
    """

    mini_batch: int

    # The multiple of the learned start in each fresh state, and what the end of a mini-batch
    # multiplies the states after the anchor by.
    _fresh: ClassVar[tuple[float, ...]]
    _kept: ClassVar[tuple[float, ...]]

    @property
    @abc.abstractmethod
    def network(self) -> Network:
        """The memory."""

    @abc.abstractmethod
    def updates(self, params: Params, tokens: Mapping[str, Array], index: Array) -> Updates:
        """Return the updates of tokens [B, T, ...]; `index` [B, T] counts in the mini-batch."""

    @abc.abstractmethod
    def inner_loss(self, params: Params, y: Array, k: Array, v: Array) -> Array:
        """Return the sum of the losses of the memory's outputs y [B, H, T, V]."""

    def readout(self, params: Params, y: Array, q: Array) -> Array:
        """Return outputs from the memory's answers y [B, H, T, V]; by default `y`."""
        return y

    def memory_state(self, batch_size: int, dtype: Any) -> State:
        """Return the state of `scan_memory` before the first token."""
        count, heads = len(self._fresh), self.network.heads
        return {
            "change": [
                jnp.zeros((batch_size, heads, count, *shape), dtype)
                for shape in self.network.shapes
            ],
            "start": jnp.broadcast_to(jnp.asarray(self._fresh, dtype), (batch_size, heads, count)),
            "index": jnp.zeros((batch_size,), dtype),
        }

    def state_flops(self) -> int:
        # Of each weight: the forward pass 2, the backward pass 2 where there is a hidden layer,
        # the writes 2 for each state but the anchor, the read 2.
        backward = 2 * (len(self.network.sizes) > 2)
        return (4 + backward + 2 * (len(self._fresh) - 1)) * self.network.size

    def scan_memory(
        self, params: Params, tokens: Mapping[str, Array], state: State, context: Context
    ) -> tuple[Array, State]:
        """Return what the memory answers to the queries [B, T, H, V], and the final state."""
        return _run(self, params, dict(tokens), state, context.reset, context.sequence_axis)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _run(
    layer: MemoryLayer,
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
    layer: MemoryLayer,
    params: Params,
    tokens: dict[str, Array],
    state: State,
    reset: Array | None,
) -> tuple[Array, State]:
    """Return the outputs and the final state of one shard."""
    size, change = layer.mini_batch, state["change"]
    dtype = change[0].dtype
    batch, length = next(iter(tokens.values())).shape[:2]
    # Under `jax.export` T may be a symbol.
    block = min(size, length) if isinstance(length, int) else 1
    steps = jnp.arange(length, dtype=jnp.int32)
    since = jnp.full((batch, length), -1, jnp.int32)  # the last reset
    if reset is not None:
        since = lax.cummax(jnp.where(reset, steps, since), axis=1)
    entering = state["index"].astype(jnp.int32)[:, None]
    index = jnp.where(since >= 0, steps - since, entering + steps) % size

    # Zeros instead of non-finite values keep 0 * NaN out of the products; see `_Block`.
    fine = functools.reduce(jnp.logical_and, map(all_finite, tokens.values()))
    tokens = {name: _where(fine, z, jnp.zeros_like(z)) for name, z in tokens.items()}
    updates = layer.updates(params, tokens, index)
    updates = Updates(*jax.tree.map(lambda z: z.astype(dtype), tuple(updates)))
    last = index == size - 1
    y, numbers, lost = _scan(layer, params, updates, state, fine, last, reset, block)
    start, *change = (_where(lost, jnp.full_like(s, jnp.nan), s) for s in numbers)
    count = (index[:, -1] + 1) % size
    return y, {"change": change, "start": start, "index": count.astype(dtype)}


def _where(mask: Array, x: Array, y: Array) -> Array:
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, y)


def _coordinates(
    layer: MemoryLayer, updates: Updates, last: Array, reset: Array | None, valid: Array
) -> tuple[Array, Array, Array]:
    """Return coefficients of the anchors, of the weights that are read, and of the final states.

    The coefficients of a sum are those of the learned start, of the n states before the block, and
    of the c gradients of the block.

    Args:
      layer: the layer.
      updates: of blocks: [m, c, B, ...].
      last: [m, c, B] bool, True for the last token of a mini-batch.
      reset: [m, c, B] bool.
      valid: [m, c, B] bool, False for padding.

    Returns:
      ([m, c, B, H, 1 + n + c], the same, [m, B, H, n, 1 + n + c]).
    """
    write, read, transition = updates.write, updates.read, updates.transition
    (blocks, steps, batch), (heads, count), dtype = last.shape, write.shape[3:], write.dtype
    fresh = jnp.asarray(layer._fresh, dtype)[:, None]
    fresh = jnp.pad(fresh, ((0, 0), (0, count + steps)))
    kept = jnp.asarray(layer._kept, dtype)[:, None]
    first = jnp.eye(count, 1 + count + steps, 1, dtype=dtype)
    first = jnp.broadcast_to(first, (blocks, batch, heads, *first.shape))
    first, _ = jax_compat.match_varying(first, write)
    gradients = jnp.eye(steps, 1 + count + steps, 1 + count, dtype=dtype)

    def step(z: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        e, c, f, own, ends, cut, real = inputs
        if cut is not None:
            z = _where(cut, jnp.broadcast_to(fresh, z.shape), z)
        new = z if f is None else jnp.sum(f[..., None] * z[..., None, :, :], axis=-2)
        new = new + e[..., None] * own
        value = jnp.sum(c[..., None] * new, axis=-2)
        begun = jnp.concatenate([value[..., None, :], kept * new[..., 1:, :]], axis=-2)
        return _where(real, _where(ends, begun, new), z), (z[..., 0, :], value)

    inputs = (write, read, transition, None, last, reset, valid)
    by_step = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), inputs)
    final, (anchor, value) = lax.scan(step, first, (*by_step[:3], gradients, *by_step[4:]))
    return jnp.moveaxis(anchor, 0, 1), jnp.moveaxis(value, 0, 1), final


def _scan(
    layer: MemoryLayer,
    params: Params,
    updates: Updates,
    state: State,
    fine: Array,
    last: Array,
    reset: Array | None,
    block: int,
) -> tuple[Array, list[Array], Array]:
    """Return the outputs [B, T, H, V], the final numbers, and [B], where these should be NaN."""
    batch, length = fine.shape
    blocks = -(-length // block)

    def to_blocks(z: Array) -> Array:
        """Reshape [B, T, ...] to [m, c, B, ...], padded with zeros."""
        z = jnp.moveaxis(z, 1, 0)
        if block > 1:
            z = jnp.pad(z, ((0, blocks * block - length),) + ((0, 0),) * (z.ndim - 1))
        return z.reshape(blocks, block, *z.shape[1:])

    valid = jnp.ones((batch, length), bool)
    every = (updates, last, reset, valid, ~fine)
    updates, last, reset, valid, bad = jax.tree.map(to_blocks, every)
    coordinates = _coordinates(layer, updates, last, reset, valid)
    learned = layer.network.weights(params, updates.q.dtype)

    def advance(carry: Any, inputs: Any) -> tuple[Any, Array]:
        by_head = [jnp.moveaxis(z, 0, 2) for z in inputs[:5]]
        return _Block(layer, params, learned, *carry, *by_head, *inputs[5:]).run()

    # Checkpointed: the stored residuals are the inputs and one state per block.
    advance = jax.checkpoint(advance, prevent_cse=False)
    inputs = (*updates[:3], *coordinates, bad, reset)
    lost = ~jnp.isfinite(state["index"])
    entering = _finite([state["start"], *state["change"]], lost)
    (numbers, lost), y = lax.scan(advance, entering, inputs)
    return jnp.moveaxis(y.reshape(-1, *y.shape[2:])[:length], 0, 1), numbers, lost


def _finite(numbers: list[Array], lost: Array) -> tuple[list[Array], Array]:
    """Return the numbers, zero in sequences that are not finite or lost, and [B] these."""
    fine = [all_finite(s[:, None])[:, 0] for s in numbers]
    kept = functools.reduce(jnp.logical_and, fine, ~lost)
    return [_where(kept, s, jnp.zeros_like(s)) for s in numbers], ~kept


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of tokens.

    Non-finite inputs, gradients and states are replaced by zeros, so that no product spreads them
    over a reset. A memory never forgets entirely: the outputs of the following tokens and the state
    are NaN, until the next reset.
    """

    layer: MemoryLayer
    params: Params
    learned: list[Array]
    numbers: list[Array]  # before the block
    lost: Array  # [B]
    q: Array  # [B, H, c, K], as all five up to `read`
    k: Array
    v: Array
    anchor: Array
    read: Array
    final: Array  # [B, H, n, 1 + n + c]
    bad: Array  # [c, B]
    reset: Array | None  # [c, B]

    def run(self) -> tuple[Any, Array]:
        """Return the numbers after the block with [B], where these are lost, and the outputs."""
        layer, size = self.layer, self.bad.shape[0]
        written, good = self.gradients(None)
        if size > 1:
            written, good = self.gradients(written)
        y, _ = layer.network(functools.partial(self.product, self.read, written), self.q)
        y = jnp.moveaxis(layer.readout(self.params, y, self.q), 2, 0)
        # Steps of the last reset and of the last bad token; the entering state is step -1.
        steps = jnp.arange(size, dtype=jnp.int32)[:, None]
        since = jnp.full(self.bad.shape, -1, jnp.int32)
        if self.reset is not None:
            since = lax.cummax(jnp.where(self.reset, steps, since), axis=0)
        before = jnp.where(self.lost, -1, -2).astype(jnp.int32)
        bad = lax.cummax(jnp.where(self.bad | ~good, steps, before), axis=0) >= since
        # Selected: no cotangent of a NaN output may enter the products.
        y = _where(bad, jnp.full_like(y, jnp.nan), y)
        return _finite(self.ending(written), bad[-1]), y

    def product(self, coords: Array, written: Any, i: int, z: Array) -> Array:
        """Return z times matrix i of the weights with these coordinates."""
        start, change = self.numbers[0], self.numbers[1 + i]
        fixed, states, own = jnp.split(coords, [1, 1 + change.shape[2]], axis=-1)
        fixed = fixed + matmul(states, start[..., None])
        y = jnp.einsum("bhci,hio->bhco", z, self.learned[i], precision=lax.Precision.HIGHEST)
        spread = (states[..., None] * z[..., None, :]).reshape(*z.shape[:-1], -1)
        y = fixed * y + matmul(spread, change.reshape(*spread.shape[:2], -1, y.shape[-1]))
        if written is None:
            return y
        x, d = written[i]
        return y + matmul(own * matmul(z, x.mT), d)

    def gradients(self, written: Any) -> tuple[list[tuple[Array, Array]], Array]:
        """Return the inputs of the affine maps with the gradients of their outputs.

        The gradient of a matrix is the outer product of both. Also return [c, B], where both are
        finite. The others are replaced by zeros.
        """
        network = self.layer.network

        def loss(taps: list[Array]) -> tuple[Array, list[Array]]:
            def tapped(i: int, z: Array) -> Array:
                return self.product(self.anchor, written, i, z) + taps[i]

            y, inputs = network(tapped, self.k)
            return self.layer.inner_loss(self.params, y, self.k, self.v), inputs

        taps = [jnp.zeros((*self.k.shape[:-1], o), self.k.dtype) for _, o in network.shapes]
        # The taps vary over the mesh axes of the data, as their cotangents do.
        taps = [jax_compat.match_varying(tap, self.k)[0] for tap in taps]
        d, x = jax.grad(loss, has_aux=True)(taps)
        good = functools.reduce(jnp.logical_and, (jnp.isfinite(z).all((1, 3)) for z in (*x, *d)))
        chosen = good[:, None, :, None]
        x, d = ([jnp.where(chosen, z, jnp.zeros_like(z)) for z in zs] for zs in (x, d))
        return list(zip(x, d, strict=True)), good.T

    def ending(self, written: list[tuple[Array, Array]]) -> list[Array]:
        """Return the numbers after the block."""
        start, *changes = self.numbers
        fixed, states, own = jnp.split(self.final, [1, 1 + start.shape[-1]], axis=-1)
        found = [(fixed + matmul(states, start[..., None]))[..., 0]]
        for change, (x, d) in zip(changes, written, strict=True):
            carried = matmul(states, change.reshape(*states.shape[:3], -1))
            weighted = own[..., None] * x[:, :, None]
            added = jnp.einsum("bhnci,bhco->bhnio", weighted, d, precision=lax.Precision.HIGHEST)
            found.append(carried.reshape(added.shape) + added)
        return found
