"""MoE: blocks in a scan, extra outputs, dtypes, sharding of experts, bad arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqjax.layers import LRU, MLP, GatedMLP, MoE
from seqjax.layers._dispatch import plan
from seqjax.models import Backbone, Block
from tests.oracles import expert_oracles

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAYER = MoE(dim=4, experts=5, top_k=2, expert=GatedMLP(4, 3))


def drawn(layer, *shape):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        layer.param_shapes(),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    return params, jnp.asarray(rng.standard_normal((*shape, layer.dim)), jnp.float32)


@pytest.mark.slow
def test_many_sequences_run_in_pieces():
    """Check values and gradients where a scan runs over the blocks, against one sequence a time."""
    params, x = drawn(LAYER, 12, 7)

    @jax.jit
    def loss(params, x):
        y, _ = LAYER.apply(params, x)
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (whole, of_x), y = gradient(params, x)
    np.testing.assert_allclose(y, expert_oracles.moe(LAYER, params, x), atol=1e-5)
    singles = [gradient(params, x[i : i + 1]) for i in range(12)]
    # Gradients of about 10, summed in another order.
    np.testing.assert_allclose(
        of_x, jnp.concatenate([s[0][1] for s in singles]), rtol=1e-5, atol=1e-5
    )
    summed = jax.tree.map(lambda *parts: sum(parts), *(s[0][0] for s in singles))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, summed)


@pytest.mark.parametrize(("length", "experts", "top_k"), [(40, 3, 2), (3, 8, 2), (9, 2, 1)])
@pytest.mark.parametrize("skewed", [False, True])
def test_every_choice_has_a_row_of_its_expert(length, experts, top_k, skewed):
    rng = np.random.default_rng(1)
    orders = [np.arange(experts) if skewed else rng.permutation(experts) for _ in range(length)]
    chosen = np.stack(orders)[:, :top_k].astype(np.int32)
    position, valid, owner, slot = map(np.asarray, plan(jnp.asarray(chosen), experts))
    size = position.shape[1]
    assert valid.sum() == length * top_k == len(set(slot.ravel()))
    for t, i in np.ndindex(length, top_k):
        block, row = divmod(slot[t, i], size)
        assert (position[block, row], owner[block]) == (t, chosen[t, i])
        assert valid[block, row]
    assert position.size <= 2 * length * top_k + 8 * experts


@pytest.mark.slow
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_extra_outputs(router):
    layer = dataclasses.replace(LAYER, router=router)
    params, x = drawn(layer, 2, 6)
    _, _, aux = layer.apply_with_aux(params, x)
    logits = np.asarray(x) @ np.asarray(params["router"])
    np.testing.assert_allclose(aux["router_logits"], logits, atol=1e-5)
    scores = np.exp(logits) if router == "softmax" else 1 / (1 + np.exp(-logits))
    mean = (scores / scores.sum(-1, keepdims=True)).reshape(-1, 5).mean(0)
    share = np.zeros(5)
    for row in x.reshape(-1, 4):
        bias = params.get("correction_bias")
        chosen, _ = expert_oracles.routed(layer, params["router"], bias, np.asarray(row))
        share[chosen] += 1 / 12
    np.testing.assert_allclose(aux["balance_loss"], 5 * share @ mean, rtol=1e-5)

    # Time over devices: the loss is that of the whole sequence.
    mesh = jax.make_mesh((2,), ("time",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.shard_map(
        lambda x: layer.apply_with_aux(params, x, sequence_axis="time")[2]["balance_loss"],
        mesh=mesh,
        in_specs=P(None, "time"),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.jit(split)(x), aux["balance_loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_balance_loss_has_a_gradient_for_the_router_alone():
    layer = dataclasses.replace(LAYER, router="sigmoid")
    params, x = drawn(layer, 2, 6)
    gradient = jax.grad(lambda p: layer.apply_with_aux(p, x)[2]["balance_loss"])(params)
    router = gradient.pop("router")
    assert jnp.abs(router).max() > 0
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.quick("False")
@pytest.mark.parametrize("remat", [False, True])
def test_stacked_blocks_are_the_same(remat):
    model = Backbone(Block(LRU(4), LAYER), depth=2)
    params, x = drawn(model, 2, 6)
    y, _, aux = jax.jit(model.apply_with_aux)(params, x)
    scanned = dataclasses.replace(model, scan=True, remat=remat)
    blocks = [params[f"block_{i}"] for i in range(2)]
    stacked = {
        "group_0": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        "final_norm": params["final_norm"],
    }
    assert scanned.param_axes()["group_0"]["mlp"]["experts"]["up_proj"] == (
        "layers",
        "experts",
        "embed",
        "mlp",
    )
    z, _, other = jax.jit(scanned.apply_with_aux)(stacked, x)
    np.testing.assert_allclose(z, y, atol=1e-5)
    assert other.keys() == aux.keys()


def test_bfloat16_routes_in_float32():
    params, x = drawn(LAYER, 2, 6)
    narrow = x.astype(jnp.bfloat16)
    y, _, aux = LAYER.apply_with_aux(params, narrow)
    assert (y.dtype, aux["router_logits"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = expert_oracles.moe(LAYER, params, np.asarray(narrow, np.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, "`top_k` must be at most the 5 experts to choose from, got 6"),
        ({"experts": 0}, "`experts` must be an integer >= 1, got 0"),
        ({"router": "noisy"}, "`router` must be one of 'softmax', 'sigmoid', got 'noisy'"),
        ({"groups": 5}, "`groups` must be 1, or with router='sigmoid' divide"),
        ({"groups": 5, "router": "sigmoid"}, "into groups of two or more, got 5 for 5 experts"),
        ({"top_groups": 2}, "`top_groups` must be at most groups=1, got 2"),
        ({"expert": GatedMLP(3)}, r"`expert` must have dim=4, got GatedMLP\(dim=3\)"),
        ({"expert": LRU(4)}, "`expert` must be a seqjax layer without a state, got LRU"),
        ({"shared": MLP(3)}, r"`shared` must have dim=4, got MLP\(dim=3\)"),
        ({"shared_gate": True}, "`shared_gate` must be False without a `shared` expert"),
        ({"latent_bias": True}, "`latent_bias` must be False without a `latent_dim`"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYER, **options)
