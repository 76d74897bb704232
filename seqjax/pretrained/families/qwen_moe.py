"""Qwen3-Next and Qwen3.5 with experts: the layers of Qwen3.5, with mixtures of experts."""

from seqjax.layers import DeltaNet, GatedMLP, Layer, MoE
from seqjax.pretrained.config import Config
from seqjax.pretrained.families import experts, parts, qwen3_5
from seqjax.pretrained.family import Architecture, Family
from seqjax.pretrained.table import Tensor, linear

_NEXT = {"dim": 2048, "depth": 48, "kv_heads": 2, "vocab_size": 151936}
_MOE = {"dim": 2048, "depth": 40, "kv_heads": 2, "vocab_size": 248320}


def _next(config: Config, capacity: int) -> Architecture:
    dim = config.integer("hidden_size", _NEXT["dim"])
    depth = config.integer("num_hidden_layers", _NEXT["depth"])
    count = config.integer("num_experts", 512, least=0)
    every = config.integer("decoder_sparse_step", 1)
    dense_layers = config.list_of("mlp_only_layers", int, [])
    dense = GatedMLP(dim, config.integer("intermediate_size", 5632))
    sparse: MoE | None = None
    if count:
        sparse = _mixture(config, dim, count, 10, config.boolean("norm_topk_prob", True))
    has_experts = [count and i not in dense_layers and (i + 1) % every == 0 for i in range(depth)]
    mlps: list[Layer] = []
    tables: list[list[Tensor]] = []
    variants: list[Tensor] = []
    for i, chosen in enumerate(has_experts):
        if not chosen or sparse is None:
            mlps.append(dense)
            tables.append(parts.mlp(dense))
            continue
        mlps.append(sparse)
        weights = experts.separate(sparse, "experts.")
        tables.append(parts.inside([*weights, *_others(sparse)], "mlp.", "mlp."))
        variants += _in_layer(experts.stacked(sparse, "experts."), i)
    return qwen3_5.hybrid(config, capacity, mlps, tables, _NEXT, _interleaved, variants)


def _moe(config: Config, capacity: int) -> Architecture:
    dim = config.integer("hidden_size", _MOE["dim"])
    depth = config.integer("num_hidden_layers", _MOE["depth"])
    layer = _mixture(config, dim, config.integer("num_experts", 256), 8, renormalize=True)
    table = [*experts.stacked(layer, "experts."), *_others(layer)]
    variants = [
        tensor for i in range(depth) for tensor in _in_layer(experts.separate(layer, "experts."), i)
    ]
    return qwen3_5.hybrid(
        config,
        capacity,
        [layer] * depth,
        [parts.inside(table, "mlp.", "mlp.")] * depth,
        _MOE,
        qwen3_5.separate_delta,
        variants,
    )


def _mixture(config: Config, dim: int, count: int, top_k: int, renormalize: bool) -> MoE:
    return MoE(
        dim,
        experts=count,
        top_k=experts.top_k(config, count, "num_experts", top_k),
        expert=GatedMLP(dim, config.integer("moe_intermediate_size", 512)),
        shared=GatedMLP(dim, config.integer("shared_expert_intermediate_size", 512)),
        renormalize=renormalize,
        shared_gate=True,
    )


def _others(layer: MoE) -> list[Tensor]:
    """Return the tensors of a mixture of experts other than those of the routed experts."""
    assert layer.shared is not None
    return [
        experts.router("gate.weight"),
        *parts.mlp(layer.shared, "shared_expert.", "shared."),
        linear("shared_expert_gate.weight", "shared_gate"),
    ]


def _in_layer(table: list[Tensor], i: int) -> list[Tensor]:
    return parts.inside(table, f"@layers.{i}.mlp.", f"backbone.block_{i}.mlp.")


def _interleaved(layer: DeltaNet) -> list[Tensor]:
    """Return the tensors of a DeltaNet layer whose projections are stored by head of the keys."""
    return qwen3_5.delta_net(
        [
            linear(
                "in_proj_qkvz.weight",
                *("q_proj", "k_proj", "v_proj", "gate_proj"),
                groups=layer.heads,
            ),
            linear("in_proj_ba.weight", "beta_proj", "a_proj", groups=layer.heads),
        ]
    )


QWEN3_NEXT = Family(_next, ("model.",), ignored=qwen3_5.IGNORED)
QWEN3_5_MOE = Family(_moe, qwen3_5.PREFIXES, ignored=qwen3_5.IGNORED, text="text_config")
