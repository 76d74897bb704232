"""OLMo-Hybrid: gated DeltaNet (arXiv 2412.06464) with some layers of attention."""

from seqjax.layers import Attention, DeltaNet, GatedMLP
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, conv, linear, rows

_NORM_EPS = 1e-5  # of the mixer's norm, which does not use `rms_norm_eps`


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 3840), config.number("rms_norm_eps", 1e-6, least=0)
    for name, only in (("hidden_act", "silu"), ("attention_bias", False)):
        config.expect(name, only, default=only)
    counts = parts.heads(config, 30)
    head_dim = config.integer("head_dim", dim // counts["heads"])
    theta, share = config.rope(10000.0)
    attention = Attention(
        dim,
        **counts,
        head_dim=head_dim,
        capacity=capacity,
        rotary_dim=parts.rotary(head_dim, share) if _rotates(config) else 0,
        rope_base=theta,
        qk_norm="rms_all_heads",
        norm_eps=eps,
    )
    key_heads = config.integer("linear_num_key_heads", counts["heads"])
    keys = config.integer("linear_key_head_dim", int(0.75 * dim / key_heads))
    values = config.integer("linear_value_head_dim", 2 * keys)
    delta = DeltaNet(
        dim,
        heads=key_heads,
        head_dim=keys,
        expand_v=values / keys,
        value_heads=config.integer("linear_num_value_heads", counts["heads"]),
        conv_size=config.integer("linear_conv_kernel_dim", 4),
        gated=True,
        negative_eigenvalues=config.boolean("linear_allow_neg_eigval", True),
        norm_eps=_NORM_EPS,
    )
    mlp = GatedMLP(dim, config.integer("intermediate_size", 11008))
    depth = config.integer("num_hidden_layers", 32)
    default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(depth)]
    if "full_attention" not in default:
        default[-1] = "full_attention"
    kinds = parts.layer_types(config, default, "layer_types", "layers_block_type")
    blocks = {
        "linear": Block(delta, mlp, norm_eps=eps),
        "attention": Block(attention, mlp, norm_eps=eps, norm_position="post"),
    }
    # Files of transformers have the name of the linear layers' norm in attention layers too.
    mixer_norm = rows(
        "post_attention_layernorm.weight",
        "mixer_norm.scale",
        aliases=("feedforward_layer_norm.weight",),
    )
    tables = {
        "linear": [
            *norm("attention_layer_norm", "mixer_norm", "rms"),
            *norm("feedforward_layer_norm", "mlp_norm", "rms"),
            *_delta(),
        ],
        "attention": [
            mixer_norm,
            *norm("post_feedforward_layernorm", "mlp_norm", "rms"),
            *parts.attention(attention),
        ],
    }
    return Architecture(
        blocks=[blocks[kind] for kind in kinds],
        tables=[[*parts.mlp(mlp), *tables[kind]] for kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm="@norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 100352),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        variants=[
            _joined().inside(f"@layers.{i}.linear_attn.", f"backbone.block_{i}.mixer.")
            for i, kind in enumerate(kinds)
            if kind == "linear"
        ],
    )


def _rotates(config: Config) -> bool:
    """Return whether attention has positions: without them, `rope_theta` is null, not missing."""
    nested = config.rope_fields().values
    values = nested if "rope_theta" in nested else config.values
    return values.get("rope_theta", 0) is not None


def _delta() -> list[Tensor]:
    table = [
        *(linear(f"{name}_proj.weight", f"{name}_proj") for name in "qkva"),
        linear("b_proj.weight", "beta_proj"),
        linear("g_proj.weight", "gate_proj"),
        linear("o_proj.weight", "out_proj"),
        *(conv(f"{name}_conv1d.weight", f"{name}_conv.weight") for name in "qkv"),
        rows("o_norm.weight", "norm"),
        rows("A_log", "A_log"),
        rows("dt_bias", "dt_bias"),
    ]
    return parts.inside(table, "linear_attn.", "mixer.")


def _joined() -> Tensor:
    """Return the convolutions as one tensor: transformers cuts it into three equal pieces."""
    names = "qkv"
    return Tensor(
        "conv1d",
        tuple(f"{name}_conv.weight" for name in names),
        "conv",
        pieces=tuple(f"{name}_conv1d.weight" for name in names),
    )


OLMO_HYBRID = Family(_build, ("model.",), ignored=(r"^mtp\.", r"\.inv_freq$"))
