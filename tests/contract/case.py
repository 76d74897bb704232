"""Class of the rows of the contract tests.

A row defines random inputs, the call, and an oracle: a float64 loop written from the equations.
To add a recurrence, add a row; every contract test then runs on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A row.

    Attributes:
      name: name of the row.

      inputs: (rng, B, T) -> named float64 arrays; "params" may be a tree of arrays.

      run: (inputs, state, reset, **keywords) -> (outputs, final state).

      oracle: (inputs, state, reset) -> (outputs, final state); None if the state is not compared.

      state: (rng, B) -> random initial state; None for layers, which run to create a state.

      algorithms: algorithms to compare with the oracle; the quick tests use the first one.
        "pallas" is the interpreted kernel.

      timed: names of the inputs [B, T, ...].

      shared: names of the inputs [T, ...], shared by the whole batch.

      hard: (rng, inputs) -> inputs with values at the limits of the op's contract.

      tolerance: largest error by dtype, relative to the largest magnitude of the result.

      split_axis: whether the op takes `sequence_axis`.
    """

    name: str
    inputs: Callable[..., Arrays]
    run: Callable[..., tuple[Any, Any]]
    oracle: Callable[..., tuple[Any, Any]]
    state: Callable[..., Any] | None = None
    algorithms: tuple[Any, ...] = ("sequential",)
    timed: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    hard: Callable[..., Arrays] | None = None
    reverse: bool = False
    split_axis: bool = True
    layer: Any = None
    tolerance: dict[str, float] = dataclasses.field(
        # float64: rounding over a few dozen steps. float32: the contract's 1e-4 at T = 1000, met
        # with room. bfloat16: outputs are rounded to 8 bits, inputs arrive rounded.
        default_factory=lambda: {"float64": 1e-10, "float32": 2e-5, "bfloat16": 2e-2}
    )

    def in_time(self, name: str, value: Any, steps: slice) -> Any:
        """Return some steps of the input `name` as a view, or all of it if it has no time axis."""
        if name in self.timed:
            return value[:, steps]
        return value[steps] if name in self.shared else value

    def __str__(self) -> str:
        return self.name


def normal(rng: np.random.Generator, *shape: int, complex_: bool = False) -> np.ndarray:
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if complex_ else real


H, K, V, D, N = 2, 3, 4, 3, 2


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def op(function: Callable[..., Any], names: tuple[str, ...], **fixed: Any) -> Callable[..., Any]:
    def run(inputs: Arrays, state: Any, reset: Any, **keywords: Any) -> Any:
        arrays = {name: inputs[name] for name in names if name in inputs}
        return function(**arrays, initial_state=state, reset=reset, **fixed, **keywords)

    return run


def hard_decays(name: str, kind: str) -> Callable[..., Arrays]:
    """Return decays 0, 1, exp(-30), 1 - 1e-7 and normal values, mixed; keep an absent decay."""

    def harden(rng: np.random.Generator, inputs: Arrays) -> Arrays:
        if name not in inputs:
            return inputs
        values = np.array([0.0, 1.0, np.exp(-30.0), 1 - 1e-7, 0.9])
        with np.errstate(divide="ignore"):
            values = np.log(values) if kind == "log" else values
        hard = rng.choice(values, inputs[name].shape)
        return inputs | {name: hard.astype(inputs[name].dtype)}

    return harden
