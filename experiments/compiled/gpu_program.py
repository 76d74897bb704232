"""Cost of a compiled GPU program, predicted from its text.

XLA's GPU programs are lists of kernels: fusions, library calls and copies. The time of a kernel is
the largest of three times: its launch, the bytes of its operands and results over the bandwidth,
and the FLOPs of its matmuls over their rate. The time of a program is the sum over its kernels,
with loop bodies times their trip counts.

For eight programs of the matrix-state ops with 600 to 6,600 kernels, the prediction is 0.81 to 1.08
times the time that an H100 took (`python -m experiments.bench gpu`). It does not include the
arithmetic outside matmuls, reads of the same bytes from caches, and kernels below the peak rates.
Compiled without a GPU, the program lacks XLA's autotuning: the compiler selects the block sizes of
matmuls by rules.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.compiled import hlo_trip_counts
from experiments.compiled.tpu_schedule import (
    NO_WORK,
    Operation,
    read_program,
    type_bytes,
)


class Gpu(NamedTuple):
    """Rates of a GPU, for predictions.

    Attributes:
      bandwidth: bytes per second.

      flops: operations per second of large matmuls, by the format of the factors.

      launch: seconds per kernel.
    """

    bandwidth: float
    flops: dict[str, float]
    launch: float


# Measured on an H100 (80GB HBM3): the bandwidth of a copy, and the rate of a bfloat16 matmul of
# 8192^3. The other rates are published peaks times the same share of the peak.
_REACHED = 739 / 989
H100 = Gpu(
    bandwidth=2.97e12,
    flops={
        "f16": 739e12,
        "bf16": 739e12,
        "tf32": 494.5e12 * _REACHED,
        "f32": 66.9e12 * _REACHED,
        "f64": 66.9e12 * _REACHED,
    },
    launch=3e-6,
)


class Cost(NamedTuple):
    """Cost of a program.

    Attributes:
      kernels: number of launched kernels.

      bytes: bytes read and written.

      flops: operations of matmuls, by the format of the factors: "bf16", "tf32", "f32", ...

      seconds: the predicted time.
    """

    kernels: int
    bytes: float
    flops: dict[str, float]
    seconds: float


def cost(text: str, gpu: Gpu = H100) -> Cost:
    """Compute the cost of a compiled program from its text.

    Raises:
      LookupError: if the program does not state the trip count of a loop.
    """
    kernels, moved, seconds = 0, 0.0, 0.0
    flops: dict[str, float] = {}
    for kernel in program_kernels(text):
        kernels += kernel.calls
        moved += kernel.calls * kernel.bytes
        for name, count in kernel.flops.items():
            flops[name] = flops.get(name, 0.0) + kernel.calls * count
        seconds += kernel.calls * kernel.seconds(gpu)
    return Cost(kernels, moved, flops, seconds)


class Kernel(NamedTuple):
    """A kernel of a program: its name, number of calls, and bytes and matmul FLOPs of a call."""

    name: str
    calls: int
    bytes: float
    flops: dict[str, float]

    def seconds(self, gpu: Gpu) -> float:
        """Return the predicted seconds of a call."""
        compute = sum(count / gpu.flops[name] for name, count in self.flops.items())
        return max(gpu.launch, self.bytes / gpu.bandwidth, compute)


def program_kernels(text: str) -> Iterator[Kernel]:
    """Yield the kernels of a compiled program.

    Raises:
      LookupError: if the program does not state the trip count of a loop.
    """
    computations, entry = read_program(text)
    turns = hlo_trip_counts.turns(text)

    def walk(name: str, times: int) -> Iterator[Kernel]:
        types = {o.name: o.type for o in computations[name]}
        for operation in computations[name]:
            if operation.kind in NO_WORK or operation.kind.endswith("-done"):
                continue
            # An asynchronous operation has its operands in its type as well.
            operation.kind = operation.kind.removesuffix("-start")
            if operation.kind == "while":
                trips = turns[operation.name]
                if trips is None:
                    raise LookupError(f"the program does not state how often {operation.name} runs")
                yield from walk(_called(operation, "body")[0], times * trips)
            elif operation.kind in ("call", "conditional", "async"):
                for called in _called(operation, "to_apply|calls|called_computations"):
                    yield from walk(called, times)
            else:
                moved = _moved(operation, types, computations)
                found = _matmuls(operation, types, computations)
                yield Kernel(operation.name, times, moved, found)

    yield from walk(entry, 1)


VIEWS = ("bitcast", "reshape", "convert", "copy")  # elementwise: read what their user reads


def _moved(
    operation: Operation, types: dict[str, str], computations: dict[str, list[Operation]]
) -> float:
    """Return the bytes that a kernel reads and writes; of sliced arrays, those of the slices."""
    called = _called(operation, "calls") if operation.kind == "fusion" else []
    inside = computations[called[0]] if called else [operation]
    local = {o.name: o for o in inside}
    total = 0.0
    if called:
        for parameter in (o for o in inside if o.kind == "parameter"):
            source = operation.operands[int(parameter.text.split(")")[0])]
            total += _read(parameter, type_bytes(types.get(source, "")), inside)
        root = next(o for o in inside if o.root)
    else:
        root = operation
        for source in dict.fromkeys(operation.operands):
            total += _read_by(operation, source, type_bytes(types.get(source, "")))
    results = [local[name] for name in root.operands] if root.kind == "tuple" else [root]
    for result in results:
        origin = result
        while origin.kind in VIEWS and origin.operands[0] in local:
            origin = local[origin.operands[0]]
        if origin.kind == "dynamic-update-slice":
            update = origin.operands[1]
            total += type_bytes(local[update].type if update in local else types[update])
        else:
            total += type_bytes(result.type)
    return total


def _read(value: Operation, size: float, inside: list[Operation]) -> float:
    """Return the bytes of `value` that its users inside a fusion read."""
    total = 0.0
    for user in (o for o in inside if value.name in o.operands):
        if user.kind in VIEWS and not user.root:
            share = size / max(type_bytes(user.type), 1)
            total += share * _read(user, type_bytes(user.type), inside)
        elif user.kind in ("dynamic-slice", "slice") and not user.root:
            share = size / max(type_bytes(value.type), 1)
            total += share * _read(user, type_bytes(user.type), inside)
        else:
            total += _read_by(user, value.name, size)
    return min(total, size)


def _read_by(user: Operation, name: str, size: float) -> float:
    """Return the bytes of an operand that an operation reads."""
    if user.kind in ("dynamic-slice", "slice") and user.operands[0] == name:
        return min(size, type_bytes(user.type))
    if user.kind == "dynamic-update-slice" and user.operands[0] == name:
        return 0.0  # in place
    return size


def _called(operation: Operation, attributes: str) -> list[str]:
    return re.findall(rf"\b(?:{attributes})=\{{?%?([\w.\-]+)", operation.text)


def _matmuls(
    operation: Operation, types: dict[str, str], computations: dict[str, list[Operation]]
) -> dict[str, float]:
    """Return the FLOPs of the matmuls in an operation by the format of the factors."""
    total: dict[str, float] = {}
    if operation.kind == "fusion":
        for name in _called(operation, "calls"):
            local = {o.name: o.type for o in computations[name]}
            for inner in computations[name]:
                for kind, count in _matmuls(inner, local, computations).items():
                    total[kind] = total.get(kind, 0.0) + count
        return total
    if operation.kind == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.text)
        contracted = axes[1].split(",") if axes else []
    elif re.search(r'custom_call_target="__cublas', operation.text):
        config = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', operation.text)
        contracted = json.loads(config[1]) if config else []
    else:
        return total
    left = types[operation.operands[0]]
    inner_size = math.prod(_shape(left)[int(axis)] for axis in contracted)
    result = re.match(r"\(?(\w+\[[\d,]*\])", operation.type)
    assert result is not None
    return {_format(left, operation.text): 2.0 * math.prod(_shape(result[1])) * inner_size}


def _shape(type_text: str) -> list[int]:
    match = re.match(r"\w+\[([\d,]*)\]", type_text)
    return [int(size) for size in match[1].split(",") if size] if match else []


def _format(type_text: str, text: str) -> str:
    """Return the format of a matmul's factors; float32 factors are tf32 unless highest."""
    dtype = type_text.split("[")[0]
    if dtype != "f32":
        return dtype
    if algorithm := re.search(r"algorithm=dot_(\w+?)_", text):
        return algorithm[1]
    return "f32" if re.search(r"highest", text, re.IGNORECASE) else "tf32"


def ideal_bytes(text: str) -> float:
    """Return the bytes of the arguments and results of a compiled program."""
    computations, entry = read_program(text)
    ends = [o.type for o in computations[entry] if o.root or o.kind == "parameter"]
    return sum(type_bytes(end) for end in ends)
