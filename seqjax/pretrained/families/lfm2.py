"""LFM2 (arXiv 2511.23404): gated short convolutions with some layers of attention."""

from seqjax.layers import Attention, GatedConv, GatedMLP
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, conv, linear, rows


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 2560), config.number("norm_eps", 1e-5, least=0)
    counts = parts.heads(config, 32, 8)
    head_dim = dim // counts["heads"]
    theta, share = config.rope(1e6)
    attention = Attention(
        dim,
        **counts,
        capacity=capacity,
        rotary_dim=parts.rotary(head_dim, share),
        rope_base=theta,
        qk_norm="rms",
        norm_eps=eps,
    )
    mixer = GatedConv(
        dim, config.integer("conv_L_cache", 3), bias=config.boolean("conv_bias", False)
    )
    mlp = GatedMLP(dim, _width(config))
    depth = config.integer("num_hidden_layers", 32)
    attended = config.list_of("full_attn_idxs", int, list(range(depth)))
    default = ["full_attention" if i in attended else "conv" for i in range(depth)]
    kinds = parts.layer_types(config, default, "layer_types", conv="conv")
    mixers = {"conv": mixer, "attention": attention}
    tables = {"conv": _conv(mixer), "attention": _attention()}
    common = [
        *norm("operator_norm", "mixer_norm", "rms"),
        *norm("ffn_norm", "mlp_norm", "rms"),
        linear("feed_forward.w1.weight", "mlp.gate_proj"),
        linear("feed_forward.w3.weight", "mlp.up_proj"),
        linear("feed_forward.w2.weight", "mlp.down_proj"),
    ]
    return Architecture(
        blocks=[Block(mixers[kind], mlp, norm_eps=eps) for kind in kinds],
        tables=[[*common, *tables[kind]] for kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm="@embedding_norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 65536),
        tie_embeddings=config.boolean("tie_embedding", config.get("tie_word_embeddings", True)),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
    )


def _width(config: Config) -> int:
    """Return the width of the MLP, which the reference rounds up to a multiple."""
    width = config.integer("block_ff_dim", config.get("intermediate_size", 12288))
    if not config.boolean("block_auto_adjust_ff_dim", True):
        return width
    width = int(config.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
    multiple = config.integer("block_multiple_of", 256)
    return -(-width // multiple) * multiple


def _conv(layer: GatedConv) -> list[Tensor]:
    table = [
        linear("in_proj.weight", "B_proj", "C_proj", "in_proj"),
        conv("conv.weight", "conv.weight"),
        linear("out_proj.weight", "out_proj"),
    ]
    if layer.bias:
        table += [
            rows("in_proj.bias", "B_bias", "C_bias", "in_bias"),
            rows("conv.bias", "conv.bias"),
            rows("out_proj.bias", "out_bias"),
        ]
    return parts.inside(table, "conv.", "mixer.")


def _attention() -> list[Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    table = [linear(f"{name}.weight", name) for name in names]
    table += [rows(f"{name}_layernorm.weight", f"{name}_norm") for name in "qk"]
    return parts.inside(table, "self_attn.", "mixer.")


LFM2 = Family(_build, ("model.",), ignored=(r"\.inv_freq$",))
