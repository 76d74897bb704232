"""RecurrentGemma (arXiv 2404.07839): RG-LRU layers and attention over a window."""

import ml_dtypes
import numpy as np

from seqjax.layers import RGLRU, Attention, GatedMLP
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, conv, linear, rows


def _build(config: Config, capacity: int) -> Architecture:
    del capacity  # the attention has a window
    dim, eps = config.integer("hidden_size", 2560), config.number("rms_norm_eps", 1e-6, least=0)
    activation = "gelu_pytorch_tanh"
    config.expect("hidden_activation", activation, default=activation)
    counts = parts.heads(config, 10)
    theta, share = config.rope(10000.0, 0.5)
    attention = Attention(
        dim,
        **counts,
        window=config.integer("attention_window_size", 2048),
        rotary_dim=parts.rotary(dim // counts["heads"], share),
        rope_base=theta,
        bias=config.boolean("attention_bias", False),
        out_bias=True,
    )
    recurrent = RGLRU(
        dim,
        state_dim=config.integer("lru_width", dim),
        heads=counts["heads"],
        conv_size=config.integer("conv1d_width", 4),
        unit_first_step=True,
    )
    width = parts.even("intermediate_size", config.integer("intermediate_size", 7680))
    mlp = GatedMLP(dim, width // 2, activation="gelu_tanh", bias=True)
    field = "_block_types" if config.has("_block_types") else "block_types"
    pattern = config.list_of(field, str, ["recurrent", "recurrent", "attention"], least=1)
    mixers = {"recurrent": recurrent, "attention": attention}
    for kind in pattern:
        if kind not in mixers:
            raise ValueError(
                f"load: config field `{field}` must have entries of 'recurrent' and 'attention',"
                f" got {kind!r}."
            )
    depth = config.integer("num_hidden_layers", 26)
    kinds = [pattern[i % len(pattern)] for i in range(depth)]
    tables = {
        "recurrent": _recurrent(recurrent),
        "attention": parts.attention(attention, "temporal_block."),
    }
    common = [
        *norm("temporal_pre_norm", "mixer_norm", "rms_offset"),
        *norm("channel_pre_norm", "mlp_norm", "rms_offset"),
        *parts.mlp(mlp, "mlp_block."),
    ]
    # The reference has this factor in bfloat16 in models of any dtype.
    scale = float(np.asarray(dim**0.5, ml_dtypes.bfloat16))
    return Architecture(
        blocks=[Block(mixers[kind], mlp, norm="rms_offset", norm_eps=eps) for kind in kinds],
        tables=[[*common, *tables[kind]] for kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm="@final_norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 256000),
        tie_embeddings=config.boolean("tie_word_embeddings", True),
        norm="rms_offset",
        norm_eps=eps,
        model={
            "embedding_scale": scale,
            "logit_cap": parts.positive(config, "logits_soft_cap", 30.0),
        },
    )


def _recurrent(layer: RGLRU) -> list[Tensor]:
    heads, size = layer.heads, layer.states // layer.heads
    table = [
        linear("linear_y.weight", "gate_proj"),
        rows("linear_y.bias", "gate_bias"),
        linear("linear_x.weight", "in_proj"),
        rows("linear_x.bias", "in_bias"),
        linear("linear_out.weight", "out_proj"),
        rows("linear_out.bias", "out_bias"),
        conv("conv_1d.weight", "conv.weight"),
        rows("conv_1d.bias", "conv.bias"),
        rows("rg_lru.recurrent_param", "Lambda"),
    ]
    for stored, ours in (("input", "input"), ("recurrent", "recurrence")):
        table += [
            rows(f"rg_lru.{stored}_gate_weight", f"{ours}_gate"),
            rows(f"rg_lru.{stored}_gate_bias", f"{ours}_gate_bias", shape=(heads, size)),
        ]
    return parts.inside(table, "temporal_block.", "mixer.")


RECURRENT_GEMMA = Family(_build, ("model.",), ignored=(r"\.inv_freq$",))
