"""MoE: a mixture of experts in place of an MLP, without dropped tokens."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.layers import _checks, _init
from seqjax.layers._base import Layer, Param, Params, State, state_dtype
from seqjax.layers._dispatch import plan
from seqjax.layers._math import dense
from seqjax.layers._stacked import Stacked
from seqjax.layers.context import Context
from seqjax.layers.mlp import GatedMLP


@dataclasses.dataclass(frozen=True)
class MoE(Layer):
    """Mixture of experts (arXiv 1701.06538): k of E MLPs for each position, none dropped.

        l_t = x_t W_r                                                   in float32 or better
        y_t = c * sum over the k chosen e of p_te expert_e(x_t) + shared(x_t)

    The router 'softmax' (2101.03961, 2401.04088) chooses the k largest logits:

        p_t = softmax(l_t)                      over all experts, or with `renormalize`
        p_t = softmax(l_t over the chosen)      which is softmax(l_t) divided by its chosen sum

    The router 'sigmoid' (2412.19437) has a correction bias that only chooses:

        s_t = sigmoid(l_t),    c_t = s_t + correction_bias
        p_t = s_t               or with `renormalize` s_t / (sum of the chosen s_t + 1e-20)

    It chooses the k largest c_t. With `groups` of experts, the two largest c_t of a group add up to
    its score, and it chooses only from the `top_groups` groups with the largest scores.

    c is `routed_scale`. With `shared_gate` the shared expert is multiplied by sigmoid(x_t w_s).
    With a `latent_dim` the experts run on x_t latent_down, and latent_up maps their sum back. The
    router and the shared expert run on x_t.

    The layer acts on one position at a time: its state is the empty tuple and `reset` has no
    effect. Each sequence sorts its positions by expert, and the experts run on blocks of positions.
    There is no capacity: shapes are static, with at most three rows for each choice of an expert.
    A batch that is split over devices needs no communication.

    `apply_with_aux` returns "router_logits" [B, T, E], and "balance_loss", the auxiliary loss
    E sum_e f_e P_e of arXiv 2101.03961. f_e is the share of positions that chose e, and P_e the
    mean probability of e: of the softmax, or of the sigmoids divided by their sum. An even load
    gives k. Add it to the loss with a small factor; `apply` does not compute it. Update
    `correction_bias`, which has no gradient, outside the optimizer.

    Departures: the choice has no noise. With a sharding rule for the axis "experts", devices
    exchange the weights of the experts that they run; see `seqjax.sharding.RULES`.

    Parameters: router [dim, E]; experts, the parameters of `expert` with a first axis of E; with
    the router 'sigmoid' correction_bias [E]; with `shared` shared, the shared expert's parameters;
    with `shared_gate` shared_gate [dim, 1]; with `latent_dim` latent_down [dim, latent_dim],
    latent_up [latent_dim, dim], with `latent_bias` latent_down_bias, latent_up_bias.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from seqjax.layers import GatedMLP
      >>> layer = MoE(dim=4, experts=8, top_k=2, expert=GatedMLP(4, 6), shared=GatedMLP(4, 8))
      >>> params = layer.init(jax.random.key(0))
      >>> y, state, aux = layer.apply_with_aux(params, jnp.ones((2, 5, 4)))
      >>> y.shape, state, aux["router_logits"].shape, params["experts"]["up_proj"].shape
      ((2, 5, 4), (), (2, 5, 8), (8, 4, 6))

    Attributes:
      dim: features of input and output.
      experts: number of experts E.
      top_k: number of experts of a position, k.
      expert: the layer of one expert, without a state; by default a GatedMLP.
      shared: a layer that runs on every position, without a state; by default there is none.
      router: 'softmax' or 'sigmoid'.
      renormalize: whether the probabilities of the chosen experts sum to 1.
      groups: number of groups of experts, for the router 'sigmoid'.
      top_groups: number of groups among whose experts a position chooses; by default all.
      routed_scale: factor of the routed experts' output.
      shared_gate: whether a sigmoid gate multiplies the shared expert's output.
      latent_dim: features of the input and output of the routed experts; by default dim, without
        projections.
      latent_bias: whether the projections to and from `latent_dim` have biases.
    """

    dim: int
    experts: int
    top_k: int
    expert: Layer | None = None
    shared: Layer | None = None
    router: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int | None = None
    routed_scale: float = 1.0
    shared_gate: bool = False
    latent_dim: int | None = None
    latent_bias: bool = False

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, experts=self.experts, top_k=self.top_k)
        _checks.positive(self, groups=self.groups, top_groups=self._top_groups)
        _checks.positive(self, latent_dim=self._inner_dim)
        _checks.one_of(self, "router", self.router, ("softmax", "sigmoid"))
        for name, layer in (("expert", self.expert), ("shared", self.shared)):
            _checks.require(
                self,
                layer is None or (isinstance(layer, Layer) and not _checks.has_state(layer)),
                f"`{name}` must be a seqjax layer without a state, got {layer!r}.",
            )
        _checks.require(
            self,
            self.shared is None or self.shared.dim == self.dim,
            f"`shared` must have dim={self.dim}, got {self.shared!r}.",
        )
        _checks.require(
            self,
            self.shared is not None or not self.shared_gate,
            "`shared_gate` must be False without a `shared` expert, got True.",
        )
        _checks.require(
            self,
            self._expert.dim == self._inner_dim,
            f"`expert` must have dim={self._inner_dim}, got {self.expert!r}.",
        )
        _checks.require(
            self,
            self.latent_dim is not None or not self.latent_bias,
            "`latent_bias` must be False without a `latent_dim`, got True.",
        )
        size = self.experts // self.groups
        _checks.require(
            self,
            self.groups == 1
            or (self.router == "sigmoid" and size >= 2 and size * self.groups == self.experts),
            "`groups` must be 1, or with router='sigmoid' divide the experts into groups of two or"
            f" more, got {self.groups} for {self.experts} experts and router={self.router!r}.",
        )
        _checks.require(
            self,
            self._top_groups <= self.groups,
            f"`top_groups` must be at most groups={self.groups}, got {self.top_groups}.",
        )
        _checks.require(
            self,
            self.top_k <= size * self._top_groups,
            f"`top_k` must be at most the {size * self._top_groups} experts to choose from, got"
            f" {self.top_k}.",
        )

    @property
    def _top_groups(self) -> int:
        return self.groups if self.top_groups is None else self.top_groups

    @property
    def _inner_dim(self) -> int:
        return self.dim if self.latent_dim is None else self.latent_dim

    @property
    def _expert(self) -> Layer:
        return GatedMLP(self._inner_dim) if self.expert is None else self.expert

    def declare_params(self) -> Mapping[str, Param | Layer]:
        inner = self._inner_dim
        params: dict[str, Param | Layer] = {
            "router": Param(
                (self.dim, self.experts), ("embed", None), "weight", _init.fan_in_normal
            ),
            "experts": Stacked(self._expert, self.experts, "experts"),
        }
        if self.router == "sigmoid":
            params["correction_bias"] = Param((self.experts,), (None,), "bias", _init.zeros)
        if self.shared is not None:
            params["shared"] = self.shared
        if self.shared_gate:
            params["shared_gate"] = Param((self.dim, 1), ("embed", None), "weight", _init.zeros)
        if self.latent_dim is not None:
            for name, shape in (("down", (self.dim, inner)), ("up", (inner, self.dim))):
                axes = ("embed", None) if name == "down" else (None, "embed")
                params[f"latent_{name}"] = Param(shape, axes, "weight", _init.fan_in_normal)
                if self.latent_bias:
                    bias = Param(shape[1:], axes[1:], "bias", _init.zeros)
                    params[f"latent_{name}_bias"] = bias
        return params

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide = state_dtype(x.dtype)
        logits = jnp.matmul(
            x.astype(wide), params["router"].astype(wide), precision=lax.Precision.HIGHEST
        )
        chosen, weights = self._choose(logits, params)
        self._record(logits, chosen, context)
        if self.routed_scale != 1:
            weights = weights * self.routed_scale
        inner = self._latent("down", params, x)
        y = self._run_experts(params["experts"], inner, chosen, weights)
        y = self._latent("up", params, y)
        if self.shared is not None:
            inside = context.enter("shared")
            shared, _ = self.shared.forward(params["shared"], x, (), inside)
            if self.shared_gate:
                shared = shared * jax.nn.sigmoid(dense(x, params["shared_gate"]))
            y = y + shared
        return y, state

    def _latent(self, name: str, params: Params, x: jax.Array) -> jax.Array:
        if self.latent_dim is None:
            return x
        return dense(x, params[f"latent_{name}"], params.get(f"latent_{name}_bias"))

    def _choose(self, logits: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
        """Return the chosen experts [B, T, k] and their weights, from logits [B, T, E]."""
        if self.router == "softmax":
            chosen = _largest(logits, self.top_k)
            top = jnp.take_along_axis(logits, chosen, axis=-1)
            if self.renormalize:
                return chosen, jax.nn.softmax(top, axis=-1)
            return chosen, jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        scores = jax.nn.sigmoid(logits)
        choice = scores + params["correction_bias"].astype(scores.dtype)
        if self._top_groups < self.groups:
            grouped = choice.reshape(*choice.shape[:-1], self.groups, -1)
            group_scores = jnp.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
            best = _largest(group_scores, self._top_groups)
            stays = (best[..., None] == jnp.arange(self.groups, dtype=best.dtype)).any(axis=-2)
            choice = jnp.where(stays[..., None], grouped, -jnp.inf).reshape(choice.shape)
        chosen = _largest(choice, self.top_k)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.renormalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return chosen, weights

    def _record(self, logits: jax.Array, chosen: jax.Array, context: Context) -> None:
        """Add the router's logits and the balancing loss to the extra outputs."""
        context.record("router_logits", logits)
        if self.router == "softmax":
            probabilities = jax.nn.softmax(logits, axis=-1)
        else:
            scores = jax.nn.sigmoid(logits)
            probabilities = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
        counts = (chosen[..., None] == jnp.arange(self.experts, dtype=chosen.dtype)).any(axis=-2)
        share, mean = (jnp.mean(z.astype(logits.dtype), (0, 1)) for z in (counts, probabilities))
        if context.sequence_axis is not None:
            share, mean = lax.pmean((share, mean), context.sequence_axis)
        context.record("balance_loss", self.experts * jnp.sum(share * mean))

    def _run_experts(
        self, params: Params, x: jax.Array, chosen: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Return the weighted sum of the chosen experts on x [B, T, K]."""
        dispatch = functools.partial(plan, experts=self.experts)
        token, valid, owner, slot = jax.vmap(dispatch)(chosen)
        rows = jax.vmap(lambda x, token: x[token])(x, token)
        # Zeros, because 0 * NaN of an unused row would reach the gradients of weights.
        rows = jnp.where(valid[..., None], rows, 0)
        out = self._run_blocks(params, rows, owner)
        flat = out.reshape(out.shape[0], -1, out.shape[-1])
        each = jax.vmap(lambda out, slot: out[slot])(flat, slot).astype(weights.dtype)
        return jnp.einsum("btkd,btk->btd", each, weights).astype(x.dtype)

    def _run_blocks(self, params: Params, rows: jax.Array, owner: jax.Array) -> jax.Array:
        """Run the experts `owner` [B, n] on blocks of rows [B, n, C, K].

        A block requires a copy of its expert's weights. A scan limits the copies in memory to about
        twice the experts. Copies are not residuals: the backward pass makes them again.
        """
        expert = self._expert

        def one(params: Params, rows: jax.Array) -> jax.Array:
            return expert.forward(params, rows[None], (), Context())[0][0]

        @jax.checkpoint
        def run(params: Params, rows: jax.Array, owner: jax.Array) -> jax.Array:
            own = jax.tree.map(lambda w: w.at[owner].get(mode="promise_in_bounds"), params)
            return jax.vmap(jax.vmap(one))(own, rows)

        batch, count = rows.shape[:2]
        if not isinstance(batch, int) or not isinstance(count, int):
            return run(params, rows, owner)
        limit = max(2 * self.experts // batch, 1)
        if count <= limit:
            return run(params, rows, owner)
        turns = -(-count // limit)

        def cut(z: jax.Array) -> jax.Array:
            z = jnp.pad(z, ((0, 0), (0, turns * limit - count), *((0, 0),) * (z.ndim - 2)))
            return jnp.moveaxis(z.reshape(batch, turns, limit, *z.shape[2:]), 1, 0)

        out = lax.map(lambda pair: run(params, *pair), (cut(rows), cut(owner)))
        return jnp.moveaxis(out, 0, 1).reshape(batch, turns * limit, *out.shape[3:])[:, :count]


def _largest(x: jax.Array, count: int) -> jax.Array:
    """Return the indices of the largest numbers along the last axis, the largest first.

    Unlike `lax.top_k`, a sort is split over devices along the other axes.
    """
    order = jnp.argsort(lax.stop_gradient(x), axis=-1, descending=True)
    return order[..., :count].astype(jnp.int32)
