"""LanguageModel: tokens in, next-token logits out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers.context import Context
from seqjax.layers.norm import NORMS, NormKind
from seqjax.models._inputs import check_model, embed, embedding, whole
from seqjax.models.backbone import Backbone


@dataclasses.dataclass(frozen=True)
class LanguageModel(Layer):
    """Language model: next-token logits from a causal backbone.

        logits = backbone(E[tokens] * embedding_scale) W * logit_scale,    W = E^T if tie_embeddings
        logits = logit_cap * tanh(logits / logit_cap)                      with a `logit_cap`

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
      embedding_scale: factor of the embedded tokens; by default sqrt(dim).
      embedding_norm: kind of norm of the embedded tokens, as in `Block`; by default there is none.
      embedding_norm_eps: constant of this norm; by default the `norm_eps` of the backbone.
      logit_scale: factor of the logits.
      logit_cap: bound on the absolute value of the logits; by default there is none.
      dtype: dtype of the model's computation.
      dim: features of the backbone.
    """

    vocab_size: int
    backbone: Backbone
    tie_embeddings: bool = True
    embedding_scale: float | None = None
    embedding_norm: NormKind | None = None
    embedding_norm_eps: float | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
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
        if self.embedding_norm is not None:
            _checks.one_of(self, "embedding_norm", self.embedding_norm, NORMS)
        _checks.require(
            self,
            self.logit_cap is None or self.logit_cap > 0,
            f"`logit_cap` must be > 0, got {self.logit_cap}.",
        )

    @property
    def _input_norm(self) -> Layer | None:
        if self.embedding_norm is None:
            return None
        eps = self.embedding_norm_eps
        return NORMS[self.embedding_norm](self.dim, self.backbone.norm_eps if eps is None else eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        params: dict[str, Param | Layer] = {
            "embedding": embedding(self.vocab_size, self.dim),
            "backbone": self.backbone,
        }
        if not self.tie_embeddings:
            params["head"] = Param(
                (self.dim, self.vocab_size), ("embed", "vocab"), "weight", _init.fan_in_normal
            )
        if self._input_norm is not None:
            params["embedding_norm"] = self._input_norm
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
        inputs = embed(table, x, self.dtype, self.backbone, self.embedding_scale)
        if self._input_norm is not None:
            inputs, _ = self._input_norm.forward(params["embedding_norm"], inputs, (), context)
        hidden, state = self.backbone.forward(params["backbone"], inputs, state, context)
        weight = table.T if self.tie_embeddings else whole(params["head"], self.backbone)
        logits = jnp.matmul(
            hidden,
            weight.astype(hidden.dtype),
            preferred_element_type=state_dtype(hidden.dtype),
        )
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return logits, state
