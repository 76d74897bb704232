"""Falcon-H1 (arXiv 2507.22448): Mamba-2 and attention in parallel, with constant multipliers."""

from seqjax.layers import Attention, GatedMLP, Mamba2, Scaled
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm


def _build(config: Config, capacity: int) -> Architecture:
    dim, eps = config.integer("hidden_size", 4096), config.number("rms_norm_eps", 1e-5, least=0)
    config.expect("hidden_act", "silu", default="silu")
    mamba, attention, mlp = (
        _mamba(config, dim, eps),
        _attention(config, dim, capacity),
        _mlp(config),
    )
    ssm = _multipliers(config, "ssm_multipliers", 5)
    names = ("gate", "in", "B", "C", "dt")
    scales = {f"{name}_proj": scale for name, scale in zip(names, ssm, strict=True)}
    if mamba.in_bias:
        biases = (*(f"{name}_bias" for name in names[:-1]), "dt_proj_bias")
        scales |= dict(zip(biases, ssm, strict=True))
    key = config.number("key_multiplier", 1.0)
    keys = ["k_proj", "k_bias"] if attention.bias else ["k_proj"]
    gate, down = _multipliers(config, "mlp_multipliers", 2)
    gates = ["gate_proj", "gate_bias"] if mlp.bias else ["gate_proj"]
    block = Block(
        [
            Scaled(
                mamba,
                input_scale=config.number("ssm_in_multiplier", 1.0),
                output_scale=config.number("ssm_out_multiplier", 1.0),
                param_scales=scales,
            ),
            Scaled(
                attention,
                input_scale=config.number("attention_in_multiplier", 1.0),
                output_scale=config.number("attention_out_multiplier", 1.0),
                param_scales=dict.fromkeys(keys, key),
            ),
        ],
        Scaled(mlp, output_scale=down, param_scales=dict.fromkeys(gates, gate)),
        norm_eps=eps,
    )
    table = [
        *norm("input_layernorm", "mixer_norm", "rms"),
        *norm("pre_ff_layernorm", "mlp_norm", "rms"),
        *parts.mamba2(mamba, "mamba.", "mixer_0."),
        *parts.attention(attention, "self_attn.", "mixer_1."),
        *parts.mlp(mlp, "feed_forward."),
    ]
    depth = config.integer("num_hidden_layers", 32)
    return Architecture(
        blocks=[block] * depth,
        tables=[table] * depth,
        embedding="@embed_tokens.weight",
        final_norm="@final_layernorm",
        layers="@layers.{}.",
        vocab_size=config.integer("vocab_size", 128000),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        norm="rms",
        norm_eps=eps,
        model={
            "embedding_scale": config.number("embedding_multiplier", 1.0),
            "logit_scale": config.number("lm_head_multiplier", 1.0),
        },
    )


def _mamba(config: Config, dim: int, eps: float) -> Mamba2:
    # The reference's default is 1024; null stands for mamba_expand * hidden_size.
    null = "mamba_d_ssm" in config.values and not config.has("mamba_d_ssm")
    inner = None if null else config.integer("mamba_d_ssm", 1024)
    norm_first = config.boolean("mamba_norm_before_gate", True)
    normed = config.boolean("mamba_rms_norm", False)
    return Mamba2(
        dim,
        **parts.mamba2_fields(config, dim, inner),
        out_bias=config.boolean("projectors_bias", False),
        norm=None if not normed else "norm_first" if norm_first else "gate_first",
        norm_eps=eps,
    )


def _attention(config: Config, dim: int, capacity: int) -> Attention:
    counts = parts.heads(config, 32, 8)
    head_dim = config.integer("head_dim", dim // counts["heads"])
    theta, share = config.rope(10000.0)
    bias = config.boolean("attention_bias", False)
    return Attention(
        dim,
        **counts,
        head_dim=head_dim,
        capacity=capacity,
        rotary_dim=parts.rotary(head_dim, share),
        rope_base=theta,
        bias=bias,
        out_bias=bias,
    )


def _mlp(config: Config) -> GatedMLP:
    return GatedMLP(
        config.integer("hidden_size", 4096),
        config.integer("intermediate_size", 14336),
        bias=config.boolean("mlp_bias", False),
    )


def _multipliers(config: Config, name: str, count: int) -> list[float]:
    return config.list_of(name, float, [1.0] * count, length=count)


FALCON_H1 = Family(_build, ("model.",), ignored=(r"\.inv_freq$", r"\.mup_vector$"))
