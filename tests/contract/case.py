"""What a row of the contract tests is: see `tests.contract.cases`, where the rows are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A row.

    Attributes:
      name: of the row.
      inputs: (rng, B, T) -> named float64 arrays (or, for "params", a tree of them).
      run: (inputs, state, reset, **keywords) -> (outputs, final state).
      oracle: (inputs, state, reset) -> (outputs, final state or None where it is not judged).
      state: (rng, B) -> a random initial state; None for layers, whose states are made by running.
      algorithms: to hold against the oracle, the one that the quick tests take first; "pallas" is
        the kernel, interpreted.
      timed: names of the inputs [B, T, ...].
      shared: names of the inputs [T, ...], the same for the whole batch.
      hard: (rng, inputs) -> the same with numbers from the edge of what the op promises.
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
        """Some steps of the input `name`: a view, or all of it where it does not vary in time."""
        if name in self.timed:
            return value[:, steps]
        return value[steps] if name in self.shared else value

    def __str__(self) -> str:
        return self.name


def normal(rng: np.random.Generator, *shape: int, complex_: bool = False) -> np.ndarray:
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if complex_ else real
