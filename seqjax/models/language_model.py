"""LanguageModel: tokens in, next-token logits out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers.context import Context
from seqjax.models._inputs import check_model, embed, embedding, whole
from seqjax.models.backbone import Backbone


@dataclasses.dataclass(frozen=True)
class LanguageModel(Layer):
    """Language model: next-token logits from a causal backbone.

        logits = backbone(E[tokens] * sqrt(dim)) W,     W = E^T if tie_embeddings

    The methods are those of a layer, except that inputs are integer tokens, [B, T] for `apply` and
    [B] for `step`. Outputs are logits, [B, T, vocab_size] and [B, vocab_size], in float32 or
    better. E starts normal with variance 1/dim.

    Tokens must be from 0 to vocab_size - 1. A call on concrete arrays raises ValueError for any
    other token. Inside `jax.jit` and other transformations values cannot be checked: a token
    outside the vocabulary, negative or too large, turns the logits of all steps that depend on it
    into NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import LRU
      >>> from seqjax.models import Backbone
      >>> model = LanguageModel(vocab_size=10, backbone=Backbone(LRU(dim=8), depth=2))
      >>> params = model.init(jax.random.key(0))
      >>> logits, state = model.apply(params, jnp.zeros((2, 5), jnp.int32))
      >>> next_logits, state = model.step(params, jnp.zeros(2, jnp.int32), state)
      >>> logits.shape, next_logits.shape
      ((2, 5, 10), (2, 10))

    Attributes:
      vocab_size: number of tokens.
      backbone: the stack of blocks.
      tie_embeddings: whether the output weights are those of the embedding.
      dtype: dtype of the model's computation.
      dim: features of the backbone.
    """

    vocab_size: int
    backbone: Backbone
    tie_embeddings: bool = True
    dtype: str = "float32"
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _checks.positive(self, vocab_size=self.vocab_size)
        check_model(self, self.backbone, self.dtype)
        _checks.require(
            self,
            self.backbone.causal,
            "`backbone` must be causal, got a bidirectional mixer.",
        )

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params: dict[str, Param | Layer] = {
            "embedding": embedding(self.vocab_size, self.dim),
            "backbone": self.backbone,
        }
        if not self.tie_embeddings:
            params["head"] = Param(
                (self.dim, self.vocab_size), ("embed", "vocab"), "weight", _init.fan_in_normal
            )
        return params

    def initial_state(self, batch_size: int, dtype: Any = None) -> State:
        """Return the state before the first token; see `Layer.initial_state`.

        Args:
          batch_size: number of sequences.
          dtype: by default the model's `dtype`.
        """
        return super().initial_state(batch_size, self.dtype if dtype is None else dtype)

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return self.backbone.make_state(batch_size, dtype)

    def _check_input(self, x: jax.Array, one_step: bool) -> jnp.dtype:
        _checks.tokens(self, x, one_step)
        _checks.in_vocabulary(self, x, self.vocab_size)
        return jnp.dtype(self.dtype)

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        table = whole(params["embedding"], self.backbone)
        inputs = embed(table, x, self.dtype, self.backbone)
        hidden, state = self.backbone.forward(params["backbone"], inputs, state, context)
        weight = table.T if self.tie_embeddings else whole(params["head"], self.backbone)
        logits = jnp.matmul(
            hidden,
            weight.astype(hidden.dtype),
            preferred_element_type=state_dtype(hidden.dtype),
        )
        return logits, state
