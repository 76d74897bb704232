"""Rows of mixtures of experts, one for each router."""

from seqjax.layers import MLP, GatedMLP, MoE
from tests.contract.layer_case import layer_case as _layer
from tests.oracles import expert_oracles

EXPERTS = [
    _layer(MoE(dim=4, experts=5, top_k=2, expert=GatedMLP(4, 3)), expert_oracles.moe),
    _layer(
        MoE(
            dim=4,
            experts=3,
            top_k=2,
            expert=GatedMLP(4, 3, bias=True),
            shared=GatedMLP(4, 5),
            renormalize=False,
            shared_gate=True,
        ),
        expert_oracles.moe,
        "MoE-shared",
    ),
    _layer(
        MoE(
            dim=4,
            experts=6,
            top_k=3,
            expert=MLP(3, 2),
            shared=MLP(4, 5, bias=True),
            router="sigmoid",
            groups=3,
            top_groups=2,
            routed_scale=2.5,
            latent_dim=3,
            latent_bias=True,
        ),
        expert_oracles.moe,
        "MoE-sigmoid",
    ),
]
