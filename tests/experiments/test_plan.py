"""Plans: parsed programs, counted operations, and steps compiled for TPU without a TPU."""

import dataclasses
import math

import jax
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("ml_collections")

from experiments import plan
from experiments.base import build
from experiments.base.errors import UserError
from experiments.compiled import collectives, flops
from experiments.configs import lm, pod
from seqjax import methods
from seqjax.layers import GRU, LRU, REGISTRY, DeltaNet, Mamba2, SlidingWindowAttention
from seqjax.models import Backbone, LanguageModel


@pytest.mark.parametrize("length", sorted(pod.LENGTHS))
@pytest.mark.parametrize("name", pod.MODELS)
def test_recipes_are_of_the_size_they_say(name, length):
    config = pod.get_config(f"{name},{length}")
    assert config.data.length == pod.LENGTHS[length][0]
    model = build.build_model(config.model)
    assert config.model.scan
    assert config.model.remat
    billions = flops.count_params(model) / 1e9
    assert billions == pytest.approx(7 if "7b" in name else 1.3, rel=0.08)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(shapes)) / 1e9 == billions


def test_an_unknown_length_is_one_line():
    with pytest.raises(UserError, match=r"unknown word '9k': did you mean '8k'"):
        pod.get_config("mamba_1b,9k")


def test_operations_by_hand():
    """Count the operations of a small model from its equations, weight by weight."""
    layer = DeltaNet(8, heads=2, conv_size=4)
    backbone = Backbone(layer, depth=3, mlp_ratio=2, scan=True)
    model = LanguageModel(10, backbone)
    block = 4 * 8 * 8 + 3 * 4 * 8 + 8 * 2 + 3 * 8 * 16  # q k v out, convolutions, beta, MLP
    forward = 3 * (2 * block + 6 * 2 * 4 * 4) + 2 * 8 * 10
    assert flops.train_flops(model, 5, 7) == 3 * 5 * 7 * forward
    stacked = dataclasses.replace(model, backbone=dataclasses.replace(backbone, scan=False))
    assert flops.train_flops(stacked, 5, 7) == 3 * 5 * 7 * forward
    assert SlidingWindowAttention(8, 2, 5).state_flops() == 4 * 5 * 8
    assert LRU(8, state_dim=3).state_flops() == 24
    assert GRU(8, state_dim=3).state_flops() == 8 * 3 * 3
    numbers = {"dim": 8, "heads": 2, "head_dim": 4, "state_dim": 3}
    for limit, per_number in ((None, 5), (methods.StateWindow(6), 10), (methods.StateNorm(1.0), 8)):
        assert Mamba2(**numbers, state_limit=limit).state_flops() == per_number * 2 * 3 * 4


@pytest.mark.parametrize("layer", sorted(REGISTRY))
def test_every_layer_is_counted(layer):
    config = lm.get_config("lru,quicktest").model
    config.mixers = layer
    model = build.build_model(config)
    assert all(block.state_flops() > 0 for block in model.backbone.stack)
    assert flops.train_flops(model, 1, 1) > 0


