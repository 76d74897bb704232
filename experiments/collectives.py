"""What devices tell each other, read from a compiled program's text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) (?:\(.*\) -> .*)?\{")
_CALLED = re.compile(
    r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([^\s,)}]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device does in one execution of a program.

    Attributes:
      counts: how often it takes part in each kind of collective.
      sent: the bytes it sends in all of them, by kind, at the least a ring needs.
      unknown_loops: loops with collectives whose number of turns the compiler does not state; each
        is counted as one turn.
    """

    counts: dict[str, int]
    sent: dict[str, int]
    unknown_loops: int

    @property
    def total(self) -> int:
        """All bytes sent."""
        return sum(self.sent.values())


@dataclasses.dataclass
class _Computation:
    collectives: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    # Name and turns; a loop whose turns are not stated has the name of its condition instead.
    called: list[tuple[str, int | str]] = dataclasses.field(default_factory=list)
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    elements: dict[str, int] = dataclasses.field(default_factory=dict)
    added: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    compared: tuple[str, ...] = ()
    done: bool = False


def read(text: str) -> Traffic:
    """Counts the collectives of a compiled program, `jit(f).lower(...).compile().as_text()`.

    A loop's body counts as often as it runs, every branch of a conditional as if it were taken.
    """
    computations, entry = _computations(text)
    counts: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    unknown = 0

    def visit(name: str, times: int) -> bool:
        """Adds what a computation does; returns whether there is a collective in it."""
        nonlocal unknown
        found = False
        here = computations[name]
        # A TPU sends while it computes: the same collective stands where it starts, in every
        # piece of work it goes on beside, and where it ends.
        elsewhere = here.done or name.startswith("async_collective_fusion")
        for kind, size in () if elsewhere else here.collectives:
            counts[kind] += times
            sent[kind] += times * size
            found = True
        for callee, how_often in here.called:
            turns = (
                how_often
                if isinstance(how_often, int)
                else _turns(computations[how_often], computations[callee])
            )
            inside = visit(callee, times * (1 if turns is None else turns))
            unknown += inside and turns is None
            found = found or inside
        return found

    visit(entry, 1)
    return Traffic(dict(counts), dict(sent), unknown)


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    devices = 1
    for name in ("replica_count", "num_partitions"):
        given = re.search(rf"\b{name}=(\d+)", text.split("\n", 1)[0])
        devices *= int(given[1]) if given else 1
    found: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            current = found.setdefault(header[2], _Computation())
            entry = header[2] if header[1] else entry
        elif " = " in line:
            name, instruction = line.split(" = ", 1)
            name = name.strip()
            if 'custom_call_target="AsyncCollectiveDone"' in instruction:
                current.done = True
            _arithmetic(name.removeprefix("ROOT "), instruction, current, name.startswith("ROOT "))
            _instruction(instruction, devices, current)
    return found, entry


def _arithmetic(name: str, line: str, into: _Computation, is_root: bool) -> None:
    """Notes what a loop's number of turns follows from."""
    shape, rest = _split_shape(line)
    if not re.match(r"(pred|[su]32)\[\]", shape):
        return
    opcode, _, inside = rest.partition("(")
    if opcode == "constant" and (number := re.match(r"-?\d+", inside)):
        into.constants[name] = int(number[0])
    elif opcode == "get-tuple-element" and (place := re.search(r"index=(\d+)", rest)):
        into.elements[name] = int(place[1])
    operands = tuple(re.findall(r"%[^\s,)]+", inside.partition(")")[0]))
    if opcode == "add" and len(operands) == 2:
        into.added.append((operands[0], operands[1]))
    if is_root and (opcode == "fusion" or (opcode == "compare" and "direction=LT" in rest)):
        into.compared = operands


def _turns(condition: _Computation, body: _Computation) -> int | None:
    """The turns of a loop that counts from 0 to a constant; None for any other."""
    bounds = [condition.constants[n] for n in condition.compared if n in condition.constants]
    counters = [condition.elements[n] for n in condition.compared if n in condition.elements]
    if len(bounds) != 1 or len(counters) != 1 or len(condition.compared) != 2:
        return None
    steps = {
        body.constants[by]
        for pair in body.added
        for counter, by in (pair, pair[::-1])
        if body.elements.get(counter) == counters[0] and by in body.constants
    }
    return -(-bounds[0] // max(steps, default=1))


def _instruction(line: str, devices: int, into: _Computation) -> None:
    shape, rest = _split_shape(line)
    opcode = rest.split("(", 1)[0]
    for kind in KINDS:
        if opcode in (kind, f"{kind}-start"):
            size = _sent(kind, _sizes(shape), opcode.endswith("-start"), _group(rest, devices))
            if size:
                into.collectives.append((kind, size))
            return
    if opcode.endswith(("-done", "-update")):
        return  # Its work was counted where it started.
    turns: int | str = 1
    if opcode == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
        condition = re.search(r"\bcondition=%?([^\s,)}]+)", rest)
        turns = int(known[1]) if known else condition[1] if condition else 1
    for called in _CALLED.finditer(rest):
        names = [called[1]] if called[1] else called[2].split(",")
        into.called += [(name.strip().lstrip("%"), turns) for name in names]


def _split_shape(line: str) -> tuple[str, str]:
    """The result's shape, and the instruction from its opcode on."""
    if not line.startswith("("):
        shape, _, rest = line.partition(" ")
        return shape, rest
    depth = 0
    for place, character in enumerate(line):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return line[: place + 1], line[place + 1 :].strip()
    return line, ""


def _sizes(shape: str) -> list[int]:
    """The bytes of each array in a shape."""
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
    """How many devices take part."""
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
    """Bytes a device sends: those of a ring, which no algorithm can go below."""
    if kind == "collective-permute":
        return sizes[1] if starts else sum(sizes)
    if starts and kind in ("all-gather", "reduce-scatter", "all-to-all") and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]  # Operands come first.
    size = sum(sizes)
    if kind == "all-reduce":
        return 2 * size * (group - 1) // group
    if kind == "reduce-scatter":
        return size * (group - 1)
    return size * (group - 1) // group
