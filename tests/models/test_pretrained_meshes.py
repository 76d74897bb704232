"""Published checkpoints on meshes: shards of the parameters, and time over devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqjax import sharding
from tests.models.test_pretrained import TOLERANCE, load

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


PLAIN = [
    "qwen3_5_text",
    "recurrent_gemma",
    "jamba_experts",
    "zamba",
    "zamba2",
    "minimax",
    "kimi_linear",
]
STACKED = [
    "mamba",
    "xlstm_7b",
    *slow("rwkv", "rwkv5", "rwkv6", "gla", "retnet", "hgrn", "hgrn2", "kda"),
]


@pytest.mark.quick("qwen3_5_text")
@pytest.mark.parametrize("name", PLAIN)
def test_a_mesh_holds_the_shards(name):
    check_shards(name, scan=False)


@pytest.mark.parametrize("name", STACKED)
def test_a_mesh_holds_the_shards_of_stacked_blocks(name):
    check_shards(name, scan=True)


def check_shards(name, scan):
    plain, expected, tokens, logits = load(name, scan=scan)
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    model, params, *_ = load(name, mesh=mesh, scan=scan)
    where = sharding.shard(model, mesh).params
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == place
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert model == plain
    got, _ = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(got, logits, **TOLERANCE)


@pytest.mark.quick("qwen3_5_text")
@pytest.mark.parametrize(
    "name",
    [
        *("qwen3_5_text", "recurrent_gemma", "rwkv7", "zamba", "zamba2", "minimax", "kimi_linear"),
        *slow("xlstm_7b", "rwkv", "rwkv6", "hgrn", "hgrn2", "retnet"),
    ],
)
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
