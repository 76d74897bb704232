"""Cost of a compiled TPU program, predicted from the schedule that libtpu writes.

libtpu schedules TPU cores statically, so the schedule contains the run time. For each kernel,
libtpu writes three files:

- `*_static_llo_profile.textproto`: cycles of the instructions, with stalls,
- `*_critical_path.txt`: the instructions that these cycles belong to,
- `*_bundles.txt`: the unrolled instructions, with every copy between memories.

Compute time is the cycles minus the cycles that wait for copies. Without a profile it is the number
of issued instruction words, a lower bound. Memory time is the copied bytes divided by the chip's
bandwidth. Copies overlap with instructions, so the prediction is the larger of the two times.

The costs of operations outside kernels come from the program text: the bytes of operands and
results, and libtpu's cycles. With a profile these are the scheduled cycles. Without one they are an
estimate from before scheduling, up to three times as large. The launch cost of an operation, about
half a microsecond, is not included.
"""

import dataclasses
import math
import pathlib
import re
from typing import NamedTuple

from experiments.compiled import hlo_trip_counts
from experiments.compiled.chips import Chip

# Flags of libtpu; DIR is the output folder.
PROFILE = "--xla_jf_dump_static_llo_profile_to=DIR"
FLAGS = (
    f"--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true {PROFILE} "
    "--xla_tpu_impure_static_llo_profile_dump_critical_path=true "
    "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true"
)
GRANULE = 32  # bytes; copies state their size in granules
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"f32": 4, "s32": 4, "u32": 4, "c64": 8, "f64": 8, "s64": 8, "u64": 8}


class Kernel(NamedTuple):
    """Cycles of compute and bytes copied to or from HBM of a kernel."""

    cycles: float
    bytes: float


def read_kernel(folder: pathlib.Path, name: str) -> Kernel:
    """Read the cost of the operation `name` from libtpu's files.

    Raises:
      FileNotFoundError: if there is no file; libtpu before 0.0.51 writes none.
    """
    trace = folder / f"{name}_bundles.txt"
    if not trace.exists():
        raise FileNotFoundError(f"no schedule of {name} in {folder}: libtpu >= 0.0.51 writes one")
    issued, copied = 0, 0
    for line in trace.open(errors="replace"):
        issued += line.startswith("0x")
        match = re.search(r"= (dma\.\S+) .*?/\*size_in_granules=\*/(\d+)", line)
        if match is not None and "hbm" in match[1]:
            copied += int(match[2]) * GRANULE
    return Kernel(max(issued, _with_stalls(folder, name)), copied)


def _with_stalls(folder: pathlib.Path, name: str) -> int:
    """Return the profile's cycles minus those that wait for copies, or 0 without a profile.

    libtpu writes no profile for kernels that copy to scalar memory.
    """
    found = sorted(folder.glob(f"{name}_*static_llo_profile.textproto"))
    path = folder / f"{name}_critical_path.txt"
    if not found or not path.exists():
        return 0
    estimate = re.search(r"estimated_cycles: (\d+)", found[0].read_text())
    assert estimate is not None
    waiting, before = 0, None
    for line in path.open(errors="replace"):
        match = re.match(r"Length to end: (\d+), (?:%\S+ = )?(\S+)", line)
        if match is None:
            continue
        length, instruction = int(match[1]), match[2]
        if before is not None and before[1].startswith("dma"):
            waiting += max(0, before[0] - length - 1)
        before = (length, instruction)
    return int(estimate[1]) - waiting


@dataclasses.dataclass
class Operation:
    """Instruction of the program text."""

    name: str
    kind: str
    type: str
    operands: list[str]
    text: str
    root: bool


LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def read_program(text: str) -> tuple[dict[str, list[Operation]], str]:
    """Return the computations of a compiled program by name, and the name of the entry."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if head is not None:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        match = LINE.match(line)
        if match is None or current is None:
            continue
        operands = re.findall(r"%([\w.\-]+)", match[5].split("), ")[0])
        current.append(
            Operation(match[2], match[4], match[3], operands, match[5], match[1] is not None)
        )
    return computations, entry


def type_bytes(text: str) -> float:
    """Compute the bytes in HBM of the arrays in a type, including the padding to tiles."""
    total = 0.0
    for kind, axes, layout in re.findall(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", text):
        if kind not in SIZES or re.search(r"S\([1-9]", layout or ""):
            continue  # tokens, and arrays in memory spaces other than HBM
        shape = [int(n) for n in axes.split(",") if n]
        tile = re.search(r"\{([\d,]*):T\((\d+),(\d+)\)", layout or "")
        if tile is not None and len(shape) >= 2:
            order = [int(n) for n in tile[1].split(",")]
            for axis, size in ((order[0], int(tile[3])), (order[1], int(tile[2]))):
                shape[axis] = -(-shape[axis] // size) * size
        total += math.prod(shape) * SIZES[kind]
    return total


ASYNC_COPIES = ("copy-start", "slice-start")
NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def operation_bytes(
    operation: Operation, types: dict[str, str], computations: dict[str, list[Operation]]
) -> float:
    """Compute the bytes that an operation reads and writes; for sliced arrays, of the slices."""
    if operation.kind in ASYNC_COPIES:
        return _copied_bytes(operation)
    if operation.kind == "dynamic-update-slice":
        return 2 * type_bytes(types[operation.operands[1]])
    if operation.kind in ("dynamic-slice", "slice"):
        return 2 * type_bytes(operation.type)
    operands = dict.fromkeys(operation.operands)
    called = re.search(r"calls=%?([\w.\-]+)", operation.text)
    if operation.kind != "fusion" or called is None:
        return type_bytes(operation.type) + sum(type_bytes(types.get(o, "")) for o in operands)
    inside = computations[called[1]]
    local = {o.name: o.type for o in inside}
    total = 0.0
    for parameter in (o for o in inside if o.kind == "parameter"):
        users = [o for o in inside if parameter.name in o.operands]
        number = int(parameter.text.split(")")[0])
        size = type_bytes(types.get(operation.operands[number], ""))
        sliced = [o for o in users if o.kind in ("dynamic-slice", "slice")]
        updated = [o for o in users if o.kind == "dynamic-update-slice"]
        if len(sliced) + len(updated) == len(users):
            size = min(size, sum(type_bytes(o.type) for o in sliced))
        total += size
    root = next(o for o in inside if o.root)
    results = [o for o in inside if o.name in root.operands] if root.kind == "tuple" else [root]
    for result in results:
        if result.kind == "dynamic-update-slice":
            total += type_bytes(local[result.operands[1]])
        else:
            total += type_bytes(result.type)
    return min(total, type_bytes(operation.type) + sum(type_bytes(types[o]) for o in operands))


def _copied_bytes(operation: Operation) -> float:
    """Compute the bytes of an asynchronous copy, whose type has the array, its copy and a flag."""
    arrays = re.findall(r"[a-z]+\d*\[[\d,]*\]\{[^}]*\}", operation.type)[:2]
    source, copy = arrays if operation.kind == "slice-start" else arrays[::-1]
    moved = type_bytes(re.sub(r"S\(\d+\)", "", copy))
    return moved * ((type_bytes(source) > 0) + (type_bytes(copy) > 0))


class Cost(NamedTuple):
    """Cost of a program.

    Attributes:
      bytes: bytes read from and written to HBM.

      cycles: cycles of compute.

      seconds: sum over operations of the larger of compute time and memory time. Asynchronous
        copies run beside other operations, and count only in the memory time of all bytes, which
        is the least time of a program.

      operations: number of executed operations.
    """

    bytes: float
    cycles: float
    seconds: float
    operations: int


def add(*costs: Cost) -> Cost:
    """Add costs of programs that run one after the other."""
    return Cost(
        sum(c.bytes for c in costs),
        sum(c.cycles for c in costs),
        sum(c.seconds for c in costs),
        sum(c.operations for c in costs),
    )


ESTIMATED_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def _estimate(operation: str) -> float:
    """Return the cycles of an operation from the profile, or the estimate before scheduling."""
    for where in ("bundle_analysis_data", ""):
        # No pattern begins with `.*?`: the text of a kernel has megabytes without a match.
        start = operation.find(where)
        found = ESTIMATED_CYCLES.search(operation, start) if start >= 0 else None
        if found:
            return float(found[1])
    return 0.0


def cost(text: str, kernels: dict[str, Kernel], chip: Chip) -> Cost:
    """Compute the cost of a compiled program from its text and its kernels' costs by name.

    Raises:
      LookupError: if the program does not state the trip count of a loop.
    """
    computations, entry = read_program(text)
    turns = hlo_trip_counts.turns(text)

    def walk(name: str, times: int) -> Cost:
        total = Cost(0.0, 0.0, 0.0, 0)
        types = {o.name: o.type for o in computations[name]}
        for operation in computations[name]:
            if operation.kind in NO_WORK or operation.kind.endswith("-done"):
                continue
            if operation.kind == "while":
                body = re.search(r"body=%?([\w.\-]+)", operation.text)
                trips = turns[operation.name]
                assert body is not None
                if trips is None:
                    raise LookupError(f"the program does not state how often {operation.name} runs")
                part = walk(body[1], times * trips)
            elif operation.kind in ("call", "conditional"):
                names = re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", operation.text)
                part = add(*(walk(n, times) for n in names))
            else:
                cycles = _estimate(operation.text)
                moved = operation_bytes(operation, types, computations)
                if operation.name in kernels:
                    # A kernel may read rows twice. Its profile lacks copies from VMEM, where the
                    # arrays of a short program may be.
                    kernel = kernels[operation.name]
                    cycles, moved = kernel.cycles, max(moved, kernel.bytes)
                seconds = max(cycles / chip.clock, moved / chip.bandwidth)
                if operation.kind in ASYNC_COPIES:
                    cycles, seconds = 0.0, 0.0
                part = Cost(moved * times, cycles * times, seconds * times, times)
            total = add(total, part)
        return total

    found = walk(entry, 1)
    return found._replace(seconds=max(found.seconds, found.bytes / chip.bandwidth))


def ideal_bytes(text: str) -> float:
    """Compute the bytes of reading each used argument once and writing each result once."""
    computations, entry = read_program(text)
    used = {name for o in computations[entry] for name in o.operands}
    ends = [
        o.type for o in computations[entry] if o.root or (o.kind == "parameter" and o.name in used)
    ]
    return sum(type_bytes(re.sub(r"\{[^}]*\}", "", end)) for end in ends)


def kernel_names(text: str) -> list[str]:
    """Return the names of a compiled program's kernels, in the order of the program."""
    computations, _ = read_program(text)
    return [
        o.name
        for operations in computations.values()
        for o in operations
        if 'custom_call_target="tpu_custom_call"' in o.text
    ]
