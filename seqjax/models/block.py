"""Residual block: one or several mixers over time, then an optional MLP."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from seqjax.layers import _checks
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers.context import Context
from seqjax.layers.dropout import check_rate, dropout
from seqjax.layers.norm import NORMS, NormKind


@dataclasses.dataclass(frozen=True)
class Block(Layer):
    """A residual block.

        x = x + r * dropout(mixer(norm(x)))        norm_position="pre"
        x = x + r * dropout(mlp(norm(x)))

        x = x + r * dropout(norm(mixer(x)))        norm_position="post"
        x = x + r * dropout(norm(mlp(x)))

        x = norm(x);  x = a * x + r * dropout(mixer(x))   norm_position="stream"
        x = norm(x);  x = b * x + r * dropout(mlp(x))

    Several mixers run in parallel on the same input, and their outputs are added. Without an MLP
    the second line is absent. Any layer can be the MLP, even one with a state. With an `injection`
    the mixer's input is norm(x + injection(x)), while the residual stream stays x.

    Parameters: mixer_norm, mixer (mixer_0, mixer_1, ... for several); with an MLP mlp_norm, mlp;
    with an injection injection.
    State: the mixer's, or a tuple for several mixers; with an MLP that has a state or an injection,
    a dictionary {"mixer", "mlp", "injection"} of those that there are.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import LRU, GatedMLP, SlidingWindowAttention
      >>> block = Block(LRU(dim=4), mlp=GatedMLP(4))
      >>> y, state = block.apply(block.init(jax.random.key(0)), jnp.ones((2, 5, 4)))
      >>> y.shape, state.shape
      ((2, 5, 4), (2, 4))
      >>> parallel = Block([LRU(dim=4), SlidingWindowAttention(4, heads=2, window=8)])
      >>> sorted(parallel.param_shapes())
      ['mixer_0', 'mixer_1', 'mixer_norm']

    Attributes:
      mixer: the layer that mixes over time, or a sequence of layers that run in parallel.
      mlp: a layer applied after the mixer; by default there is none.
      norm: 'rms', 'rms_offset' (a scale of 1 + w) or 'layer' (LayerNorm).
      norm_position: 'pre' (before mixer and MLP), 'post' (after them, before the addition) or
        'stream' (of the residual stream itself, before mixer and MLP).
      norm_eps: constant added to the mean square or the variance.
      residual_factor: r, a constant factor of each branch that is added to the residual stream.
      dropout: rate of dropout on each branch, active if `apply` is called with a key.
      stream_factors: a and b, constant factors of the residual stream.
      injection: a layer whose output is added to the input of the mixer's norm, with
        norm_position='pre'; by default there is none.
    """

    mixer: Layer | Sequence[Layer]
    mlp: Layer | None = None
    norm: NormKind = "rms"
    norm_position: Literal["pre", "post", "stream"] = "pre"
    norm_eps: float = 1e-6
    residual_factor: float = 1.0
    dropout: float = 0.0
    stream_factors: tuple[float, float] = (1.0, 1.0)
    injection: Layer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mixer, Layer):
            _checks.require(
                self,
                isinstance(self.mixer, Sequence) and len(self.mixer) > 0,
                f"`mixer` must be a seqjax layer or a sequence of layers, got {self.mixer!r}.",
            )
            object.__setattr__(self, "mixer", tuple(self.mixer))
        layers = self._layers
        for layer in layers:
            _checks.require(
                self,
                isinstance(layer, Layer),
                f"`mixer`, `mlp` and `injection` must be seqjax layers, got {layer!r}.",
            )
            _checks.require(
                self,
                layer.dim == layers[0].dim,
                "`mixer`, `mlp` and `injection` must have the same dim, got"
                f" {', '.join(f'{type(x).__name__}(dim={x.dim})' for x in layers)}.",
            )
        _checks.one_of(self, "norm", self.norm, NORMS)
        _checks.one_of(self, "norm_position", self.norm_position, ("pre", "post", "stream"))
        _checks.require(
            self,
            self.injection is None or self.norm_position == "pre",
            f"`injection` must have norm_position='pre', got norm_position={self.norm_position!r}.",
        )
        object.__setattr__(self, "stream_factors", tuple(self.stream_factors))
        _checks.require(
            self,
            len(self.stream_factors) == 2,
            f"`stream_factors` must be two numbers, got {self.stream_factors}.",
        )
        check_rate(self, "dropout", self.dropout)

    @property
    def mixers(self) -> dict[str, Layer]:
        """The mixers by parameter name."""
        if isinstance(self.mixer, Layer):
            return {"mixer": self.mixer}
        return {f"mixer_{i}": mixer for i, mixer in enumerate(self.mixer)}

    @property
    def _layers(self) -> list[Layer]:
        others = (self.mlp, self.injection)
        return [*self.mixers.values(), *(layer for layer in others if layer is not None)]

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Number of features, that of the mixer."""
        return next(iter(self.mixers.values())).dim

    @property
    def causal(self) -> bool:
        """True if all mixers, the MLP and the injection are causal."""
        return all(layer.causal for layer in self._layers)

    @property
    def _norm(self) -> Layer:
        return NORMS[self.norm](self.dim, self.norm_eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params: dict[str, Param | Layer] = {"mixer_norm": self._norm, **self.mixers}
        if self.mlp is not None:
            params |= {"mlp_norm": self._norm, "mlp": self.mlp}
        if self.injection is not None:
            params["injection"] = self.injection
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        states = tuple(mixer.make_state(batch_size, dtype) for mixer in self.mixers.values())
        mixed = states[0] if isinstance(self.mixer, Layer) else states
        others = {
            name: layer.make_state(batch_size, dtype)
            for name, layer in self._other_states().items()
        }
        return {"mixer": mixed, **others} if others else mixed

    def _other_states(self) -> dict[str, Layer]:
        """Return the layers beside the mixer that have a state."""
        others: dict[str, Layer] = {}
        if self.mlp is not None and _checks.has_state(self.mlp):
            others["mlp"] = self.mlp
        if self.injection is not None:
            others["injection"] = self.injection
        return others

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        values: dict[str, jax.Array] = {}
        for layer in self._layers:
            values |= layer.make_values(batch_size, length, dtype)
        return values

    def declare_shared(self) -> Mapping[str, Layer]:
        return merge_shared(self, self._layers)

    def visible_params(self, params: Params) -> dict[str, list[jax.Array]]:
        found: dict[str, list[jax.Array]] = {}
        for name, layer in (("injection", self.injection), *self.mixers.items(), ("mlp", self.mlp)):
            if layer is not None:
                for key, values in layer.visible_params(params[name]).items():
                    found.setdefault(key, []).extend(values)
        return found

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        others = self._other_states()
        states = dict(state) if others else {"mixer": state}

        def mix(inputs: jax.Array) -> tuple[jax.Array, State]:
            if isinstance(self.mixer, Layer):
                return self.mixer.forward(
                    params["mixer"], inputs, states["mixer"], context.enter("mixer")
                )
            outputs, new_states = [], []
            for (name, mixer), own in zip(self.mixers.items(), states["mixer"], strict=True):
                y, own = mixer.forward(params[name], inputs, own, context.enter(name))
                outputs.append(y)
                new_states.append(own)
            return sum(outputs[1:], start=outputs[0]), tuple(new_states)

        injected = None
        if self.injection is not None:
            injected, states["injection"] = self.injection.forward(
                params["injection"], x, states["injection"], context.enter("injection")
            )
        own = context.enter("mixer")
        x, states["mixer"] = self._add(params["mixer_norm"], x, mix, own, 0, injected)
        if self.mlp is not None:
            mlp, mlp_state = self.mlp, states.get("mlp", ())

            def transform(inputs: jax.Array) -> tuple[jax.Array, State]:
                return mlp.forward(params["mlp"], inputs, mlp_state, context.enter("mlp"))

            x, mlp_state = self._add(params["mlp_norm"], x, transform, context.enter("mlp"), 1)
            if "mlp" in states:
                states["mlp"] = mlp_state
        return x, states if others else states["mixer"]

    def _add(
        self,
        norm_params: Params,
        x: jax.Array,
        function: Any,
        context: Context,
        branch_index: int,
        injected: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """Add a normalized branch to the residual stream."""

        def norm(value: jax.Array) -> jax.Array:
            return self._norm.forward(norm_params, value, (), context)[0]

        if self.norm_position == "stream":
            x = norm(x)
            branch, state = function(x)
        elif self.norm_position == "pre":
            branch, state = function(norm(x if injected is None else x + injected))
        else:
            branch, state = function(x)
            branch = norm(branch)
        branch = dropout(branch, self.dropout, context)
        if self.residual_factor != 1:
            branch = branch * self.residual_factor
        factor = self.stream_factors[branch_index]
        return (x if factor == 1 else x * factor) + branch, state


def merge_shared(owner: Layer, layers: Sequence[Layer]) -> dict[str, Layer]:
    """Return the layers that blocks share, by name; check that no name has two layers."""
    shared: dict[str, Layer] = {}
    for layer in layers:
        for name, declared in layer.declare_shared().items():
            _checks.require(
                owner,
                shared.setdefault(name, declared) == declared,
                f"layers that share parameters under the name {name!r} must be equal, got"
                f" {shared[name]!r} and {declared!r}; use another name.",
            )
    return shared
