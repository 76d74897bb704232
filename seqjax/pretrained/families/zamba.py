"""Zamba (arXiv 2405.16712) and Zamba2 (2411.15242): Mamba with shared transformer blocks."""

import math
from collections.abc import Sequence

from seqjax.layers import Attention, GatedMLP, Mamba, Mamba2, SharedTransformer
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, conv, experts, linear, rows


def _zamba(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 3712), config.number("rms_norm_eps", 1e-5, least=0)
    config.expect("hidden_mamba_act", "silu", default="silu")
    config.expect("attention_hidden_size", 2 * dim, default=2 * dim)
    counts = parts.heads(config, 16, 16)
    head_dim = config.integer("attention_head_dim", 2 * dim // counts["heads"])
    attention = Attention(
        2 * dim,
        **counts,
        head_dim=head_dim,
        capacity=capacity,
        rotary_dim=0,
        scale=(head_dim / 2) ** -0.5,
        out_dim=dim,
    )
    mlp = GatedMLP(
        dim, config.integer("intermediate_size", 14848), activation=parts.activation(config, "gelu")
    )
    mamba = Mamba(
        dim,
        **parts.mamba_options(config),
        groups=config.integer("n_mamba_heads", 2),
    )
    depth = config.integer("num_hidden_layers", 76)
    attended = parts.every(config, "attn_layer", max(depth - 3, 0), 6, 4)
    default = ["mamba", "mamba", "hybrid"][:depth]
    default += ["hybrid" if kind else "mamba" for kind in attended]
    kinds = _kinds(config, default)
    # The reference ties the uses of the shared block only together with the embeddings.
    tied = config.boolean("tie_word_embeddings", True)
    blocks = 1 if tied else max(kinds.count("hybrid"), 1)
    return _architecture(
        config,
        mamba,
        [SharedTransformer(str(i), attention, mlp, norm_eps=eps) for i in range(blocks)],
        kinds,
        mixer_table=_mamba(mamba),
        shared_name="shared_transf.",
        mlp_table=parts.mlp(mlp, "feed_forward."),
    )


def _zamba2(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 2560), config.number("rms_norm_eps", 1e-5, least=0)
    rotate = config.boolean("use_mem_rope", False)
    if rotate:  # the reference does not rescale the base, its warning says that it does
        config.expect("use_long_context", False, default=False)
    counts = parts.heads(config, 32)
    head_dim = 2 * dim // counts["heads"]
    theta, _ = config.rope(10000.0) if rotate else (10000.0, 1.0)
    adapters = config.boolean("use_shared_attention_adapter", False)
    if adapters:
        config.expect("num_key_value_heads", counts["heads"], default=counts["heads"])
    attention = Attention(
        2 * dim,
        **counts,
        head_dim=head_dim,
        capacity=capacity,
        rotary_dim=parts.rotary(head_dim, 1.0) if rotate else 0,
        rope_base=theta,
        scale=(head_dim / 2) ** -0.5,
        out_dim=dim,
    )
    bias = config.boolean("add_bias_linear", False)
    mlp = GatedMLP(
        dim,
        config.integer("intermediate_size", 4 * dim),
        activation=parts.activation(config, "gelu"),
        bias=bias,
    )
    heads, inner = config.integer("n_mamba_heads", 8), config.integer("mamba_expand", 2) * dim
    if inner % heads:
        raise ValueError(
            "load: config field `n_mamba_heads` must divide mamba_expand * hidden_size ="
            f" {inner}, got {heads}."
        )
    mamba = Mamba2(
        dim,
        state_dim=config.integer("mamba_d_state", 64),
        head_dim=inner // heads,
        heads=heads,
        groups=config.integer("mamba_ngroups", 1),
        conv_size=config.integer("mamba_d_conv", 4),
        in_bias=bias,
        out_bias=bias,
        norm_eps=1e-5,
        dt_limit=(config.number("time_step_min", 0.001), math.inf),
    )
    default = ["mamba", *(["mamba"] * 5 + ["hybrid"]) * 7, *["mamba"] * 4, "hybrid"]
    default += [*["mamba"] * 3, "hybrid", *["mamba"] * 2]
    rank = config.integer("adapter_rank", 128)
    kinds, blocks = _kinds(config, default), config.integer("num_mem_blocks", 1)
    if kinds.count("hybrid") > blocks:
        # Otherwise the reference has copies of the shared blocks with unused adapters.
        config.expect("tie_word_embeddings", True, default=True)
    return _architecture(
        config,
        mamba,
        [
            SharedTransformer(str(i), attention, mlp, rank, adapters, norm_eps=eps)
            for i in range(blocks)
        ],
        kinds,
        mixer_table=parts.mamba2(mamba),
        shared_name="shared_transformer.",
        mlp_table=_fused_mlp(mlp),
    )


def _kinds(config: Config, default: list[str]) -> list[str]:
    """Return the kind of each layer: "linear" or "hybrid"."""
    kinds = parts.layer_types(config, default, "layers_block_type", "layer_types", hybrid="hybrid")
    if "attention" in kinds:
        raise ValueError(
            "load: config field `layers_block_type` must have entries of 'mamba' and 'hybrid',"
            " got an attention layer."
        )
    return kinds


def _architecture(
    config: Config,
    mamba: Mamba | Mamba2,
    shared: Sequence[SharedTransformer],
    kinds: Sequence[str],
    *,
    mixer_table: list[Tensor],
    shared_name: str,
    mlp_table: list[Tensor],
) -> Architecture:
    """Return a model whose hybrid layers use the shared blocks in turn.

    The tensors of a shared block, with the adapters of all its uses, are those of its first use.
    """
    eps = shared[0].norm_eps
    plain = [*norm("input_layernorm", "mixer_norm", "rms"), *mixer_table]
    hybrid = [tensor.inside("mamba_decoder.", "") for tensor in plain]
    hybrid.append(linear("linear.weight", "injection.out_proj"))
    blocks, extra = [], []
    uses = [i for i, kind in enumerate(kinds) if kind == "hybrid"]
    for i, kind in enumerate(kinds):
        if kind != "hybrid":
            blocks.append(Block(mamba, norm_eps=eps))
            continue
        use = uses.index(i)
        number = use % len(shared)
        blocks.append(Block(mamba, norm_eps=eps, injection=shared[number]))
        stored = f"@layers.{uses[number]}.{shared_name}"
        if use == number:
            extra += parts.inside(
                [
                    *norm("input_layernorm", "mixer_norm", "rms"),
                    *norm("pre_ff_layernorm", "mlp_norm", "rms"),
                    *parts.attention(shared[number].attention),
                    *mlp_table,
                ],
                stored,
                f"backbone.shared.{shared[number].name}.",
            )
        extra += parts.inside(
            _adapters(shared[number], use), stored, f"backbone.block_{i}.injection."
        )
    return Architecture(
        blocks=blocks,
        tables=[hybrid if kind == "hybrid" else plain for kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm="@final_layernorm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 32000),
        tie_embeddings=config.boolean("tie_word_embeddings", True),
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        extra=extra,
    )


def _mamba(layer: Mamba) -> list[Tensor]:
    """Return the tensors of Zamba's Mamba, whose input projections alternate by channel."""
    channels, groups = layer.expand * layer.dim, layer.groups or 1
    size = channels // groups
    table = [
        linear("in_proj.weight", "in_proj", "gate_proj", groups=channels),
        conv("conv1d.weight", "conv.weight"),
        experts("x_proj_weight", "x_proj"),
        experts("dt_proj_weight", "dt_proj"),
        rows("dt_proj_bias", "dt_bias", shape=(groups, size)),
        rows("A_log", "A_log", shape=(groups, size, layer.state_dim)),
        rows("D", "D", shape=(groups, size), wide=True),
        linear("out_proj.weight", "out_proj"),
    ]
    if layer.bias:
        table.append(rows("in_proj.bias", "in_bias", "gate_bias", groups=channels))
        table.append(rows("out_proj.bias", "out_bias"))
    if layer.conv_bias:
        table.append(rows("conv1d.bias", "conv.bias"))
    return parts.inside(table, "mamba.", "mixer.")


def _fused_mlp(layer: GatedMLP) -> list[Tensor]:
    table = [
        linear("gate_up_proj.weight", "gate_proj", "up_proj"),
        linear("down_proj.weight", "down_proj"),
    ]
    if layer.bias:
        table.append(rows("gate_up_proj.bias", "gate_bias", "up_bias"))
        table.append(rows("down_proj.bias", "down_bias"))
    return parts.inside(table, "feed_forward.", "mlp.")


def _adapters(layer: SharedTransformer, use: int) -> list[Tensor]:
    """Return the low-rank additions of one use of a shared block."""
    table = []
    if layer.adapter_rank:
        name = f"feed_forward.gate_up_proj_adapter_list.{use}."
        table.append(linear(f"{name}0.weight", "adapter_down"))
        table.append(linear(f"{name}1.weight", "gate_up", "up_up"))
    if layer.attention_adapters:
        for letter in "qkv":
            name = f"self_attn.linear_{letter}_adapter_list.{use}."
            table.append(linear(f"{name}0.weight", f"{letter}_down"))
            table.append(linear(f"{name}1.weight", f"{letter}_up"))
    return table


ZAMBA = Family(_zamba, ("model.",))
ZAMBA2 = Family(_zamba2, ("model.",), ignored=(r"\.inv_freq$",))
