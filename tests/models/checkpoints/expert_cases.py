"""Cases of `make.py` with experts."""

import torch


def expert_cases(qwen, mamba2):
    """Return the cases by name, from the sizes that other cases have."""
    return {
        "qwen3_next": {
            "model_type": "qwen3_next",
            **qwen,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_only_layers": [1],
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 10,
            "shared_expert_intermediate_size": 12,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
        "qwen3_5_moe_text": {
            "model_type": "qwen3_5_moe_text",
            **qwen,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 10,
            "shared_expert_intermediate_size": 12,
            "tie_word_embeddings": True,
        },
        "granite_moe": {
            "model_type": "granitemoehybrid",
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 12,
            "shared_intermediate_size": 20,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.7,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.4,
            **mamba2,
        },
        "nemotron_h_moe": {
            "model_type": "nemotron_h",
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 6,
            "n_groups": 2,
            "ssm_state_size": 5,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "moe_intermediate_size": 10,
            "moe_shared_expert_intermediate_size": 14,
            "moe_latent_size": 12,
            "mlp_bias": True,
        },
    }


def stack_as_published(path, experts):
    """Join the weights of the experts, which transformers writes apart."""
    from safetensors.torch import load_file, save_file

    arrays = load_file(path)
    for first in [name for name in arrays if name.endswith(".experts.0.up_proj.weight")]:
        prefix = first.removesuffix("0.up_proj.weight")
        gate, up, down = (
            torch.stack([arrays.pop(f"{prefix}{i}.{kind}_proj.weight") for i in range(experts)])
            for kind in ("gate", "up", "down")
        )
        arrays[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        arrays[prefix + "down_proj"] = down
    save_file(arrays, path, metadata={"format": "pt"})
