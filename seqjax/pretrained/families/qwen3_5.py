"""Qwen3.5, dense: gated DeltaNet (arXiv 2412.06464) and gated attention."""

from seqjax.layers import Attention, DeltaNet, GatedMLP
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, conv, linear, rows


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("rms_norm_eps", 1e-6)
    config.expect("hidden_act", "silu", default="silu")
    config.expect("attn_output_gate", True, default=True)
    config.expect("output_gate_type", "swish", "silu", default="swish")
    head_dim = config.integer("head_dim", 256)
    theta, share = config.rope(10000.0, 0.25)
    bias = config.boolean("attention_bias", False)
    if bias:
        config.expect("attention_bias", False)
    attention = Attention(
        dim,
        **parts.heads(config, 16, 4),
        head_dim=head_dim,
        capacity=capacity,
        rotary_dim=parts.rotary(head_dim, share),
        rope_base=theta,
        qk_norm="rms_offset",
        norm_eps=eps,
        output_gate=True,
    )
    keys, values = (config.integer(f"linear_{name}_head_dim", 128) for name in ("key", "value"))
    linear_mixer = DeltaNet(
        dim,
        heads=config.integer("linear_num_key_heads", 16),
        head_dim=keys,
        expand_v=values / keys,
        value_heads=config.integer("linear_num_value_heads", 32),
        conv_size=config.integer("linear_conv_kernel_dim", 4),
        gated=True,
        norm_eps=eps,
    )
    mlp = GatedMLP(dim, config.integer("intermediate_size", 12288))
    interval = config.integer("full_attention_interval", 4)
    depth = config.integer("num_hidden_layers", 32)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(depth)]
    kinds = parts.layer_types(config, default, "layer_types", "layers_block_type")
    mixers = {"linear": linear_mixer, "attention": attention}
    tables = {"linear": _delta(), "attention": parts.attention(attention)}
    common = [
        *norm("input_layernorm", "mixer_norm", "rms_offset"),
        *norm("post_attention_layernorm", "mlp_norm", "rms_offset"),
        *parts.gated_mlp(mlp),
    ]
    return Architecture(
        blocks=[Block(mixers[kind], mlp, norm="rms_offset", norm_eps=eps) for kind in kinds],
        tables=[[*common, *tables[kind]] for kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm="@norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 248320),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms_offset",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
    )


def _delta() -> list[Tensor]:
    table = [
        linear("in_proj_qkv.weight", "q_proj", "k_proj", "v_proj"),
        linear("in_proj_z.weight", "gate_proj"),
        linear("in_proj_b.weight", "beta_proj"),
        linear("in_proj_a.weight", "a_proj"),
        conv("conv1d.weight", "q_conv.weight", "k_conv.weight", "v_conv.weight"),
        rows("A_log", "A_log"),
        rows("dt_bias", "dt_bias"),
        rows("norm.weight", "norm"),
        linear("out_proj.weight", "out_proj"),
    ]
    return parts.inside(table, "linear_attn.", "mixer.")


QWEN3_5 = Family(
    _build,
    prefixes=("model.language_model.", "model."),
    ignored=(r"^mtp\.", r"^model\.visual\.", r"\.inv_freq$"),
    text="text_config",
)
