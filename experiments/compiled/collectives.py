"""Collectives of a compiled program, counted from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from experiments.compiled import hlo_trip_counts

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([^\s,)}]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Communication of one device in one execution of a program.

    Attributes:
      counts: number of collectives of each kind.

      sent: bytes sent by kind, at the minimum that a ring algorithm needs.

      unknown_loops: number of loops with collectives whose trip count the program does not state;
        each is counted as one iteration.

      asynchronous: bytes sent by asynchronous collectives, which overlap with compute; included in
        `sent`.
    """

    counts: dict[str, int]
    sent: dict[str, int]
    unknown_loops: int
    asynchronous: int = 0

    @property
    def total(self) -> int:
        """Return the bytes sent in all collectives."""
        return sum(self.sent.values())


@dataclasses.dataclass
class _Computation:
    # (kind, bytes, whether it is a start)
    collectives: list[tuple[str, int, bool]] = dataclasses.field(default_factory=list)
    called: list[tuple[str, int | None]] = dataclasses.field(default_factory=list)  # (name, trips)
    starts: bool = False  # an asynchronous collective of TPU starts here
    done: bool = False


def read(text: str) -> Traffic:
    """Count the collectives of a compiled program, `jit(f).lower(...).compile().as_text()`.

    The body of a loop counts once per iteration. All branches of a conditional count.
    """
    computations, entry = _computations(text)
    counts: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    unknown = asynchronous = 0

    def visit(name: str, times: int) -> bool:
        """Add the collectives of a computation; return whether it has any."""
        nonlocal unknown, asynchronous
        found = False
        here = computations[name]
        # Asynchronous collectives on TPU appear several times: at their start, in each
        # computation that overlaps with them, and at their end. Only the start counts.
        elsewhere = here.done or name.startswith("async_collective_fusion")
        for kind, size, start in () if elsewhere else here.collectives:
            counts[kind] += times
            sent[kind] += times * size
            asynchronous += times * size * (start or here.starts)
            found = True
        for callee, turns in here.called:
            inside = visit(callee, times * (1 if turns is None else turns))
            unknown += inside and turns is None
            found = found or inside
        return found

    visit(entry, 1)
    return Traffic(dict(counts), dict(sent), unknown, asynchronous)


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    devices = 1
    for name in ("replica_count", "num_partitions"):
        given = re.search(rf"\b{name}=(\d+)", text.split("\n", 1)[0])
        devices *= int(given[1]) if given else 1
    turns = hlo_trip_counts.turns(text)
    found: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else hlo_trip_counts.HEADER.match(line)
        if header:
            current = found.setdefault(header[2], _Computation())
            entry = header[2] if header[1] else entry
        elif " = " in line:
            name, instruction = line.split(" = ", 1)
            name = name.strip().removeprefix("ROOT ").lstrip("%")
            current.starts |= 'custom_call_target="AsyncCollectiveStart"' in instruction
            current.done |= 'custom_call_target="AsyncCollectiveDone"' in instruction
            _instruction(instruction, devices, turns.get(name, 1), current)
    return found, entry


def _instruction(line: str, devices: int, turns: int | None, into: _Computation) -> None:
    shape, rest = hlo_trip_counts.split_shape(line)
    opcode = rest.split("(", 1)[0]
    for kind in KINDS:
        if opcode in (kind, f"{kind}-start"):
            start = opcode.endswith("-start")
            size = _sent(kind, _sizes(shape), start, _group(rest, devices))
            if size:
                into.collectives.append((kind, size, start))
            return
    if opcode.endswith(("-done", "-update")):
        return  # counted at its start
    for called in _CALLED.finditer(rest):
        names = [called[1]] if called[1] else called[2].split(",")
        into.called += [(name.strip().lstrip("%"), turns) for name in names]


def _sizes(shape: str) -> list[int]:
    """Return the bytes of each array in a shape."""
    return [_bytes(name, dims) for name, dims in _arrays(shape)]


def _arrays(shape: str) -> Iterator[tuple[str, str]]:
    for match in _ARRAY.finditer(shape):
        yield match[1], match[2]


def _bytes(name: str, dims: str) -> int:
    digits = re.search(r"\d+", name)
    bits = _BITS.get(name) or (int(digits[0]) if digits else 8)
    for size in filter(None, dims.split(",")):
        bits *= int(size)
    return -(-bits // 8)


def _group(rest: str, devices: int) -> int:
    """Return the number of devices that take part in a collective."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else devices


def _sent(kind: str, sizes: list[int], starts: bool, group: int) -> int:
    """Compute the bytes that a device sends in a ring algorithm, the minimum of all algorithms."""
    if kind == "collective-permute":
        return sizes[1] if starts else sum(sizes)
    if starts and kind in ("all-gather", "reduce-scatter", "all-to-all") and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]  # operands come first
    size = sum(sizes)
    if kind == "all-reduce":
        return 2 * size * (group - 1) // group
    if kind == "reduce-scatter":
        return size * (group - 1)
    return size * (group - 1) // group
