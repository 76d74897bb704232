"""Backbone: a pre-norm residual stack of any layers, itself a layer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers.mlp import GatedMLP
from seqjax.layers.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class Block(Layer):
    """One residual block: a mixer over time, then, if there is one, an MLP per position.

        x = x + mixer(norm(x))
        x = x + mlp(norm(x))

    The state is the mixer's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import LRU
      >>> block = Block(LRU(dim=4))
      >>> y, state = block.apply(block.init(jax.random.key(0)), jnp.ones((2, 5, 4)))
      >>> y.shape, state.shape
      ((2, 5, 4), (2, 4))

    Attributes:
      mixer: the layer that mixes over time.
      mlp_dim: hidden features of the MLP; None for no MLP.
      norm_eps: see `RMSNorm`.
      dim: features, those of the mixer.
    """

    mixer: Layer
    mlp_dim: int | None = None
    norm_eps: float = 1e-6
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _checks.require(
            self,
            isinstance(self.mixer, Layer),
            f"mixer must be a seqjax layer, given {self.mixer!r}.",
        )
        object.__setattr__(self, "dim", self.mixer.dim)

    @property
    def causal(self) -> bool:
        """Whether the mixer is."""
        return self.mixer.causal

    def _params(self) -> Mapping[str, Param | Layer]:
        norm = RMSNorm(self.dim, self.norm_eps)
        params: dict[str, Param | Layer] = {"mixer_norm": norm, "mixer": self.mixer}
        if self.mlp_dim is not None:
            params |= {"mlp_norm": norm, "mlp": GatedMLP(self.dim, self.mlp_dim)}
        return params

    def _initial_state(self, batch_size: int, dtype: Any) -> State:
        return self.mixer._initial_state(batch_size, dtype)

    def _apply(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        reset: jax.Array | None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        norm = RMSNorm(self.dim, self.norm_eps)
        mixed, _ = norm._apply(params["mixer_norm"], x, (), None)
        mixed, state = self.mixer._apply(params["mixer"], mixed, state, reset, sequence_axis)
        x = x + mixed
        if self.mlp_dim is None:
            return x, state
        mixed, _ = norm._apply(params["mlp_norm"], x, (), None)
        mixed, _ = GatedMLP(self.dim, self.mlp_dim)._apply(params["mlp"], mixed, (), None)
        return x + mixed, state


@dataclasses.dataclass(frozen=True)
class Backbone(Layer):
    """A stack of residual blocks and a final norm.

    `mixers` is one layer, or a sequence of layers, which may differ (a hybrid); the sequence is
    repeated until there are `depth` blocks. The state is a tuple with the state of each block.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import LRU, SlidingWindowAttention
      >>> hybrid = Backbone([LRU(8), LRU(8), SlidingWindowAttention(8, heads=2, window=4)], depth=6)
      >>> y, state = hybrid.apply(hybrid.init(jax.random.key(0)), jnp.ones((2, 5, 8)))
      >>> y.shape, len(state)
      ((2, 5, 8), 6)

    Attributes:
      mixers: the layers that mix over time, kept as a tuple; see also `layers`.
      depth: number of blocks, a multiple of the number of mixers; that number if None.
      mlp_ratio: hidden features of each MLP per feature, rounded up to a multiple of 8; 0 for
        no MLPs.
      norm_eps: see `RMSNorm`.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      scan: run equal blocks in a `lax.scan`, their parameters stacked along a first axis
        `layers`: one block is compiled however many there are. Parameters are then
        {"group_0": ..., "final_norm"}, a group for each of the mixers that repeat; outputs and
        states are the same.
      place: `place(array, axes)` says where an array lives on a mesh, from a logical name for each
        axis; of the residual stream, ("batch", None, None), before each group of blocks and after
        the last, and of a model's embedding table. See `seqjax.sharding.place_activations`.
      dim: features, those of the mixers.
    """

    mixers: Layer | Sequence[Layer]
    depth: int | None = None
    mlp_ratio: float = 8 / 3
    norm_eps: float = 1e-6
    remat: bool = False
    scan: bool = False
    place: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] | None = None
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _checks.require(
            self,
            isinstance(self.mixers, Layer | Sequence),
            f"mixers must be a seqjax layer or a sequence of them, given {self.mixers!r}.",
        )
        mixers = (self.mixers,) if isinstance(self.mixers, Layer) else tuple(self.mixers)
        _checks.require(self, len(mixers) > 0, "mixers must hold at least one layer, given none.")
        for mixer in mixers:
            _checks.require(
                self,
                isinstance(mixer, Layer),
                f"mixers must be seqjax layers, given {mixer!r}.",
            )
            _checks.require(
                self,
                mixer.dim == mixers[0].dim,
                "all mixers must have the same dim, given"
                f" {', '.join(f'{type(m).__name__}(dim={m.dim})' for m in mixers)}.",
            )
        object.__setattr__(self, "mixers", mixers)  # hashable
        depth = len(mixers) if self.depth is None else self.depth
        _checks.positive(self, depth=depth)
        _checks.require(
            self,
            depth % len(mixers) == 0,
            f"depth must be a multiple of the number of mixers, {len(mixers)}, given {depth};"
            " pass as many mixers as blocks, or leave depth out.",
        )
        _checks.require(
            self, self.mlp_ratio >= 0, f"mlp_ratio must be >= 0, given {self.mlp_ratio}."
        )
        object.__setattr__(self, "dim", mixers[0].dim)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The mixer of each block: `mixers`, repeated until there are `depth`."""
        assert isinstance(self.mixers, tuple)
        depth = len(self.mixers) if self.depth is None else self.depth
        return self.mixers * (depth // len(self.mixers))

    @property
    def causal(self) -> bool:
        """Whether all mixers are."""
        return all(block.causal for block in self._blocks().values())

    def _blocks(self) -> dict[str, Block]:
        mlp_dim = -int(-self.mlp_ratio * self.dim // 8) * 8 or None
        return {
            f"block_{i}": Block(mixer, mlp_dim, self.norm_eps)
            for i, mixer in enumerate(self.layers)
        }

    def _groups(self) -> dict[str, "_Repeated"]:
        """The blocks whose order repeats, each with how often it does."""
        blocks = list(self._blocks().values())
        depth = len(blocks)
        period = next(
            p for p in range(1, depth + 1) if depth % p == 0 and blocks[p:] == blocks[: depth - p]
        )
        return {f"group_{i}": _Repeated(blocks[i], depth // period) for i in range(period)}

    def _params(self) -> Mapping[str, Param | Layer]:
        blocks: Mapping[str, Layer] = self._groups() if self.scan else self._blocks()
        return {**blocks, "final_norm": RMSNorm(self.dim, self.norm_eps)}

    def _initial_state(self, batch_size: int, dtype: Any) -> State:
        return tuple(block._initial_state(batch_size, dtype) for block in self._blocks().values())

    def _apply(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        reset: jax.Array | None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        run_blocks = self._scan_blocks if self.scan else self._run_blocks
        x, new_state = run_blocks(params, x, state, reset, sequence_axis)
        x = self._placed(x)
        y, _ = RMSNorm(self.dim, self.norm_eps)._apply(params["final_norm"], x, (), None)
        return y, new_state

    def _placed(self, x: jax.Array) -> jax.Array:
        return x if self.place is None else self.place(x, ("batch", None, None))

    def _run_blocks(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        reset: jax.Array | None,
        sequence_axis: str | None,
    ) -> tuple[jax.Array, State]:
        new_state = []
        for (name, block), block_state in zip(self._blocks().items(), state, strict=True):
            run = functools.partial(block._apply, sequence_axis=sequence_axis)
            apply: Callable[..., Any] = jax.checkpoint(run) if self.remat else run
            x, block_state = apply(params[name], self._placed(x), block_state, reset)
            new_state.append(block_state)
        return x, tuple(new_state)

    def _scan_blocks(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        reset: jax.Array | None,
        sequence_axis: str | None,
    ) -> tuple[jax.Array, State]:
        groups = self._groups()
        period, depth = len(groups), len(state)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, State]:
            states = []
            x = self._placed(x)
            for (name, group), block_state in zip(groups.items(), layer[1], strict=True):
                x, block_state = group.block._apply(
                    layer[0][name], x, block_state, reset, sequence_axis
                )
                states.append(block_state)
            return x, tuple(states)

        stacked = tuple(
            jax.tree.map(lambda *parts: jnp.stack(parts), *state[i::period]) for i in range(period)
        )
        own = {name: params[name] for name in groups}
        x, stacked = jax.lax.scan(jax.checkpoint(body) if self.remat else body, x, (own, stacked))
        return x, tuple(
            jax.tree.map(lambda part, turn=i // period: part[turn], stacked[i % period])
            for i in range(depth)
        )


@dataclasses.dataclass(frozen=True)
class _Repeated(Layer):
    """The parameters of `count` equal blocks, stacked along a first axis; the backbone runs them.

    `_params` lists those of one block.
    """

    block: Block
    count: int
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", self.block.dim)

    def _params(self) -> Mapping[str, Param | Layer]:
        return self.block._params()

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        return jax.vmap(lambda key: self.block.init(key, dtype))(jax.random.split(key, self.count))

    def param_axes(self) -> dict[str, Any]:
        return _prepend("layers", self.block.param_axes())

    def param_shapes(self) -> dict[str, Any]:
        return _prepend(self.count, self.block.param_shapes())

    def _initial_state(self, batch_size: int, dtype: Any) -> State:
        raise NotImplementedError("Backbone: the states of stacked blocks are kept one by one.")

    def _apply(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        reset: jax.Array | None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        raise NotImplementedError("Backbone: stacked blocks are run by the backbone.")


def _prepend(first: Any, tree: Any) -> dict[str, Any]:
    return jax.tree.map(
        lambda leaf: (first, *leaf), tree, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
