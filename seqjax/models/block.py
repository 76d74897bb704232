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

    Several mixers run in parallel on the same input, and their outputs are added. Without an MLP
    the second line is absent. Any layer can be the MLP, even one with a state.

    Parameters: mixer_norm, mixer (mixer_0, mixer_1, ... for several); with an MLP mlp_norm, mlp.
    State: the mixer's, or a tuple for several mixers; with an MLP that has a state,
    {"mixer", "mlp"}.

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
      norm_position: 'pre' (before mixer and MLP) or 'post' (after them, before the addition).
      norm_eps: constant added to the mean square or the variance.
      residual_factor: r, a constant factor of each branch that is added to the residual stream.
      dropout: rate of dropout on each branch, active if `apply` is called with a key.
    """

    mixer: Layer | Sequence[Layer]
    mlp: Layer | None = None
    norm: NormKind = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    residual_factor: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.mixer, Layer):
            _checks.require(
                self,
                isinstance(self.mixer, Sequence) and len(self.mixer) > 0,
                f"`mixer` must be a seqjax layer or a sequence of layers, got {self.mixer!r}.",
            )
            object.__setattr__(self, "mixer", tuple(self.mixer))
        layers = [*self.mixers.values(), *([] if self.mlp is None else [self.mlp])]
        for layer in layers:
            _checks.require(
                self,
                isinstance(layer, Layer),
                f"`mixer` and `mlp` must be seqjax layers, got {layer!r}.",
            )
            _checks.require(
                self,
                layer.dim == layers[0].dim,
                "`mixer` and `mlp` must have the same dim, got"
                f" {', '.join(f'{type(x).__name__}(dim={x.dim})' for x in layers)}.",
            )
        _checks.one_of(self, "norm", self.norm, NORMS)
        _checks.one_of(self, "norm_position", self.norm_position, ("pre", "post"))
        check_rate(self, "dropout", self.dropout)

    @property
    def mixers(self) -> dict[str, Layer]:
        """The mixers by parameter name."""
        if isinstance(self.mixer, Layer):
            return {"mixer": self.mixer}
        return {f"mixer_{i}": mixer for i, mixer in enumerate(self.mixer)}

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Number of features, that of the mixer."""
        return next(iter(self.mixers.values())).dim

    @property
    def causal(self) -> bool:
        """True if all mixers and the MLP are causal."""
        return all(mixer.causal for mixer in self.mixers.values()) and (
            self.mlp is None or self.mlp.causal
        )

    @property
    def _norm(self) -> Layer:
        return NORMS[self.norm](self.dim, self.norm_eps)

    @property
    def _mlp_has_state(self) -> bool:
        return self.mlp is not None and _checks.has_state(self.mlp)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params: dict[str, Param | Layer] = {"mixer_norm": self._norm, **self.mixers}
        if self.mlp is not None:
            params |= {"mlp_norm": self._norm, "mlp": self.mlp}
        return params

    def make_state(self, batch_size: int, dtype: Any) -> State:
        states = tuple(mixer.make_state(batch_size, dtype) for mixer in self.mixers.values())
        mixed = states[0] if isinstance(self.mixer, Layer) else states
        if self.mlp is None or not self._mlp_has_state:
            return mixed
        return {"mixer": mixed, "mlp": self.mlp.make_state(batch_size, dtype)}

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        values: dict[str, jax.Array] = {}
        for layer in (*self.mixers.values(), self.mlp):
            if layer is not None:
                values |= layer.make_values(batch_size, length, dtype)
        return values

    def shared_params(self, params: Params) -> dict[str, jax.Array]:
        shared: dict[str, jax.Array] = {}
        for name, layer in (*self.mixers.items(), ("mlp", self.mlp)):
            if layer is not None:
                shared |= layer.shared_params(params[name])
        return shared

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        mixer_state, mlp_state = (
            (state["mixer"], state["mlp"]) if self._mlp_has_state else (state, ())
        )

        def mix(inputs: jax.Array) -> tuple[jax.Array, State]:
            if isinstance(self.mixer, Layer):
                return self.mixer.forward(
                    params["mixer"], inputs, mixer_state, context.enter("mixer")
                )
            outputs, states = [], []
            for (name, mixer), own in zip(self.mixers.items(), mixer_state, strict=True):
                y, own = mixer.forward(params[name], inputs, own, context.enter(name))
                outputs.append(y)
                states.append(own)
            return sum(outputs[1:], start=outputs[0]), tuple(states)

        x, mixer_state = self._add(params["mixer_norm"], x, mix, context.enter("mixer"))
        if self.mlp is None:
            return x, mixer_state
        mlp = self.mlp

        def transform(inputs: jax.Array) -> tuple[jax.Array, State]:
            return mlp.forward(params["mlp"], inputs, mlp_state, context.enter("mlp"))

        x, mlp_state = self._add(params["mlp_norm"], x, transform, context.enter("mlp"))
        if not self._mlp_has_state:
            return x, mixer_state
        return x, {"mixer": mixer_state, "mlp": mlp_state}

    def _add(
        self, norm_params: Params, x: jax.Array, function: Any, context: Context
    ) -> tuple[jax.Array, State]:
        """Add a normalized branch to the residual stream."""

        def norm(value: jax.Array) -> jax.Array:
            return self._norm.forward(norm_params, value, (), context)[0]

        if self.norm_position == "pre":
            branch, state = function(norm(x))
        else:
            branch, state = function(x)
            branch = norm(branch)
        branch = dropout(branch, self.dropout, context)
        if self.residual_factor != 1:
            branch = branch * self.residual_factor
        return x + branch, state
