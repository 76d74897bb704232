"""HGRN's lower bounds, which the blocks of a backbone share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from seqjax.layers import HGRN, LRU, Context, Scaled
from seqjax.layers._lower_bound import initial_values, names, room_above
from seqjax.models import Backbone, Block
from tests.contract.harness import assert_close
from tests.contract.test_sequence_axis import TIME, split
from tests.oracles import gated_oracles


def bounds(rows):
    """Return the bound of each block, [L, N]."""
    depth, width = rows.shape
    context = Context(values=initial_values(width) | {names(width)[0]: jnp.asarray(rows)})
    return np.stack([1 - room_above(width, jnp.float64, context)[0, 0] for _ in range(depth)])


def test_bounds_start_evenly_spaced(x64):
    assert_close(bounds(np.zeros((5, 3))), np.arange(5)[:, None] / 5 * np.ones(3), 1e-12)


def test_bounds_are_cumulative_sums_of_a_softmax(x64):
    rows = np.random.default_rng(0).standard_normal((4, 3))
    softmax = np.exp(rows) / np.exp(rows).sum(axis=0)
    assert_close(bounds(rows), np.cumsum(softmax, axis=0) - softmax[0], 1e-12)


@pytest.mark.quick("True")
@pytest.mark.parametrize("scan", [False, True])
def test_rows_are_those_of_the_blocks_with_bounds(scan, x64, compiled_quickly):
    """Compare a hybrid with single blocks that are given their bounds."""
    mixers = [LRU(4), HGRN(4), HGRN(4, norm_eps=1e-3), HGRN(4, lower_bound=False)]
    backbone = Backbone(mixers, depth=8, mlp_ratio=0, scan=scan)
    params = backbone.init(jax.random.key(0), jnp.float64)
    draw = np.random.default_rng(0).standard_normal
    rows = draw((4, 4))
    for i, row in enumerate(rows):  # the blocks 1, 2, 5 and 6
        if scan:
            mixer = params[f"group_{1 + i % 2}"]["mixer"]
            mixer["lower_bound"] = mixer["lower_bound"].at[i // 2].set(row)
        else:
            params[f"block_{1 + i % 2 + 4 * (i // 2)}"]["mixer"]["lower_bound"] = jnp.asarray(row)
    x = draw((2, 7, 4))
    y, _ = jax.jit(backbone.apply)(params, x)
    bound, h, count = bounds(rows), x, 0
    for block in range(8):
        if scan:
            own = jax.tree.map(lambda leaf, i=block // 4: leaf[i], params[f"group_{block % 4}"])
        else:
            own = params[f"block_{block}"]
        scaled = h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-6) * own["mixer_norm"]["scale"]
        layer = mixers[block % 4]
        if block % 4 == 0:
            h = h + layer.apply(own["mixer"], scaled)[0]
        else:
            low = bound[count] if layer.lower_bound else 0.0
            count += layer.lower_bound
            h = h + gated_oracles.hgrn(layer, own["mixer"], scaled, bound=low)
    h = h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
    assert_close(y, h, 1e-12)


@pytest.mark.quick("True")
@pytest.mark.parametrize("scan", [False, True])
def test_backbone_passes_bounds_on(scan, x64, compiled_quickly):
    depth, layer = 3, HGRN(dim=4)
    backbone = Backbone(layer, depth=depth, mlp_ratio=0, scan=scan)
    params = jax.tree.map(jnp.asarray, backbone.init(jax.random.key(0), jnp.float64))
    x = np.random.default_rng(0).standard_normal((2, 7, 4))
    y, _ = jax.jit(backbone.apply)(params, x)
    h = x
    for block in range(depth):
        if scan:
            own = jax.tree.map(lambda leaf, block=block: leaf[block], params["group_0"])
        else:
            own = params[f"block_{block}"]
        scaled = h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-6) * own["mixer_norm"]["scale"]
        h = h + gated_oracles.hgrn(layer, own["mixer"], scaled, bound=block / depth)
    h = h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
    assert_close(y, h, 1e-12)


def rms(h):
    return h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-6)


@pytest.mark.quick("True")
@pytest.mark.parametrize("scan", [False, True])
def test_layers_of_one_block_have_rows_in_the_order_of_their_calls(scan, x64, compiled_quickly):
    """Compare two mixers and an injection per block, all with bounds, with single layers."""
    layer, depth = HGRN(4), 2
    block = Block([layer, layer], injection=layer)
    backbone = Backbone(block, depth=depth, scan=scan)
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(
        lambda p: p + 0.3 * draw(p.shape), backbone.init(jax.random.key(0), jnp.float64)
    )
    x = draw((2, 7, 4))
    y, _ = jax.jit(backbone.apply)(params, x)
    if scan:
        every = [jax.tree.map(lambda p, i=i: p[i], params["group_0"]) for i in range(depth)]
    else:
        every = [params[f"block_{i}"] for i in range(depth)]
    names = ("injection", "mixer_0", "mixer_1")
    bound = iter(bounds(np.stack([own[n]["lower_bound"] for own in every for n in names])))
    h = x
    for own in every:
        injected = gated_oracles.hgrn(layer, own["injection"], h, bound=next(bound))
        inputs = rms(h + injected) * own["mixer_norm"]["scale"]
        for name in names[1:]:
            h = h + gated_oracles.hgrn(layer, own[name], inputs, bound=next(bound))
    assert_close(y, rms(h) * params["final_norm"]["scale"], 1e-12)


def test_scaled_bounds_are_bounds_of_scaled_parameters(x64, compiled_quickly):
    scaled = Backbone(Scaled(HGRN(4), param_scales={"lower_bound": 3.0}), depth=3, mlp_ratio=0)
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda p: p + draw(p.shape), scaled.init(jax.random.key(0), jnp.float64))
    tripled = jax.tree_util.tree_map_with_path(
        lambda path, p: 3 * p if path[-1].key == "lower_bound" else p, params
    )
    plain, x = Backbone(HGRN(4), depth=3, mlp_ratio=0), draw((2, 7, 4))
    y, _ = jax.jit(plain.apply)(tripled, x)
    assert_close(jax.jit(scaled.apply)(params, x)[0], y, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_bounds_with_time_split_over_devices(scan, x64, compiled_quickly):
    """Compare outputs and gradients of all shares with an unsplit call, recomputing blocks."""
    backbone = Backbone(HGRN(dim=4), depth=3, mlp_ratio=0, scan=scan, remat=True)
    params = backbone.init(jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 16, 4)))
    sharded = split(backbone.apply, P(), TIME, out_specs=(TIME, P()))

    def loss(run, params):
        y = run(params, x)[0]
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    got, expected = gradient(sharded, params), gradient(backbone.apply, params)
    assert_close(got, expected, 1e-10)
    shares = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected[0])
        if "lower_bound" in jax.tree_util.keystr(path)
    ]
    assert np.count_nonzero(np.concatenate([np.ravel(leaf) for leaf in shares])) == 3 * 4
