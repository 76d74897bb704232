"""Classifier: one label per sequence."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _halo, _init, _segments
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._math import dense
from seqjax.layers.context import Context
from seqjax.models import _pool
from seqjax.models._inputs import check_model, embed, embedding, whole
from seqjax.models.backbone import Backbone
from seqjax.ops.core import explicit_mesh
from seqjax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Classifier(Layer):
    """Sequence classifier: one label per sequence.

        logits = pool(backbone(inputs)) W + b

    Inputs are tokens [B, T] (set `vocab_size`) or features [B, T, input_dim] (set `input_dim`).
    Logits are [B, num_classes] in float32 or better. The methods are those of a layer, except that
    `apply` and `step` return the logits for all positions since the last reset. The pool is part of
    the state: a sequence may be split over calls, and a reset clears the pool as well.

    `mask` [B, T] bool marks real positions. The other positions enter the backbone as zeros and
    never enter the pool. The backbone starts from its initial state at the first real position; a
    bidirectional backbone also restarts wherever real positions end. Padding on either side
    therefore has no effect. A sequence without any real position pools to zeros.

    Tokens at real positions must be from 0 to vocab_size - 1. A call on concrete arrays raises
    ValueError for any other token. Inside `jax.jit` and other transformations values cannot be
    checked: a token outside the vocabulary turns the logits that depend on it into NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import S5
      >>> from seqjax.models import Backbone
      >>> model = Classifier(num_classes=3, backbone=Backbone(S5(dim=8), depth=2), input_dim=1)
      >>> params = model.init(jax.random.key(0))
      >>> logits, state = model.apply(params, jnp.ones((2, 5, 1)))
      >>> logits.shape
      (2, 3)

    Attributes:
      num_classes: number of labels.
      backbone: the stack of blocks.
      vocab_size: number of tokens, for token inputs.
      input_dim: features per position, for feature inputs.
      pool: 'mean' over positions, or 'last' position.
      dtype: dtype of the model's computation.
      dim: features of the backbone.
    """

    num_classes: int
    backbone: Backbone
    vocab_size: int | None = None
    input_dim: int | None = None
    pool: Literal["mean", "last"] = "mean"
    dtype: str = "float32"
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _checks.positive(self, num_classes=self.num_classes)
        check_model(self, self.backbone, self.dtype)
        _checks.require(
            self,
            (self.vocab_size is None) != (self.input_dim is None),
            "one of `vocab_size` (for tokens) and `input_dim` (for features) must be set, got"
            f" vocab_size={self.vocab_size}, input_dim={self.input_dim}.",
        )
        if self.vocab_size is not None:
            _checks.positive(self, vocab_size=self.vocab_size)
        if self.input_dim is not None:
            _checks.positive(self, input_dim=self.input_dim)
        _checks.require(
            self,
            self.pool in ("mean", "last"),
            f"`pool` must be 'mean' or 'last', got {self.pool!r}.",
        )

    @property
    def causal(self) -> bool:
        """True if the backbone is causal."""
        return self.backbone.causal

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params: dict[str, Param | Layer] = {"backbone": self.backbone}
        if self.vocab_size is not None:
            params["embedding"] = embedding(self.vocab_size, self.dim)
        if self.input_dim is not None:
            params["input_proj"] = Param(
                (self.input_dim, self.dim), (None, "embed"), "weight", _init.fan_in_normal
            )
            params["input_bias"] = Param((self.dim,), ("embed",), "bias", _init.zeros)
        params["head"] = Param(
            (self.dim, self.num_classes), ("embed", None), "weight", _init.fan_in_normal
        )
        params["head_bias"] = Param((self.num_classes,), (None,), "bias", _init.zeros)
        return params

    def initial_state(self, batch_size: int, dtype: Any = None) -> State:
        """Return the state before the first position; see `Layer.initial_state`.

        Args:
          batch_size: number of sequences.
          dtype: by default the model's `dtype`.
        """
        return super().initial_state(batch_size, self.dtype if dtype is None else dtype)

    def make_state(self, batch_size: int, dtype: Any) -> State:
        if not self.causal:
            return ()
        return {
            "backbone": self.backbone.make_state(batch_size, dtype),
            "pool": _pool.empty(batch_size, self.dim, dtype),
        }

    def _check_input(self, x: jax.Array, one_step: bool) -> jnp.dtype:
        if self.vocab_size is not None:
            _checks.tokens(self, x, one_step)
            if one_step:  # `apply` checks the tokens at real positions
                _checks.in_vocabulary(self, x, self.vocab_size)
        elif self.input_dim is not None:
            _checks.features(self, x, self.input_dim, one_step)
        return jnp.dtype(self.dtype)

    def apply(
        self,
        params: PyTree,
        x: jax.Array,
        state: State = None,
        reset: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        """Classify sequences; see `Layer.apply`.

        Args:
          params: the tree that `init` returned.
          x: tokens [B, T] or features [B, T, input_dim].
          state: the state that an earlier call returned, to continue from it.
          reset: [B, T] bool, True where backbone and pool are cleared before that step.
          mask: [B, T] bool, True at real positions; by default all positions are real.
          segment_ids, key: see `Layer.apply`.
          sequence_axis: the mesh axis over which T is split; logits are the same on all devices.

        Returns:
          `(logits, state)`: logits [B, num_classes].

        Raises:
          ValueError: if an argument has the wrong structure, shape or dtype.
          NotImplementedError: if `state` is given and the backbone is bidirectional.
        """
        logits, state, _ = self.apply_with_aux(
            params,
            x,
            state,
            reset,
            mask=mask,
            segment_ids=segment_ids,
            key=key,
            sequence_axis=sequence_axis,
        )
        return logits, state

    @explicit_mesh.auto_inside(explicit_mesh.of_layer)
    def apply_with_aux(
        self,
        params: PyTree,
        x: jax.Array,
        state: State = None,
        reset: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State, dict[str, Any]]:
        """Run `apply`, and also return the extra outputs; see `Layer.apply_with_aux`."""
        x = _checks.array(self, "x", x)
        _checks.sequence_axis(self, sequence_axis)
        if segment_ids is not None:
            reset = _segments.to_reset(self, segment_ids, reset, x.shape[:2], sequence_axis)
        fresh = state is None
        state, reset = self._check_call(params, x, state, reset, one_step=False)
        if mask is not None:
            mask = jnp.asarray(mask)
            _checks.boolean(self, "mask", mask, x.shape[:2])
        if self.vocab_size is not None:
            _checks.in_vocabulary(self, x, self.vocab_size, mask)
        context = Context(reset, sequence_axis, key, fresh=fresh)
        logits, state = self.forward(params, x, state, context, mask)
        return logits, state, context.aux

    def forward(
        self,
        params: Params,
        x: jax.Array,
        state: State,
        context: Context,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        reset, sequence_axis = context.reset, context.sequence_axis
        batch, length = x.shape[:2]
        wide = state_dtype(self.dtype)
        if self.causal:
            backbone_state, pool = state["backbone"], state["pool"]
        else:
            backbone_state = self.backbone.make_state(batch, wide)
            pool = _pool.empty(batch, self.dim, wide)
        if reset is None:
            reset = jnp.zeros((batch, length), jnp.bool_)
        inputs = self._embed(params, x, mask)
        clear = reset
        if mask is not None:
            clear = reset | self._borders(mask, reset, pool["count"], sequence_axis)
        hidden, backbone_state = self.backbone.forward(
            params["backbone"],
            inputs,
            backbone_state,
            dataclasses.replace(context, reset=clear),
        )
        pool = _pool.update(pool, hidden.astype(wide), mask, reset, self.pool, sequence_axis)
        pooled = pool["sum"]
        if self.pool == "mean":
            pooled = pooled / jnp.maximum(pool["count"], 1).astype(wide)[:, None]
        logits = pooled @ params["head"].astype(wide) + params["head_bias"].astype(wide)
        return logits, {"backbone": backbone_state, "pool": pool} if self.causal else ()

    def forward_step(
        self, params: Params, x_t: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        return self.forward(params, x_t[:, None], state, context)

    def _embed(self, params: Params, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return the backbone's inputs, zero at masked positions regardless of their content."""
        if mask is not None:
            x = jnp.where(mask if x.ndim == 2 else mask[..., None], x, 0)
        if self.vocab_size is not None:
            table = whole(params["embedding"], self.backbone)
            inputs = embed(table, x, self.dtype, self.backbone)
        else:
            inputs = dense(x.astype(self.dtype), params["input_proj"])
            inputs = inputs + params["input_bias"].astype(self.dtype)
        return inputs if mask is None else jnp.where(mask[..., None], inputs, 0)

    def _borders(
        self, mask: jax.Array, reset: jax.Array, count: jax.Array, sequence_axis: str | None
    ) -> jax.Array:
        """Return where the backbone restarts, so that padding does not reach real positions."""
        if sequence_axis is not None:
            count = _pool.counted_before(mask, reset, count, sequence_axis)
        before = count[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask.astype(jnp.int32)
        # `before` never decreases, so the running maximum is its value at the last reset.
        at_reset = jax.lax.cummax(jnp.where(reset, before, 0), axis=1)
        first_real = mask & (before == at_reset)
        if self.causal:
            return first_real
        if sequence_axis is None:
            earlier = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
        else:
            earlier = jnp.concatenate(
                [_halo.last_before(mask, sequence_axis), mask[:, :-1]], axis=1
            )
        return first_real | (earlier & ~mask)
