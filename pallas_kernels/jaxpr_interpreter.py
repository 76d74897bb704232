"""Interpreter of jaxprs that computes with other values than arrays.

`nonlinear_scan/cell_trace.py` computes with rows of channels,
`seqjax/ops/nonlinear/jacobian_structure.py` with channel axes, and `hoisted_scan.py` beside it with
the place of a value in or outside of a loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")


def primitive_names(text: str) -> frozenset[str]:
    """Return the set of the names in a text, which spaces separate."""
    return frozenset(text.split())


_CALLS = primitive_names(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call remat remat2 checkpoint"
)


def interpret(
    program: Any,
    args: Sequence[Value],
    constant: Callable[[Any], Value],
    apply: Callable[[Any, list[Value]], Sequence[Value]],
    inlined: frozenset[str] = _CALLS,
) -> list[Value]:
    """Run a jaxpr, and the jaxprs that it calls, on values of any type.

    Args:
      program: a jaxpr or a closed jaxpr.
      args: one value per input of the program.
      constant: converts a literal, or an array that the program closes over, to a value.
      apply: (equation, values of its inputs) -> values of its outputs. Loops and branches count as
        single operations.
      inlined: names of the primitives whose jaxprs are run; others count as single operations.

    Returns:
      The values of the program's outputs.
    """
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    known: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
    known |= zip(jaxpr.constvars, map(constant, consts), strict=True)

    def read(variable: Any) -> Value:
        return constant(variable.val) if hasattr(variable, "val") else known[variable]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name in inlined:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            outputs: Sequence[Value] = interpret(inner, inputs, constant, apply, inlined)
        else:
            outputs = apply(eqn, inputs)
        known |= zip(eqn.outvars, outputs, strict=True)
    return [read(v) for v in jaxpr.outvars]


def bind(eqn: Any, params: Any) -> Callable[..., Sequence[Any]]:
    """Return the operation of an equation as a function of its inputs, with these parameters."""

    def run(*arrays: Any) -> Sequence[Any]:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(params))
        return out if eqn.primitive.multiple_results else [out]

    return run
