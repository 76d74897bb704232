"""Reader of compiled GPU programs, on a program small enough to count by hand."""

import pytest

from experiments.compiled import gpu_program

GPU = gpu_program.Gpu(bandwidth=1e9, flops={"bf16": 1e9, "tf32": 1e8, "f32": 1e7}, launch=1e-6)

PROGRAM = """HloModule jit_f, is_scheduled=true

%slice_and_round (a: f32[4,64,64], i: s32[]) -> bf16[64,64] {
  %a = f32[4,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,64,64]{2,1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,64,64}
  %b = f32[64,64]{1,0} bitcast(%s)
  ROOT %c = bf16[64,64]{1,0} convert(%b)
}

%multiply (x: bf16[64,64], y: bf16[64,64]) -> f32[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  ROOT %d = f32[64,64]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%store (all: f32[4,64,64], row: f32[64,64], i: s32[]) -> f32[4,64,64] {
  %all = f32[4,64,64]{2,1,0} parameter(0)
  %row = f32[64,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %r = f32[1,64,64]{2,1,0} bitcast(%row)
  ROOT %u = f32[4,64,64]{2,1,0} dynamic-update-slice(%all, %r, %i)
}

%body (p: (s32[], f32[4,64,64])) -> (s32[], f32[4,64,64]) {
  %p = (s32[], f32[4,64,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %all = f32[4,64,64]{2,1,0} get-tuple-element(%p), index=1
  %one = bf16[64,64]{1,0} fusion(%all, %i), kind=kLoop, calls=%slice_and_round
  %two = f32[64,64]{1,0} fusion(%one, %one), kind=kCustom, calls=%multiply
  %new = f32[4,64,64]{2,1,0} fusion(%all, %two, %i), kind=kLoop, calls=%store
  ROOT %out = (s32[], f32[4,64,64]{2,1,0}) tuple(%i, %new)
}

ENTRY %main (x: f32[4,64,64], y: f32[64,64]) -> f32[64,64] {
  %x = f32[4,64,64]{2,1,0} parameter(0)
  %y = f32[64,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], f32[4,64,64]{2,1,0}) tuple(%zero, %x)
  %w = (s32[], f32[4,64,64]{2,1,0}) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %z = f32[64,64]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
operand_precision={highest,highest}
  ROOT %v = f32[64,64]{1,0} dot(%z, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
WIDE, NARROW, MATMUL = 64 * 64 * 4, 64 * 64 * 2, 2 * 64**3


def test_a_program_is_added_up():
    """Count slices instead of whole arrays, updates in place, and every turn of the loop."""
    found = gpu_program.cost(PROGRAM, GPU)
    assert found.kernels == 4 * 3 + 2
    rounded, stored = WIDE + NARROW + 4, 2 * WIDE + 4  # with the index
    multiplied = 2 * NARROW + WIDE  # an operand that is given twice is read twice by the fusion
    assert found.bytes == 4 * (rounded + multiplied + stored) + 2 * WIDE + 3 * WIDE
    assert found.flops == {"bf16": 4 * MATMUL, "f32": MATMUL, "tf32": MATMUL}
    turn = rounded / 1e9 + MATMUL / 1e9 + stored / 1e9  # a matmul takes longer than its bytes
    assert found.seconds == pytest.approx(4 * turn + MATMUL / 1e7 + MATMUL / 1e8)


def test_a_kernel_takes_at_least_its_launch():
    kernel = gpu_program.Kernel("small", 1, 8.0, {})
    assert kernel.seconds(GPU) == 1e-6


def test_a_loop_without_a_trip_count_raises():
    with pytest.raises(LookupError, match="how often w runs"):
        gpu_program.cost(PROGRAM.replace("known_trip_count", "unknown"), GPU)
