"""Granite 4.0 H and Bamba: Mamba-2 layers with some layers of attention."""

from collections.abc import Sequence
from typing import Any

from seqjax.layers import Attention, GatedMLP, Layer, Mamba2, MoE
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import experts, parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, linear
from seqjax.pretrained.table import experts as each


def _granite(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("rms_norm_eps", 1e-6, least=0)
    config.expect("hidden_act", "silu", default="silu")
    bias = config.boolean("attention_bias", False)
    rope = config.expect("position_embedding_type", None, "rope", "nope", default=None) == "rope"
    theta, share = config.rope(10000.0)
    counts = parts.heads(config)
    attention = Attention(
        dim,
        **counts,
        capacity=capacity,
        rotary_dim=parts.rotary(dim // counts["heads"], share) if rope else 0,
        rope_base=theta,
        scale=config.number("attention_multiplier", 1.0),
        bias=bias,
        out_bias=bias,
    )
    depth = config.integer("num_hidden_layers", 32)
    mlp, mlp_table, others = _granite_mlp(config, dim)
    return _hybrid(
        config,
        attention,
        mlp,
        parts.layer_types(config, ["mamba"] * depth, "layer_types", "layers_block_type"),
        names={"mlp_norm": "post_attention_layernorm", "final_norm": "@norm"},
        mlp_table=mlp_table,
        variants=[
            tensor.inside(f"@layers.{i}.", f"backbone.block_{i}.")
            for i in range(depth)
            for tensor in others
        ],
        vocab_size=32000,
        eps=eps,
        residual=config.number("residual_multiplier", 1.0),
        model={
            "embedding_scale": config.number("embedding_multiplier", 1.0),
            "logit_scale": 1 / parts.positive(config, "logits_scaling", 1.0),
        },
    )


def _granite_mlp(config: Config, dim: int) -> tuple[Layer, list[Tensor], list[Tensor]]:
    """Return the MLP or mixture of experts, its tensors, and those with newer names."""
    shared = GatedMLP(dim, config.integer("shared_intermediate_size", 1024))
    gate_and_up = [
        linear("input_linear.weight", "gate_proj", "up_proj"),
        linear("output_linear.weight", "down_proj"),
    ]
    count = config.integer("num_local_experts", 8, least=0)
    if not count:
        return shared, parts.inside(gate_and_up, "shared_mlp.", "mlp."), []
    layer = MoE(
        dim,
        experts=count,
        top_k=experts.top_k(config, count, "num_local_experts", 2),
        expert=GatedMLP(dim, config.integer("intermediate_size", 11008)),
        shared=shared,
    )
    weights = [
        each("input_linear.weight", "experts.gate_proj", "experts.up_proj"),
        each("output_linear.weight", "experts.down_proj"),
        experts.router("router.layer.weight"),
    ]
    newer = [*experts.stacked(layer, "experts."), experts.router("router.weight")]
    table = [
        *parts.inside(weights, "block_sparse_moe.", "mlp."),
        *parts.inside(gate_and_up, "shared_mlp.", "mlp.shared."),
    ]
    return layer, table, parts.inside(newer, "block_sparse_moe.", "mlp.")


def _bamba(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("rms_norm_eps", 1e-5, least=0)
    for name, only in (("hidden_act", "silu"), ("attention_bias", False)):
        config.expect(name, only, default=only)
    counts = parts.heads(config, 32, 8)
    theta, _ = config.rope(10000.0)  # the reference always rotates half of a head
    attention = Attention(
        dim,
        **counts,
        capacity=capacity,
        rotary_dim=parts.rotary(dim // counts["heads"], 0.5),
        rope_base=theta,
    )
    mlp = GatedMLP(
        dim, config.integer("intermediate_size", 14336), bias=config.boolean("mlp_bias", False)
    )
    depth = config.integer("num_hidden_layers", 32)
    indices = config.list_of("attn_layer_indices", int, [])
    kinds = ["attention" if i in indices else "mamba" for i in range(depth)]
    return _hybrid(
        config,
        attention,
        mlp,
        parts.layer_types(config, kinds, "layers_block_type", "layer_types"),
        names={"mlp_norm": "pre_ff_layernorm", "final_norm": "@final_layernorm"},
        mlp_table=parts.mlp(mlp, "feed_forward."),
        vocab_size=128000,
        eps=eps,
        residual=1.0,
        model={"embedding_scale": 1.0},
    )


def _hybrid(
    config: Config,
    attention: Attention,
    mlp: Layer,
    kinds: Sequence[str],
    *,
    names: dict[str, str],
    mlp_table: list[Tensor],
    vocab_size: int,
    eps: float,
    residual: float,
    model: dict[str, Any],
    variants: Sequence[Tensor] = (),
) -> Architecture:
    """Return a model of Mamba-2 and attention layers, each with an MLP."""
    dim = attention.dim
    fields = parts.mamba2_fields(config, dim)
    mamba = Mamba2(dim, **fields, out_bias=fields["in_bias"], norm_eps=eps)
    mixers = {"linear": mamba, "attention": attention}
    tables = {"linear": parts.mamba2(mamba), "attention": parts.attention(attention)}
    common = [
        *norm("input_layernorm", "mixer_norm", "rms"),
        *norm(names["mlp_norm"], "mlp_norm", "rms"),
        *mlp_table,
    ]
    return Architecture(
        blocks=[Block(mixers[kind], mlp, norm_eps=eps, residual_factor=residual) for kind in kinds],
        tables=[[*common, *tables[kind]] for kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm=names["final_norm"],
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", vocab_size),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model=model,
        variants=variants,
    )


GRANITE = Family(_granite, ("model.",), ignored=(r"\.inv_freq$",))
BAMBA = Family(_bamba, ("model.",), ignored=(r"\.inv_freq$",))
