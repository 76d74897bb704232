"""xLSTM-7B (arXiv 2503.13427): mLSTM layers with exponential gates."""

from seqjax.layers import MLSTM, GatedMLP
from seqjax.models import Block
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import parts
from seqjax.pretrained.family import Architecture, Family, norm
from seqjax.pretrained.table import Tensor, linear, rows


def _build(config: Config, capacity: int) -> Architecture:
    del capacity
    dim = config.integer("hidden_size", config.get("embedding_dim", 4096))
    config.expect("embedding_dim", dim, default=dim)
    for name, only in (("use_bias", False), ("add_out_norm", True), ("tie_word_embeddings", False)):
        config.expect(name, only, default=only)
    fused = config.expect("weight_mode", "single", "fused", default="single") == "fused"
    eps = config.number("norm_eps", 1e-6, least=0)
    heads = config.integer("num_heads", 8)
    mixer = MLSTM(
        dim,
        heads,
        variant="7b",
        expand_k=_width(config, "qk_dim_factor", 0.5, dim, heads) / dim,
        expand_v=_width(config, "v_dim_factor", 1.0, dim, heads) / dim,
        gate_cap=parts.positive(config, "gate_soft_cap", 15.0),
        norm_eps=eps,
        denominator_eps=config.number("eps", 1e-6, least=0),
        zero_maximum=True,
    )
    mlp = GatedMLP(dim, _hidden(config, dim))
    table = [
        *norm("norm_mlstm", "mixer_norm", "rms"),
        *norm("norm_ffn", "mlp_norm", "rms"),
        *parts.inside(_mlstm(fused), "mlstm_layer.", "mixer."),
        *parts.inside(_mlp(fused), "ffn.", "mlp."),
    ]
    depth = config.integer("num_blocks", config.get("num_hidden_layers", 32))
    return Architecture(
        blocks=[Block(mixer, mlp, norm_eps=eps)] * depth,
        tables=[table] * depth,
        embedding="@embeddings.weight",
        final_norm="@out_norm",
        layers="@blocks.{}.",
        vocab_size=config.integer("vocab_size", 50304),
        tie_embeddings=False,
        norm="rms",
        norm_eps=eps,
        model={
            "embedding_scale": 1.0,
            "logit_cap": parts.positive(config, "output_logit_soft_cap", 30.0),
        },
    )


def _width(config: Config, name: str, default: float, dim: int, heads: int) -> int:
    """Return the features of all heads."""
    factor = config.number(name, default)
    width = int(dim * factor)
    if width < 1 or width % heads:
        raise ValueError(
            f"load: config field `{name}` must give a multiple of num_heads = {heads} features, got"
            f" {factor!r} of {dim}."
        )
    return width


def _hidden(config: Config, dim: int) -> int:
    """Return the width of the MLP, which the reference rounds up in this way."""
    multiple = config.integer("ffn_round_up_to_multiple_of", 64)
    width = dim * config.number("ffn_proj_factor", 2.667)
    return int((width + multiple - 1) // multiple * multiple)


def _mlstm(fused: bool) -> list[Tensor]:
    table = [
        rows("multihead_norm.weight", "norm"),
        linear("out_proj.weight", "out_proj"),
    ]
    if fused:
        return [
            *table,
            linear("qkv_opreact.weight", "q_proj", "k_proj", "v_proj", "ogate_proj"),
            linear("ifgate_preact.weight", "igate_proj", "fgate_proj"),
            rows("ifgate_preact.bias", "igate_bias", "fgate_bias"),
        ]
    table += [linear(f"{name}.weight", f"{name}_proj") for name in "qkv"]
    for name in ("ogate", "igate", "fgate"):
        table.append(linear(f"{name}_preact.weight", f"{name}_proj"))
    return table + [rows(f"{name}_preact.bias", f"{name}_bias") for name in ("igate", "fgate")]


def _mlp(fused: bool) -> list[Tensor]:
    down = linear("proj_down.weight", "down_proj")
    if fused:
        return [linear("proj_up_gate_z.weight", "gate_proj", "up_proj"), down]
    gate = linear("proj_up_gate.weight", "gate_proj")
    return [gate, linear("proj_up.weight", "up_proj"), down]


XLSTM = Family(_build, ("backbone.", "model."))
