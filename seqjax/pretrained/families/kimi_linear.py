"""Kimi Linear (arXiv 2510.26692): Kimi Delta Attention, latent attention, and experts."""

from seqjax.layers import KDA, MLA, GatedMLP, Layer, MoE
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import experts, parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, conv, linear, rows

_ONLY = {
    "hidden_act": "silu",
    "mla_use_nope": True,
    "mla_use_output_gate": False,
    "attn_res_block_size": 0,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "tie_word_embeddings": False,  # the reference never ties them
}


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 2304), config.number("rms_norm_eps", 1e-5, least=0)
    for name, only in _ONLY.items():
        config.expect(name, only, default=only)
    depth = config.integer("num_hidden_layers", 27)
    linear_config = config.inner("linear_attn_config")
    heads = config.integer("num_attention_heads", 32)
    config.expect("num_key_value_heads", heads, default=heads)
    attention = MLA(
        dim,
        heads=heads,
        kv_rank=config.integer("kv_lora_rank", 512),
        head_dim=config.integer("qk_nope_head_dim", 128),
        rotary_dim=config.integer("qk_rope_head_dim", 64, least=0),
        value_dim=config.integer("v_head_dim", 128),
        q_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
        capacity=capacity,
        rope_base=None,
        bias=config.boolean("attention_bias", False),
    )
    delta = KDA(
        dim,
        heads=linear_config.integer("num_heads", config.get("linear_num_heads", 32)),
        head_dim=linear_config.integer("head_dim", config.get("linear_head_dim", 128)),
        conv_size=linear_config.integer(
            "short_conv_kernel_size", config.get("linear_conv_kernel_dim", 4)
        ),
        gate_bias=False,
        norm_eps=eps,
    )
    mlp = GatedMLP(dim, config.integer("intermediate_size", 9216))
    moe = _moe(config, dim)
    mixers: dict[str, Layer] = {"linear": delta, "attention": attention}
    mlps: dict[str, Layer] = {"dense": mlp, "sparse": moe}
    tables = {
        "linear": _delta(delta),
        "attention": _attention(attention),
        "dense": parts.mlp(mlp),
        "sparse": _moe_tensors(moe),
    }
    others = {
        "dense": parts.mlp(mlp, "block_sparse_moe."),
        "sparse": parts.inside(experts.stacked(moe, "experts."), "block_sparse_moe.", "mlp."),
    }
    common = [
        *norm("input_layernorm", "mixer_norm", "rms"),
        *norm("post_attention_layernorm", "mlp_norm", "rms"),
    ]
    kinds = list(zip(_kinds(config, linear_config, depth), _mlp_kinds(config, depth), strict=True))
    return Architecture(
        blocks=[Block(mixers[mixer], mlps[kind], norm_eps=eps) for mixer, kind in kinds],
        tables=[[*common, *tables[mixer], *tables[kind]] for mixer, kind in kinds],
        embedding="@embed_tokens.weight",
        final_norm="@norm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 163840),
        tie_embeddings=False,
        norm="rms",
        norm_eps=eps,
        model={"embedding_scale": 1.0},
        # Files of transformers have the name of the experts' layers in dense layers too.
        variants=[
            tensor.inside(f"@layers.{i}.", f"backbone.block_{i}.")
            for i, (_, kind) in enumerate(kinds)
            for tensor in others[kind]
        ],
    )


