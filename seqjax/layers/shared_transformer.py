"""SharedTransformer: one transformer block that several blocks of a backbone use."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State
from seqjax.layers._math import Adapted, dense
from seqjax.layers.attention import Attention
from seqjax.layers.context import BACKBONE_INPUT, Context
from seqjax.layers.mlp import GatedMLP
from seqjax.layers.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class SharedTransformer(Layer):
    """One use of a shared transformer block, as in Zamba (2405.16712) and Zamba2 (2411.15242).

        a_t = attention(rms([x_t, e_t]))              e_t: input of the backbone, the embeddings
        y_t = mlp(rms(a_t)) W_out

    Use it as the `injection` of a `Block`. All uses with the same `name` in a `Backbone` share the
    norms, the attention and the MLP. The backbone has their parameters once, under "shared". Each
    use has its own W_out and its own keys and values. With an `adapter_rank` each use has its own
    low-rank additions to the two inward products of the MLP:

        W_gate + A G,    W_up + A U

    With `attention_adapters` the products to q, k and v have such additions too. The layer has no
    residual connection.

    Departures: the second factor of an addition starts at 0. Other weights start normal with
    variance 1/fan_in.

    Parameters: out_proj [dim, dim]; with an adapter_rank R adapter_down [dim, R], gate_up, up_up
    [R, hidden]; with attention_adapters q_down, k_down, v_down [2 dim, R] and q_up, k_up, v_up
    [R, heads * head_dim]. Shared: mixer_norm, mixer (`Attention`), mlp_norm, mlp (`GatedMLP`).
    State: that of the attention.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import GatedMLP, Mamba2
      >>> from seqjax.models import Backbone, Block
      >>> attention = Attention(dim=16, heads=2, capacity=16, out_dim=8)
      >>> shared = SharedTransformer("a", attention, GatedMLP(8), adapter_rank=2)
      >>> mixer = Mamba2(8, state_dim=4, head_dim=4)
      >>> model = Backbone([Block(mixer), Block(mixer, injection=shared)], depth=4)
      >>> y, state = model.apply(model.init(jax.random.key(0)), jnp.ones((2, 5, 8)))
      >>> y.shape, sorted(model.param_shapes()["shared"]["a"])
      ((2, 5, 8), ['mixer', 'mixer_norm', 'mlp', 'mlp_norm'])

    Attributes:
      name: the name of the shared parameters.
      attention: the attention, with 2 dim features in and dim features out.
      mlp: the MLP, with dim features in and out.
      adapter_rank: rank R of the low-rank additions; 0 for none.
      attention_adapters: whether the products to q, k and v have low-rank additions.
      norm_eps: constant added to the mean squares in the norms.
    """

    name: str
    attention: Attention
    mlp: GatedMLP
    adapter_rank: int = 0
    attention_adapters: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        dim = self.mlp.dim
        _checks.require(
            self,
            (self.attention.dim, self.attention.output_dim) == (2 * dim, dim),
            f"`attention` must have dim={2 * dim} and out_dim={dim} for an MLP of dim={dim}, got"
            f" dim={self.attention.dim} and out_dim={self.attention.output_dim}.",
        )
        _checks.require(
            self, self.adapter_rank >= 0, f"`adapter_rank` must be >= 0, got {self.adapter_rank}."
        )
        _checks.require(
            self,
            self.adapter_rank > 0 or not self.attention_adapters,
            "`attention_adapters` must have an adapter_rank > 0, got 0; pass adapter_rank.",
        )
        _checks.above_zero(self, norm_eps=self.norm_eps)

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Number of features, that of the MLP."""
        return self.mlp.dim

    @property
    def groups(self) -> int:
        """Number of heads of k and v, that of the attention."""
        return self.attention.groups

    def declare_params(self) -> Mapping[str, Param | Layer]:
        dim, rank = self.dim, self.adapter_rank
        attention = self.attention

        def weight(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Param:
            return Param((inputs, outputs), axes, "weight", _init.fan_in_normal)

        def addition(width: int, axis: str) -> Param:
            return Param((rank, width), (None, axis), "weight", _init.zeros)

        params: dict[str, Param | Layer] = {"out_proj": weight(dim, dim, (None, "embed"))}
        if rank:
            params["adapter_down"] = weight(dim, rank, ("embed", None))
            params |= {f"{name}_up": addition(self.mlp.inner_dim, "mlp") for name in ("gate", "up")}
        if self.attention_adapters:
            heads = {"q": attention.heads, "k": attention.groups, "v": attention.groups}
            for name, count in heads.items():
                axis = "heads" if count == attention.heads else "kv_heads"
                params[f"{name}_down"] = weight(2 * dim, rank, ("embed", None))
                params[f"{name}_up"] = addition(count * attention.key_dim, axis)
        return params

    def declare_shared(self) -> Mapping[str, Layer]:
        return {self.name: _SharedBlock(self.attention, self.mlp, self.norm_eps)}

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return self.attention.make_state(batch_size, dtype)

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        return {BACKBONE_INPUT: jnp.zeros((batch_size, length, self.dim), dtype)}

    def state_flops(self) -> int:
        return self.attention.state_flops()

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        _checks.require(
            self,
            self.name in context.shared,
            f"the layer must be inside a Backbone, which has the parameters {self.name!r}, got a"
            " call outside of one; use it as the injection of a Block.",
        )
        shared = context.shared[self.name]
        block = _SharedBlock(self.attention, self.mlp, self.norm_eps)
        attention, mlp = dict(shared["mixer"]), dict(shared["mlp"])
        if self.attention_adapters:
            for name in "qkv":
                own = params[f"{name}_down"], params[f"{name}_up"]
                attention[f"{name}_proj"] = Adapted(attention[f"{name}_proj"], *own)
        if self.adapter_rank:
            for name in ("gate", "up"):
                own = params["adapter_down"], params[f"{name}_up"]
                mlp[f"{name}_proj"] = Adapted(mlp[f"{name}_proj"], *own)
        both = jnp.concatenate([x, context.values[BACKBONE_INPUT]], axis=-1)
        both, _ = block.mixer_norm.forward(shared["mixer_norm"], both, (), context)
        mixed, state = self.attention.forward(attention, both, state, context)
        mixed, _ = block.mlp_norm.forward(shared["mlp_norm"], mixed, (), context)
        y, _ = self.mlp.forward(mlp, mixed, (), context)
        return dense(y, params["out_proj"]), state


@dataclasses.dataclass(frozen=True)
class _SharedBlock(Layer):
    """The parameters of a shared transformer block; `SharedTransformer` runs them."""

    attention: Attention
    mlp: GatedMLP
    norm_eps: float

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.mlp.dim

    @property
    def mixer_norm(self) -> RMSNorm:
        return RMSNorm(self.attention.dim, self.norm_eps)

    @property
    def mlp_norm(self) -> RMSNorm:
        return RMSNorm(self.mlp.dim, self.norm_eps)

    def declare_params(self) -> Mapping[str, Param | Layer]:
        return {
            "mixer_norm": self.mixer_norm,
            "mixer": self.attention,
            "mlp_norm": self.mlp_norm,
            "mlp": self.mlp,
        }

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        raise NotImplementedError("SharedTransformer: the layers that share a block run it.")
