"""MiniMax-01 (arXiv 2501.08313): Lightning attention, some softmax attention, and experts."""

from seqjax.layers import Attention, GatedMLP, Layer, LightningAttention, MoE, Scaled
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import experts, parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, linear, rows


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("rms_norm_eps", 1e-5, least=0)
    config.expect("hidden_act", "silu", default="silu")
    counts = parts.heads(config, 32, 8)
    head_dim = config.integer("head_dim", dim // counts["heads"])
    theta, _ = config.rope(1e6)
    # As in the authors' code. transformers does not read this field and rotates whole heads.
    rotated = config.at_most("rotary_dim", head_dim, "the features of a head", head_dim)
    attention = Attention(
        dim,
        **counts,
        head_dim=head_dim,
        capacity=capacity,
        window=config.integer("sliding_window") if config.has("sliding_window") else None,
        rotary_dim=parts.even("rotary_dim", rotated),
        rope_base=theta,
    )
    lightning = LightningAttention(
        dim, counts["heads"], head_dim, slopes="minimax", gate_rank=0, norm_eps=1e-6
    )
    field = parts.present(config, "num_local_experts", "num_experts")
    count = config.integer(field, 8)
    moe = MoE(
        dim,
        experts=count,
        top_k=experts.top_k(config, count, field, 2),
        expert=GatedMLP(dim, config.integer("intermediate_size", 14336)),
    )
    depth = config.integer("num_hidden_layers", 32)
    default = ["linear_attention" if i % 2 else "full_attention" for i in range(depth)]
    kinds = parts.layer_types(config, default, "layer_types")
    blocks = {
        kind: Block(
            _scaled(config, mixer, f"{prefix}_attn"),
            _scaled(config, moe, "mlp"),
            norm_eps=eps,
            norm_position="stream",
            stream_factors=(
                config.number(f"{prefix}_attn_alpha_factor", 1.0),
                config.number("mlp_alpha_factor", 1.0),
            ),
        )
        for kind, prefix, mixer in (
            ("linear", "linear", lightning),
            ("attention", "full", attention),
        )
    }
    tables = {"linear": _lightning(lightning), "attention": parts.attention(attention)}
    common = [
        *norm("input_layernorm", "mixer_norm", "rms"),
        *norm("post_attention_layernorm", "mlp_norm", "rms"),
        *parts.inside(
            [experts.router("gate.weight"), *experts.numbered(moe, "experts.")],
            "block_sparse_moe.",
            "mlp.",
        ),
    ]
    return Architecture(
        blocks=[blocks[kind] for kind in kinds],
        tables=[[*common, *tables[kind]] for kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm="@norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 32000),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        variants=[
            tensor.inside(f"@layers.{i}.block_sparse_moe.", f"backbone.block_{i}.mlp.")
            for i in range(depth)
            for tensor in experts.stacked(moe, "experts.")
        ],
    )


def _scaled(config: Config, layer: Layer, prefix: str) -> Layer:
    return Scaled(layer, output_scale=config.number(f"{prefix}_beta_factor", 1.0))


def _lightning(layer: LightningAttention) -> list[Tensor]:
    table = [
        linear("qkv_proj.weight", "q_proj", "k_proj", "v_proj", groups=layer.heads),
        linear("output_gate.weight", "gate_proj"),
        rows("norm.weight", "norm"),
        linear("out_proj.weight", "out_proj"),
    ]
    return parts.inside(table, "self_attn.", "mixer.")


# The decays of Lightning attention are constants that files may hold.
MINIMAX = Family(
    _build,
    ("model.",),
    ignored=(r"\.inv_freq$", r"\.(slope_rate|query_decay|key_decay|diagonal_decay)$"),
)
