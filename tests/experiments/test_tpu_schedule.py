"""Reader of compiled schedules, on files small enough to count by hand."""

import pytest

from experiments.compiled import hlo_trip_counts, tpu_schedule

CHIP = tpu_schedule.Chip("none", hbm=1, bandwidth=1e9, flops=1e12, link=1e9, clock=1e9)

PROGRAM = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %p = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %all = f32[64,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %row = f32[8,128]{1,0:T(8,128)} fusion(%all, %i), kind=kLoop, calls=%slice_of, \
backend_config={"window_config":{"estimated_cycles":"5000"}}
  ROOT %out = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%i, %all)
}

%slice_of (a: f32[64,128], b: s32[]) -> f32[8,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %s = f32[8,128]{1,0:T(8,128)} dynamic-slice(%a, %b), dynamic_slice_sizes={8,128}
}

ENTRY %main (x: f32[64,100], y: f32[64,128], z: f32[64]) -> f32[64,100] {
  %x = f32[64,100]{1,0:T(8,128)} parameter(0)
  %y = f32[64,128]{1,0:T(8,128)} parameter(1)
  %z = f32[64]{0:T(128)} parameter(2)
  %w = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) while(%y), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"8"}}
  %near = f32[64,128]{1,0:T(8,128)S(1)} copy(%y), backend_config={"window_config":\
{"estimated_cycles":"90000"},"bundle_analysis_data":{"estimated_cycles":"70000"}}
  ROOT %k.1 = f32[64,100]{1,0:T(8,128)} custom-call(%x, %near, %x), \
custom_call_target="tpu_custom_call"
}
"""
ARRAY, ROW = 64 * 128 * 4, 8 * 128 * 4


def test_a_program_is_added_up():
    kernel = tpu_schedule.Kernel(cycles=1e6, bytes=10.0)
    found = tpu_schedule.cost(PROGRAM, {"k.1": kernel}, CHIP)
    # Eight slices are read and written, with the index (a scalar, 4 bytes). An array with profiled
    # cycles is copied to VMEM. The kernel's operand and result count once each, in whole tiles.
    assert found.bytes == 8 * (2 * ROW + 4) + ARRAY + 2 * ARRAY
    assert found.cycles == 8 * 5000 + 70000 + 1e6
    assert found.operations == 8 + 1 + 1
    slices, copy = 8 * max(5000, 2 * ROW + 4), max(70000, ARRAY)
    assert found.seconds == pytest.approx((slices + copy + 1e6) / 1e9)


COPIES = """HloModule jit_h, is_scheduled=true

ENTRY %main (x: f32[64,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%x), slice={[0:8], [0:128]}
  %row = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
  %near = f32[64,128]{1,0:T(8,128)S(1)} fusion(%row), kind=kLoop, calls=%elsewhere, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %c = (f32[64,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%near)
  ROOT %y = f32[64,128]{1,0:T(8,128)} copy-done(%c)
}

%elsewhere (a: f32[8,128]) -> f32[64,128] {
  %a = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %b = f32[64,128]{1,0:T(8,128)S(1)} broadcast(%a), dimensions={0,1}
}
"""


def test_asynchronous_copies_count_once_and_overlap():
    found = tpu_schedule.cost(COPIES, {}, CHIP)
    assert found.bytes == ROW + ARRAY  # from HBM to VMEM, and back
    assert found.cycles == 100
    assert found.seconds == (ROW + ARRAY) / 1e9  # 1e-7 seconds of compute run beside the copies
    slow = CHIP._replace(clock=1e6)
    assert tpu_schedule.cost(COPIES, {}, slow).seconds == 100 / 1e6


# As libtpu 0.0.50 and newer print them: the bound is in the condition, the step in the body.
COUNTING = """HloModule jit_g, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %j = s32[]{:T(128)} add(%i, %two)
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%j, %x)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%q), index=0
  %n = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%k, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %w.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%x.1), condition=%condition, body=%body
  %w.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%x.1), condition=%elsewhere, body=%body
  ROOT %y = f32[8]{0:T(128)} get-tuple-element(%w.1), index=1
}
"""


def test_loops_are_counted():
    assert hlo_trip_counts.turns(COUNTING) == {"w.1": 5, "w.2": None}
    assert hlo_trip_counts.turns(PROGRAM) == {"w": 8}
    with pytest.raises(LookupError, match=r"the program does not state how often w\.2 runs"):
        tpu_schedule.cost(COUNTING, {}, CHIP)


def test_ideal_bytes_are_what_is_looked_at():
    assert tpu_schedule.ideal_bytes(PROGRAM) == 2 * (64 * 100 * 4) + 64 * 128 * 4
    assert tpu_schedule.kernel_names(PROGRAM) == ["k.1"]


TRACE = """0x0 : {
  %1 = dma.hbm_to_vmem /*hbm=*/%s, /*size_in_granules=*/16, /*vmem=*/%d
0x1 : {
  %2 = dma.vmem_to_hbm /*vmem=*/%s, /*size_in_granules=*/4, /*hbm=*/%d
0x2 : {
  %3 = dma.vmem_to_smem /*vmem=*/%s, /*size_in_granules=*/99, /*smem=*/%d
"""
PATH = """Length to end: 100, %1 = dma.hbm_to_vmem
Length to end: 40, %4 = vmul.f32
Length to end: 39, %5 = vst
"""


def test_a_kernel_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no schedule of k\.1"):
        tpu_schedule.read_kernel(tmp_path, "k.1")
    (tmp_path / "k.1_bundles.txt").write_text(TRACE)
    assert tpu_schedule.read_kernel(tmp_path, "k.1") == tpu_schedule.Kernel(
        3, 20 * 32
    )  # no profile
    (tmp_path / "k.1_chip_static_llo_profile.textproto").write_text("estimated_cycles: 100")
    (tmp_path / "k.1_critical_path.txt").write_text(PATH)
    assert tpu_schedule.read_kernel(tmp_path, "k.1") == tpu_schedule.Kernel(100 - 59, 20 * 32)
