"""Classifier of images, for layers over grids and, row after row, for layers over sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import PLSTM2D, Chimera, Context, Layer, Param
from seqjax.models import Backbone

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ImageClassifier(Layer):
    """Classifier of images [B, X, Y, channels] of any size.

        x = gelu(conv(images) + c)                    3 x 3 pixels, dim features
        logits = pool(backbone(x)) W + b              over all pixels

    A backbone of `PLSTM2D` and `Chimera` reads x as a grid. Any other backbone reads the pixels row
    after row.

    Attributes:
      num_classes: number of labels.

      backbone: the stack of blocks.

      channels: numbers per pixel.

      pool: "mean", or "max", which does not depend on the size of the image.

      dtype: dtype of the computation before the pool; logits are float32 or better.
    """

    num_classes: int
    backbone: Backbone
    channels: int
    pool: Literal["mean", "max"] = "mean"
    dtype: str = "float32"
    dim: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", self.backbone.dim)

    @property
    def causal(self) -> bool:
        """False: there is no state to continue from."""
        return False

    @property
    def reads_grids(self) -> bool:
        """True if all mixers are layers over grids."""
        mixers = (mixer for block in self.backbone.stack for mixer in block.mixers.values())
        return all(isinstance(mixer, PLSTM2D | Chimera) for mixer in mixers)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        """Return the parameters of the convolution, the backbone and the head."""
        zeros, normal = jax.nn.initializers.zeros, jax.nn.initializers.lecun_normal()
        return {
            "stem": Param((3, 3, self.channels, self.dim), (None,) * 4, "weight", normal),
            "stem_bias": Param((self.dim,), (None,), "bias", zeros),
            "backbone": self.backbone,
            "head": Param((self.dim, self.num_classes), (None, None), "weight", zeros),
            "head_bias": Param((self.num_classes,), (None,), "bias", zeros),
        }

    def _check_input(self, x: jax.Array, one_step: bool) -> jnp.dtype:
        del one_step
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(
                f"ImageClassifier: `x` must have shape [B, X, Y, {self.channels}], got"
                f" {list(x.shape)}."
            )
        return jnp.dtype(self.dtype)

    def forward(
        self, params: Params, x: jax.Array, state: Any, context: Context
    ) -> tuple[jax.Array, Any]:
        """Return the logits [B, num_classes]."""
        axes = ("NHWC", "HWIO", "NHWC")
        wide, x = jnp.promote_types(self.dtype, jnp.float32), x.astype(self.dtype)
        stem = params["stem"].astype(x.dtype)
        x = jax.lax.conv_general_dilated(x, stem, (1, 1), "SAME", dimension_numbers=axes)
        x = jax.nn.gelu(x + params["stem_bias"].astype(x.dtype))
        if not self.reads_grids:
            x = x.reshape(len(x), -1, self.dim)
        start = self.backbone.make_state(len(x), wide)
        x, _ = self.backbone.forward(params["backbone"], x, start, context)
        x = x.reshape(len(x), -1, self.dim).astype(wide)
        pooled = x.mean(axis=1) if self.pool == "mean" else x.max(axis=1)
        return pooled @ params["head"] + params["head_bias"], state
