"""Backbone: a stack of residual blocks, which is a layer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._stacked import Stacked
from seqjax.layers.context import BACKBONE_INPUT, Context
from seqjax.layers.dropout import check_rate
from seqjax.layers.mlp import GatedMLP
from seqjax.layers.norm import NORMS, NormKind
from seqjax.models.block import Block, merge_shared
from seqjax.ops.core import jax_compat


@dataclasses.dataclass(frozen=True)
class Backbone(Layer):
    """A stack of residual blocks and a final norm.

    `blocks` is one layer or `Block`, or a sequence of them, which may differ (a hybrid). The
    sequence is repeated until there are `depth` blocks. A layer that is not a `Block` becomes a
    pre-norm block with a `GatedMLP`; pass a `Block` for any other kind. The state is a tuple with
    the state of each block. Parameters that blocks share are under "shared"; see
    `SharedTransformer`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import LRU, SlidingWindowAttention
      >>> hybrid = Backbone([LRU(8), LRU(8), SlidingWindowAttention(8, heads=2, window=4)], depth=6)
      >>> y, state = hybrid.apply(hybrid.init(jax.random.key(0)), jnp.ones((2, 5, 8)))
      >>> y.shape, len(state)
      ((2, 5, 8), 6)
      >>> Backbone([Block(LRU(8), norm="layer"), LRU(8)], mlp_ratio=2)
      Backbone([Block(mixer=LRU(dim=8), norm='layer'), LRU(dim=8)], mlp_ratio=2)

    Attributes:
      blocks: layers and blocks, repeated in this order.
      depth: number of blocks, a multiple of the number of `blocks`; by default that number.
      mlp_ratio: hidden features of the MLP per feature in blocks made from layers, rounded up to a
        multiple of 8; 0 for no MLP.
      norm: kind of norm in blocks made from layers, and of the final norm; see `Block`.
      norm_eps: constant added to the mean square or the variance of these norms.
      dropout: rate of dropout in blocks made from layers; see `Block`.
      remat: recompute each block in the backward pass instead of storing its residuals.
      scan: run equal blocks in a `lax.scan`, with their parameters stacked along a first axis
        `layers`. One block is compiled for any depth. The parameters are then
        {"group_0": ..., "final_norm"}, with a group for each of the repeated blocks. Outputs and
        states are unchanged.
      constrain: `constrain(array, axes)` sets the sharding of an array on a mesh, given a logical
        name for each axis. It is called for the residual stream, ("batch", None, None), before each
        block or scan step and after the last, and for a model's embedding table. See
        `seqjax.sharding.constrain_activations`.
    """

    blocks: Layer | Sequence[Layer]
    depth: int | None = None
    mlp_ratio: float = 8 / 3
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    remat: bool = False
    scan: bool = False
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] | None = None

    def __post_init__(self) -> None:
        _checks.require(
            self,
            isinstance(self.blocks, Layer | Sequence),
            f"`blocks` must be a seqjax layer or a sequence of layers, got {self.blocks!r}.",
        )
        blocks = (self.blocks,) if isinstance(self.blocks, Layer) else tuple(self.blocks)
        _checks.require(self, len(blocks) > 0, "`blocks` must hold at least one layer, got none.")
        for block in blocks:
            _checks.require(
                self,
                isinstance(block, Layer),
                f"`blocks` must be seqjax layers, got {block!r}.",
            )
            _checks.require(
                self,
                block.dim == blocks[0].dim,
                "all `blocks` must have the same dim, got"
                f" {', '.join(f'{type(b).__name__}(dim={b.dim})' for b in blocks)}.",
            )
        object.__setattr__(self, "blocks", blocks)
        if self.depth is not None:
            _checks.positive(self, depth=self.depth)
            _checks.require(
                self,
                self.depth % len(blocks) == 0,
                f"`depth` must be a multiple of the number of blocks, {len(blocks)}, got"
                f" {self.depth}; pass as many layers as blocks, or leave depth out.",
            )
        _checks.require(
            self, self.mlp_ratio >= 0, f"`mlp_ratio` must be >= 0, got {self.mlp_ratio}."
        )
        _checks.one_of(self, "norm", self.norm, NORMS)
        check_rate(self, "dropout", self.dropout)

    def __repr__(self) -> str:
        """Return the call that makes the backbone, with repeated blocks once and no defaults."""
        assert isinstance(self.blocks, tuple)
        given = repr(self.blocks[0] if len(self.blocks) == 1 else list(self.blocks))
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                given += f", {field.name}={value!r}"
        return f"Backbone({given})"

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Number of features, that of the blocks."""
        assert isinstance(self.blocks, tuple)
        return self.blocks[0].dim

    @property
    def causal(self) -> bool:
        """True if all blocks are causal."""
        return all(block.causal for block in self.stack)

    @property
    def stack(self) -> tuple[Block, ...]:
        """All blocks, in order."""
        assert isinstance(self.blocks, tuple)
        mlp_dim = -int(-self.mlp_ratio * self.dim // 8) * 8
        mlp = GatedMLP(self.dim, mlp_dim) if mlp_dim else None
        blocks = tuple(
            block
            if isinstance(block, Block)
            else Block(block, mlp, norm=self.norm, norm_eps=self.norm_eps, dropout=self.dropout)
            for block in self.blocks
        )
        return blocks if self.depth is None else blocks * (self.depth // len(blocks))

    @property
    def _final_norm(self) -> Layer:
        return NORMS[self.norm](self.dim, self.norm_eps)

    def _groups(self) -> dict[str, Stacked]:
        """Return the repeated blocks, each with the number of its repetitions."""
        blocks = self.stack
        depth = len(blocks)
        period = next(
            p for p in range(1, depth + 1) if depth % p == 0 and blocks[p:] == blocks[: depth - p]
        )
        return {f"group_{i}": Stacked(blocks[i], depth // period, "layers") for i in range(period)}

    def declare_params(self) -> Mapping[str, Param | Layer]:
        blocks: Mapping[str, Layer]
        if self.scan:
            blocks = self._groups()
        else:
            blocks = {f"block_{i}": block for i, block in enumerate(self.stack)}
        shared = merge_shared(self, self.stack)
        held = {"shared": _SharedParams(tuple(sorted(shared.items())))} if shared else {}
        return {**blocks, **held, "final_norm": self._final_norm}

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return tuple(block.make_state(batch_size, dtype) for block in self.stack)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        values: dict[str, jax.Array] = {}
        for block in self.stack:
            values |= block.make_values(x.shape[0], x.shape[1], x.dtype)
        if BACKBONE_INPUT in values:
            values[BACKBONE_INPUT] = x
        values |= self._visible_params(params)
        x, *leaves = jax_compat.match_varying(x, *values.values())
        values = dict(zip(values, leaves, strict=True))
        context = dataclasses.replace(context, shared=params.get("shared", {}))
        run = self._scan_blocks if self.scan else self._run_blocks
        x, new_state = run(params, x, state, values, context)
        x = self._constrained(x)
        return self._final_norm.forward(params["final_norm"], x, (), context)[0], new_state

    def _visible_params(self, params: Params) -> dict[str, jax.Array]:
        """Return the parameters that blocks share, stacked along a first axis by block."""
        if self.scan:
            blocks: dict[str, Layer] = {name: group.layer for name, group in self._groups().items()}
        else:
            blocks = {f"block_{i}": block for i, block in enumerate(self.stack)}
        found: dict[str, list[jax.Array]] = {}
        for name, block in blocks.items():
            for key, values in block.visible_params(params[name]).items():
                found.setdefault(key, []).extend(values)
        if not self.scan:
            return {key: jnp.stack(rows) for key, rows in found.items()}
        # A group has the rows of its repetitions, which alternate with those of other groups.
        return {
            key: jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])
            for key, rows in found.items()
        }

    def _constrained(self, x: jax.Array) -> jax.Array:
        return x if self.constrain is None else self.constrain(x, ("batch", None, None))

    def _caller(self, block: Block, context: Context) -> Callable[..., Any]:
        """Return a pure function that runs one block and also returns its extra outputs."""

        def call(
            params: Params,
            x: jax.Array,
            state: State,
            values: dict[str, jax.Array],
            index: Any,
            reset: jax.Array | None,
            key: jax.Array | None,
        ) -> tuple[jax.Array, State, dict[str, jax.Array], dict[str, Any]]:
            inner = dataclasses.replace(
                context,
                reset=reset,
                key=None if key is None else jax.random.fold_in(key, index),
                block=index,
                depth=len(self.stack),
                path=(),
                values=dict(values),
                aux={},
            )
            x, state = block.forward(params, x, state, inner)
            undeclared = sorted(inner.values.keys() - values.keys())
            _checks.require(
                self,
                not undeclared,
                f"a block wrote the values {', '.join(undeclared)}, which no `make_values`"
                " declares; declare them in the layer that writes them.",
            )
            return x, state, inner.values, inner.aux

        return jax.checkpoint(call) if self.remat else call

    def _record(self, context: Context, index: int, aux: dict[str, Any]) -> None:
        for name, value in aux.items():
            context.enter(f"block_{index}").record(name, value)

    def _run_blocks(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        values: dict[str, jax.Array],
        context: Context,
    ) -> tuple[jax.Array, State]:
        new_state = []
        for i, (block, own) in enumerate(zip(self.stack, state, strict=True)):
            x, own, values, aux = self._caller(block, context)(
                params[f"block_{i}"],
                self._constrained(x),
                own,
                values,
                i,
                context.reset,
                context.key,
            )
            self._record(context, i, aux)
            new_state.append(own)
        return x, tuple(new_state)

    def _scan_blocks(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        values: dict[str, jax.Array],
        context: Context,
    ) -> tuple[jax.Array, State]:
        groups, blocks = self._groups(), self.stack
        period, depth = len(groups), len(state)

        def body(carry: Any, layer: Any) -> tuple[Any, Any]:
            x, values = carry
            turn, own_params, own_states = layer
            states, recorded = [], []
            x = self._constrained(x)
            for i, name in enumerate(groups):
                x, own, values, aux = self._caller(blocks[i], context)(
                    own_params[name],
                    x,
                    own_states[i],
                    values,
                    turn * period + i,
                    context.reset,
                    context.key,
                )
                states.append(own)
                recorded.append(aux)
            return (x, values), (tuple(states), tuple(recorded))

        stacked = tuple(
            jax.tree.map(lambda *parts: jnp.stack(parts), *state[i::period]) for i in range(period)
        )
        own = {name: params[name] for name in groups}
        turns = jnp.arange(depth // period, dtype=jnp.int32)
        (x, _), (stacked, recorded) = jax.lax.scan(body, (x, values), (turns, own, stacked))

        def part(tree: Any, turn: int) -> Any:
            return jax.tree.map(lambda leaf: leaf[turn], tree)

        for i in range(depth):
            self._record(context, i, part(recorded[i % period], i // period))
        return x, tuple(part(stacked[i % period], i // period) for i in range(depth))


@dataclasses.dataclass(frozen=True)
class _SharedParams(Layer):
    """Parameters that blocks share, by name; the layers that declare them run them."""

    layers: tuple[tuple[str, Layer], ...]

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.layers[0][1].dim

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return dict(self.layers)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        raise NotImplementedError("Backbone: the layers that share parameters run them.")
