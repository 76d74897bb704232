"""Qwen3.5, dense: gated DeltaNet (arXiv 2412.06464) and gated attention."""

from collections.abc import Callable, Sequence

from seqjax.layers import Attention, DeltaNet, GatedMLP, Layer
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, conv, linear, rows

DENSE = {"dim": 4096, "depth": 32, "kv_heads": 4, "vocab_size": 248320}


def _build(config: Config, capacity: int) -> Architecture:
    dim = config.integer("hidden_size", DENSE["dim"])
    mlp = GatedMLP(dim, config.integer("intermediate_size", 12288))
    depth = config.integer("num_hidden_layers", DENSE["depth"])
    return hybrid(config, capacity, [mlp] * depth, [parts.mlp(mlp)] * depth, DENSE, separate_delta)


def hybrid(
    config: Config,
    capacity: int,
    mlps: Sequence[Layer],
    mlp_tables: Sequence[Sequence[Tensor]],
    defaults: dict[str, int],
    delta: Callable[[DeltaNet], list[Tensor]],
    variants: Sequence[Tensor] = (),
) -> Architecture:
    """Return a model of gated DeltaNet and gated attention layers, each with an MLP.

    Args:
      config: the config.
      capacity: the capacity of attention caches.
      mlps: the MLP of each layer.
      mlp_tables: the tensors of these.
      defaults: values of missing fields.
      delta: function that returns the tensors of a DeltaNet layer.
      variants: see `Architecture`.
    """
    dim, eps = (
        config.integer("hidden_size", defaults["dim"]),
        config.number("rms_norm_eps", 1e-6, least=0),
    )
    config.expect("hidden_act", "silu", default="silu")
    config.expect("attn_output_gate", True, default=True)
    config.expect("output_gate_type", "swish", "silu", default="swish")
    head_dim = config.integer("head_dim", 256)
    theta, share = config.rope(10000.0, 0.25)
    bias = config.boolean("attention_bias", False)
    attention = Attention(
        dim,
        **parts.heads(config, 16, defaults["kv_heads"]),
        head_dim=head_dim,
        capacity=capacity,
        rotary_dim=parts.rotary(head_dim, share),
        rope_base=theta,
        qk_norm="rms_offset",
        norm_eps=eps,
        output_gate=True,
        bias=bias,
        out_bias=bias,
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
    interval = config.integer("full_attention_interval", 4)
    depth = len(mlps)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(depth)]
    kinds = parts.layer_types(config, default, "layer_types", "layers_block_type")
    mixers = {"linear": linear_mixer, "attention": attention}
    tables = {"linear": delta(linear_mixer), "attention": parts.attention(attention)}
    common = [
        *norm("input_layernorm", "mixer_norm", "rms_offset"),
        *norm("post_attention_layernorm", "mlp_norm", "rms_offset"),
    ]
    return Architecture(
        blocks=[
            Block(mixers[kind], mlp, norm="rms_offset", norm_eps=eps)
            for kind, mlp in zip(kinds, mlps, strict=True)
        ],
        tables=[
            [*common, *tables[kind], *mlp] for kind, mlp in zip(kinds, mlp_tables, strict=True)
        ],
        embedding="@embed_tokens.weight",
        final_norm="@norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", defaults["vocab_size"]),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms_offset",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        variants=variants,
    )


def separate_delta(layer: DeltaNet) -> list[Tensor]:
    """Return the tensors of a DeltaNet layer whose projections are stored apart."""
    del layer
    projections = [
        linear("in_proj_qkv.weight", "q_proj", "k_proj", "v_proj"),
        linear("in_proj_z.weight", "gate_proj"),
        linear("in_proj_b.weight", "beta_proj"),
        linear("in_proj_a.weight", "a_proj"),
    ]
    return delta_net(projections)


def delta_net(projections: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of a DeltaNet layer with these projections."""
    table = [
        *projections,
        conv("conv1d.weight", "q_conv.weight", "k_conv.weight", "v_conv.weight"),
        rows("A_log", "A_log"),
        rows("dt_bias", "dt_bias"),
        rows("norm.weight", "norm"),
        linear("out_proj.weight", "out_proj"),
    ]
    return parts.inside(table, "linear_attn.", "mixer.")


PREFIXES = ("model.language_model.", "model.")
IGNORED = (r"^mtp\.", r"^model\.visual\.", r"\.inv_freq$")
QWEN3_5 = Family(_build, PREFIXES, ignored=IGNORED, text="text_config")
