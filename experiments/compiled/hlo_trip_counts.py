"""Trip counts of the loops in a compiled program, read from its text."""

from __future__ import annotations

import dataclasses
import re

HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) (?:\(.*\) -> .*)?\{")


@dataclasses.dataclass
class _Scalars:
    """Scalar instructions of a computation."""

    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    elements: dict[str, int] = dataclasses.field(default_factory=dict)
    added: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    compared: tuple[str, ...] = ()


def turns(text: str) -> dict[str, int | None]:
    """Return the trip count of every loop by name, or None where the text does not have it.

    The count comes from the compiler's annotation, or from a counter that runs from 0 to a
    constant.

    Args:
      text: text of a compiled program, `jit(f).lower(...).compile().as_text()`.
    """
    computations: dict[str, _Scalars] = {}
    loops: dict[str, str] = {}
    current = _Scalars()
    for line in text.splitlines():
        header = None if line.startswith(" ") else HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], _Scalars())
        elif " = " in line:
            name, instruction = line.split(" = ", 1)
            name = name.strip()
            root, name = name.startswith("ROOT "), name.removeprefix("ROOT ")
            shape, rest = split_shape(instruction)
            if rest.startswith("while("):
                loops[name.lstrip("%")] = rest
            elif re.match(r"(pred|[su]32)\[\]", shape):
                _note(name, rest, current, root)
    return {name: _turns(rest, computations) for name, rest in loops.items()}


def _note(name: str, rest: str, into: _Scalars, is_root: bool) -> None:
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


def _turns(rest: str, computations: dict[str, _Scalars]) -> int | None:
    known = re.search(r'"?known_trip_count"?:\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    names = [re.search(rf"\b{part}=%?([^\s,)}}]+)", rest) for part in ("condition", "body")]
    condition, body = (computations.get(n[1]) if n else None for n in names)
    if condition is None or body is None:
        return None
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


def split_shape(instruction: str) -> tuple[str, str]:
    """Split an instruction into the shape of its result and the rest, from its opcode on."""
    if not instruction.startswith("("):
        shape, _, rest = instruction.partition(" ")
        return shape, rest
    depth = 0
    for place, character in enumerate(instruction):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return instruction[: place + 1], instruction[place + 1 :].strip()
    return instruction, ""
