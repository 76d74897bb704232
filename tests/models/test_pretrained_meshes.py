"""Published checkpoints on meshes: shards of the parameters, and time over devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqjax import sharding
from tests.models.test_pretrained import TOLERANCE, checkpoints, load

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("scan", [False, True])
@checkpoints({"qwen3_5_text"})
def test_a_mesh_holds_the_shards(name, scan):
    plain, expected, tokens, logits = load(name, scan=scan)
    odd_heads = name in ("falcon_h1", "rwkv7")  # 5 and 3, which no axis of 2 divides
    mesh = sharding.make_mesh("fsdp=8" if odd_heads else "fsdp=4,tensor=2")
    model, params, *_ = load(name, mesh=mesh, scan=scan)
    where = sharding.shard(model, mesh).params
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == place
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert model == plain
    got, _ = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(got, logits, **TOLERANCE)


@checkpoints({"qwen3_5_text"})
def test_time_over_a_mesh(name):
    model, params, tokens, logits = load(name)
    mesh = jax.make_mesh((4,), ("time",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        lambda params, tokens: model.apply(params, tokens, sequence_axis="time")[0],
        mesh=mesh,
        in_specs=(P(), P(None, "time")),
        out_specs=P(None, "time"),
    )
    got = jax.jit(split)(params, tokens[:, :36])
    np.testing.assert_allclose(got, logits[:, :36], **TOLERANCE)
