"""Tensors of mixtures of experts, in the formats that families share."""

from seqjax.layers import GatedMLP, MoE
from seqjax.pretrained.config import Config
from seqjax.pretrained.table import Tensor, each_expert, experts


def router(name: str) -> Tensor:
    """Return the router's weight, which is at least float32."""
    return Tensor(name, ("router",), wide=True)


def separate(layer: MoE, stored: str) -> list[Tensor]:
    """Return the weights of the experts, stored for each expert as `0.up_proj.weight` and so on."""
    names = ("gate", "up", "down") if isinstance(layer.expert, GatedMLP) else ("up", "down")
    return [
        each_expert(f"{stored}{{}}.{name}_proj.weight", layer.experts, f"experts.{name}_proj")
        for name in names
    ]


def numbered(layer: MoE, stored: str) -> list[Tensor]:
    """Return the weights of the experts, stored for each expert as `0.w1.weight` and so on."""
    names = {"w1": "gate", "w3": "up", "w2": "down"}
    return [
        each_expert(f"{stored}{{}}.{name}.weight", layer.experts, f"experts.{names[name]}_proj")
        for name in names
    ]


def stacked(layer: MoE, stored: str) -> list[Tensor]:
    """Return the weights of the experts, stored for all experts with gate and up as one tensor."""
    up = ("gate", "up") if isinstance(layer.expert, GatedMLP) else ("up",)
    return [
        experts(f"{stored}{'_'.join(up)}_proj", *(f"experts.{name}_proj" for name in up)),
        experts(f"{stored}down_proj", "experts.down_proj"),
    ]


def top_k(config: Config, count: int, what: str, default: int) -> int:
    """Return the number of experts of a position, at most `count`, the field named `what`."""
    return config.at_most("num_experts_per_tok", count, what, default)