PLAN = plan.Plan(
    chips=8,
    mesh={"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1},
    parameters=1,
    tokens=8,
    model_flops=8 * 10**12,
    hbm=2.0**30,
    limit=16 * 2**30,
    fits=True,
    state_bytes=2**29,
    temporary_bytes=2**29,
    traffic=collectives.Traffic({"all-gather": 1}, {"all-gather": 2**20}, 0),
    seconds=1.0,
    remat=False,
    chip=plan.CHIPS["v5e"],
)

_LOOP = """HloModule m, num_partitions=4
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  ROOT %r = (s32[], f32[8]) tuple(%next, %x)
}
%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %ten = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%j, %ten), direction=LT
}
ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%a), condition=%condition, body=%body
}
"""


def test_turns_of_a_loop_that_are_not_stated():
    """Check a loop whose trip count the program does not state: it counts to ten in twos."""
    found = collectives.read(_LOOP)
    sent = 5 * 32 * 4 * 3 // 4
    assert found == collectives.Traffic({"all-gather": 5}, {"all-gather": sent}, 0, sent)
    unknown = collectives.read(_LOOP.replace("direction=LT", "direction=NE"))
    assert (unknown.counts, unknown.unknown_loops) == ({"all-gather": 1}, 1)


_FUSED = """HloModule m, num_partitions=4
%begin (x: f32[8]) -> (f32[8], f32[32]) {
  %x = f32[8]{0} parameter(0)
  %g = f32[32]{0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c = (f32[8], f32[32]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%end (y: f32[32]) -> f32[32] {
  %y = f32[32]{0} parameter(0)
  %h = f32[32]{0} all-gather(%y), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %d = f32[32]{0} custom-call(%h), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %s = f32[32]{0} all-gather(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %f = (f32[8], f32[32]) fusion(%a), kind=kCustom, calls=%begin
  ROOT %e = f32[32]{0} fusion(%f), kind=kCustom, calls=%end
}
"""


def test_asynchronous_collectives_overlap_with_compute():
    """Check the form of a TPU program: the collective is repeated at its start and its end."""
    found = collectives.read(_FUSED)
    assert found == collectives.Traffic({"all-gather": 2}, {"all-gather": 2 * 96}, 0, 96)
    chip = plan.CHIPS["v5e"]
    made = dataclasses.replace(
        PLAN,
        traffic=collectives.Traffic({"all-gather": 1}, {"all-gather": 300}, 0, 200),
        model_flops=0,
        chip=chip,
    )
    assert made.times()["memory"] > 300 / chip.link
    expected = made.times()["memory"] + 100 / chip.link
    assert made.overlapped_seconds() == pytest.approx(expected)
    assert made.step_seconds() == pytest.approx(made.times()["memory"] + 300 / chip.link)
    config = pod.get_config("mamba_1b")
    assert "overlaps 67 % of the bytes" in plan.report(config, made)
    alone = dataclasses.replace(
        made, traffic=collectives.Traffic({"all-gather": 1}, {"all-gather": 300}, 0)
    )
    assert "all collectives are synchronous" in plan.report(config, alone)
    single = dataclasses.replace(made, traffic=collectives.Traffic({}, {}, 0))
    assert "chips do not communicate" in plan.report(config, single)


def test_bad_topologies_are_one_line():
    with pytest.raises(UserError, match="unknown chip 'v5'"):
        plan.topology_devices("v5:2x2")


def test_what_would_fit_is_said():
    config = pod.get_config("mamba_1b")
    made = dataclasses.replace(
        PLAN,
        hbm=40 * 2**30,
        fits=False,
        state_bytes=4 * 2**30,
        temporary_bytes=36 * 2**30,
        traffic=None,
        remat=True,
    )
    text = plan.report(config, made)
    assert "memory per chip: 40.00 GiB of 16.00 GiB" in text
    assert "DOES NOT FIT: --config.data.batch_size=80" in text
    config.model.remat = False
    assert "--config.model.remat=True" in plan.report(config, made)
    full = dataclasses.replace(made, state_bytes=20 * 2**30)
    assert "more chips" in plan.report(config, full)
    message = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded by 4G."
    assert plan._used(message, 2**30) == 20.5 * 2**30
    message = "total memory required for HLO temporaries (19.5G) exceeds available HBM (15.75G)."
    assert plan._used(message, 2**30) == 20.5 * 2**30
    assert plan._used("out of luck", 2**30) is None


def test_the_table_has_every_recipe_and_slice(monkeypatch, capsys):
    def made(config, topology, mesh):
        return dataclasses.replace(PLAN, fits=topology != "small")

    monkeypatch.setattr(plan, "make_plan", made)
    monkeypatch.setattr(plan, "topology_devices", lambda topology: None)
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda name: "0")
    assert plan.table(["large"])
    assert not plan.table(["large", "small"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| pod-")]
    assert len(rows) == 3 * len(pod.MODELS) * len(pod.LENGTHS)
    assert rows[0].startswith("| pod-gated-deltanet-1.3b-8k | large | fsdp=8 |")
    assert "does not fit" in rows[-1]


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize("name", ["gated_deltanet_1b", "mamba_1b"])
def test_a_recipe_compiles_for_a_slice_that_is_not_there(name):
    """Compile a narrow model for eight chips, with every mesh axis; a full one takes minutes."""
    pytest.importorskip("libtpu")
    config = pod.get_config(f"{name},131k")
    config.model.update(depth=3, dim=256)
    config.model.options.gated_deltanet.heads = 2
    config.data.update(length=512, batch_size=8)
    made = plan.make_plan(config, "v5e:2x4", "fsdp=2,tensor=2,sequence=2")
    assert made.fits
    assert made.traffic.total > 0
    assert not made.traffic.unknown_loops
    assert 0 < made.step_seconds() < 1
    text = plan.report(config, made)
    assert text.endswith("FITS")
    assert plan.row(config, "v5e:2x4", made).count("|") == plan.HEADER.splitlines()[0].count("|")
