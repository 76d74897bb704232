"""HGRN's lower bounds, which the blocks of a backbone share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from seqjax.layers import HGRN, Context
from seqjax.layers._lower_bound import initial_values, room_above
from seqjax.models import Backbone
from tests.contract.harness import assert_close
from tests.contract.test_sequence_axis import TIME, split
from tests.oracles import gated_oracles


def bounds(shares):
    """Return the bound of each block, [L, N]."""
    context = Context(values=initial_values(shares.shape[1], jnp.float64))
    found = []
    for block, share in enumerate(shares):
        here = Context(block=block, depth=len(shares), values=context.values)
        found.append(1 - room_above(jnp.asarray(share), jnp.float64, here)[0, 0])
    return np.stack(found)


def test_bounds_start_evenly_spaced(x64):
    assert_close(bounds(np.zeros((5, 3))), np.arange(5)[:, None] / 5 * np.ones(3), 1e-12)


def test_bounds_are_cumulative_sums_of_a_softmax(x64):
    """Check that the shares reach the paper's bounds, by computing shares from a softmax."""
    depth, logits = 4, np.random.default_rng(0).standard_normal((4, 3))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=0)
    expected = np.cumsum(softmax, axis=0) - softmax[0]
    taken = softmax[1:] / (1 - expected[:-1])
    later = np.log(depth - np.arange(1, depth))[:, None]
    shares = np.concatenate([np.zeros((1, 3)), np.log(taken / (1 - taken)) + later])
    assert_close(bounds(shares), expected, 1e-12)


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
    assert np.count_nonzero(np.concatenate([np.ravel(leaf) for leaf in shares])) == 2 * 4