def _moe(config: Config, dim: int) -> MoE:
    width = config.integer("moe_intermediate_size", 1024)
    # transformers writes the first name of each pair, and accepts both.
    count, top_k, shared, groups, renormalize = (
        parts.present(config, *names)
        for names in (
            ("num_experts", "num_local_experts"),
            ("num_experts_per_token", "num_experts_per_tok"),
            ("num_shared_experts", "n_shared_experts"),
            ("num_expert_group", "n_group"),
            ("moe_renormalize", "norm_topk_prob"),
        )
    )
    total, split = config.integer(count, 256), config.integer(groups, 1)
    best = config.at_most("topk_group", split, groups, 1)
    if total % split or (split > 1 and total // split < 2):
        raise ValueError(
            f"load: config field `{groups}` must divide {count} into groups of two or more, got"
            f" {split} for {total}."
        )
    return MoE(
        dim,
        experts=total,
        top_k=config.at_most(top_k, total // split * best, "the experts to choose from", 8),
        expert=GatedMLP(dim, width),
        shared=GatedMLP(dim, width * config.integer(shared, 1)),
        router="sigmoid",
        renormalize=config.boolean(renormalize, True),
        groups=split,
        top_groups=best,
        routed_scale=config.number("routed_scaling_factor", 2.446),
    )


def _moe_tensors(layer: MoE) -> list[Tensor]:
    assert layer.shared is not None
    table = [
        experts.router("gate.weight"),
        rows("gate.e_score_correction_bias", "correction_bias", wide=True),
        *experts.numbered(layer, "experts."),
        *parts.mlp(layer.shared, "shared_experts.", "shared."),
    ]
    return parts.inside(table, "block_sparse_moe.", "mlp.")


def _kinds(config: Config, inner: Config, depth: int) -> list[str]:
    """Return the kind of each layer, which `linear_attn_config` may give by numbers from 1."""
    if config.has("layer_types") or not (inner.has("full_attn_layers") and inner.has("kda_layers")):
        default = [
            "full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(depth)
        ]
        return parts.layer_types(config, default, "layer_types")
    full, delta = (inner.list_of(name, int) for name in ("full_attn_layers", "kda_layers"))
    if sorted([*full, *delta]) != list(range(1, depth + 1)):
        raise ValueError(
            "load: config field `linear_attn_config` must have each layer from 1 to"
            f" num_hidden_layers = {depth} once, got full_attn_layers {full} and kda_layers"
            f" {delta}."
        )
    return ["attention" if i + 1 in full else "linear" for i in range(depth)]


def _mlp_kinds(config: Config, depth: int) -> list[str]:
    """Return "dense" or "sparse" for each layer."""
    first = config.integer("first_k_dense_replace", 1, least=0)
    kinds = config.list_of(
        "mlp_layer_types", str, ["dense" if i < first else "sparse" for i in range(depth)]
    )
    if len(kinds) != depth or not set(kinds) <= {"dense", "sparse"}:
        raise ValueError(
            f"load: config field `mlp_layer_types` must have {depth} entries of 'dense' and"
            f" 'sparse', got {kinds}."
        )
    return kinds


def _attention(layer: MLA) -> list[Tensor]:
    shared = ("k_rope",) if layer.rotary_dim else ()
    table = [
        linear("kv_a_proj_with_mqa.weight", "kv_down", *shared),
        rows("kv_a_layernorm.weight", "kv_norm"),
        linear("kv_b_proj.weight", "k_up", "v_up", groups=layer.heads),
        linear("o_proj.weight", "out_proj"),
    ]
    if layer.q_rank is None:
        table.append(linear("q_proj.weight", "q_proj"))
    else:
        table += [
            linear("q_a_proj.weight", "q_down"),
            rows("q_a_layernorm.weight", "q_norm"),
            linear("q_b_proj.weight", "q_up"),
        ]
    if layer.bias:
        biases = [f"{name}_bias" for name in ("kv_down", *shared)]
        table += [rows("kv_a_proj_with_mqa.bias", *biases), rows("o_proj.bias", "out_bias")]
        if layer.q_rank is not None:
            table.append(rows("q_a_proj.bias", "q_down_bias"))
    return parts.inside(table, "self_attn.", "mixer.")


def _delta(layer: KDA) -> list[Tensor]:
    table = [
        *(linear(f"{name}_proj.weight", f"{name}_proj") for name in "qkv"),
        *(conv(f"{name}_conv1d.weight", f"{name}_conv.weight") for name in "qkv"),
        linear("b_proj.weight", "beta_proj"),
        linear("f_a_proj.weight", "decay_down"),
        linear("f_b_proj.weight", "decay_up"),
        linear("g_a_proj.weight", "gate_down"),
        linear("g_b_proj.weight", "gate_up"),
        rows("A_log", "A_log", shape=(1, 1, layer.heads, 1)),
        rows("dt_bias", "dt_bias"),
        rows("o_norm.weight", "norm"),
        linear("o_proj.weight", "out_proj"),
    ]
    return parts.inside(table, "self_attn.", "mixer.")


KIMI_LINEAR = Family(_build, ("model.",), ignored=(r"\.inv_freq$",))
