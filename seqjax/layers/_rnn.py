"""Base class of the layers around nonlinear RNN cells."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from seqjax.cells import Cell, Headwise
from seqjax.cells._base import Bounds, Structure
from seqjax.layers import _checks, _init
from seqjax.layers._base import (
    Initializer,
    Layer,
    Param,
    Params,
    State,
    state_dtype,
)
from seqjax.layers._math import dense
from seqjax.layers.context import Context
from seqjax.ops.nonlinear.nonlinear_scan import Newton, nonlinear_scan


@dataclasses.dataclass(frozen=True)
class RNN(Layer):
    """A nonlinear RNN: a cell between an input and an output projection.

        u_t = x_t W_in + bias                       [gates, N], in the cell's order of gates
        s_t = cell(s_{t-1}, u_t)
        y_t = output(s_t) W_out

    The projections start normal with variance 1/fan_in. By default the cell's matrices [n, n] start
    uniform in +-1/sqrt(n), as in PyTorch, its vectors normal with standard deviation 2/sqrt(5 N),
    as in ParaRNN's code, and all biases at 0.

    Parameters: in_proj [dim, gates * N], bias [gates * N], the cell's parameters by name (vectors
    [N], matrices [N, N]), out_proj [N, dim]. State: the cell's, [B, N] or [B, N, k]. Extra output
    of `apply_with_aux`: "solve", the `SolveInfo` of `seqjax.nonlinear_scan`.

    Example:
      >>> import dataclasses
      >>> import jax, jax.numpy as jnp, seqjax
      >>> @dataclasses.dataclass(frozen=True)
      ... class MyGRU(seqjax.layers.RNN):
      ...     @property
      ...     def cell(self):
      ...         return seqjax.cells.GRU(self.states)
      >>> layer = MyGRU(dim=4)
      >>> y, state = layer.apply(layer.init(jax.random.key(0)), jnp.ones((2, 5, 4)))
      >>> y.shape, state.shape
      ((2, 5, 4), (2, 4))

    Attributes:
      dim: features of input and output.
      state_dim: channels of the cell N; by default dim.
      algorithm: "newton" (all steps at once) or "sequential" (step by step). By default chosen by
        platform and cell; see `seqjax.nonlinear_scan`.
      solver: a `seqjax.Newton`; by default `Newton()`.
      implementation: "xla", the default, or "pallas" (on TPU and GPU); see
        `seqjax.nonlinear_scan`.
    """

    dim: int
    state_dim: int | None = None
    algorithm: str | None = None
    solver: Newton | None = None
    implementation: str | None = None

    # Gate -> initial bias of its first and its last channel, evenly spaced in between.
    _bias_start: ClassVar[Mapping[int, tuple[float, float]]] = {}
    # Initializers of the recurrent parameters that differ from the default ones.
    _recurrent_start: ClassVar[Mapping[str, Initializer]] = {}

    def __post_init__(self) -> None:
        _checks.positive(self, dim=self.dim, state_dim=self.states)
        _checks.require(
            self,
            self.algorithm in (None, "newton", "sequential"),
            f"`algorithm` must be 'newton', 'sequential' or None, got {self.algorithm!r}.",
        )
        _checks.require(
            self,
            self.implementation in (None, "xla", "pallas"),
            f"`implementation` must be 'xla', 'pallas' or None, got {self.implementation!r}.",
        )
        _ = self.cell  # checks the cell's own fields

    @property
    def states(self) -> int:
        """Channels of the cell N: `state_dim`, by default `dim`."""
        return self.dim if self.state_dim is None else self.state_dim

    @property
    @abc.abstractmethod
    def cell(self) -> Cell:
        """Return the cell, over `state_dim` channels."""

    def declare_params(self) -> Mapping[str, Param | Layer]:
        cell, states = self.cell, self.states
        width = cell.gates * states
        axes = {1: ("state",), 2: (None, "state"), 3: ("heads", None, None)}

        def recurrent(name: str) -> Param:
            shape = cell.param_shape(name)
            bound = shape[-1] ** -0.5
            start = _init.uniform(-bound, bound)
            if cell.recurrent[name] == "vector":
                start = _init.normal(2 / (5 * states) ** 0.5)
            start = self._recurrent_start.get(name, start)
            return Param(shape, axes[len(shape)], "recurrence", start)

        return {
            "in_proj": Param((self.dim, width), ("embed", "state"), "weight", _init.fan_in_normal),
            "bias": Param((width,), ("state",), "recurrence", self._draw_bias),
            **{name: recurrent(name) for name in cell.recurrent},
            "out_proj": Param(
                (states, self.dim), ("state", "embed"), "weight", _init.fan_in_normal
            ),
        }

    def _draw_bias(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        bias = jnp.zeros((self.cell.gates, self.states), dtype)
        for gate, (first, last) in self._gate_bias().items():
            bias = bias.at[gate].set(jnp.linspace(first, last, self.states, dtype=dtype))
        return bias.reshape(shape)

    def _gate_bias(self) -> Mapping[int, tuple[float, float]]:
        """Return `_bias_start`, for layers whose gates depend on their fields."""
        return self._bias_start

    def _in_heads(self, cell: Callable[[int], Cell], heads: int | None) -> Cell:
        """Return the cell, or one per head with block-diagonal recurrent matrices."""
        if heads is None:
            return cell(self.states)
        _checks.positive(self, heads=heads)
        _checks.require(
            self,
            self.states % heads == 0,
            f"`heads` must divide state_dim={self.states}, got {heads}.",
        )
        return Headwise(cell(self.states // heads), heads)

    def _from_input(self, params: Params, u: jax.Array) -> jax.Array:
        """Return x W_in [B, T, gates * N], for layers that normalize it."""
        del params
        return u

    def make_state(self, batch_size: int, dtype: Any) -> State:
        return self.cell.initial_state(batch_size, dtype)

    def state_flops(self) -> int:
        # Products with diagonal weights, and gates. Matrices are counted as weights.
        return 8 * self.cell.gates * self.states

    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        wide, cell = state_dtype(x.dtype), self.cell
        shape = cell.gates, self.states
        u = self._from_input(params, dense(x, params["in_proj"]).astype(wide))
        u = u.reshape(*x.shape[:2], *shape)
        bias = params["bias"].astype(wide).reshape(shape)
        recurrent = {name: params[name].astype(wide) for name in cell.recurrent}
        in_loop = cell.structure == "dense"  # other cells may run as a kernel
        states, state, info = nonlinear_scan(
            _WithBias(cell) if in_loop else cell,
            {"cell": recurrent, "bias": bias} if in_loop else recurrent,
            u if in_loop else u + bias,
            state,
            reset=context.reset,
            algorithm=self.algorithm,
            implementation=self.implementation,
            solver=self.solver,
            sequence_axis=context.sequence_axis,
        )
        context.record("solve", info)
        return dense(self.cell.output(states).astype(x.dtype), params["out_proj"]), state


@dataclasses.dataclass(frozen=True)
class _WithBias:
    """A cell on pre-activations without their bias.

    The loop over steps adds the bias. On CPU the sums of all steps would be one more array of the
    size of the inputs, which takes a tenth of the time of an LSTM's forward pass.
    """

    cell: Cell

    @property
    def structure(self) -> Structure:
        return self.cell.structure

    def bounds(self, params: Any) -> Bounds | None:
        return self.cell.bounds(params["cell"])

    def __call__(self, params: Any, h: jax.Array, u: jax.Array) -> jax.Array:
        return self.cell(params["cell"], h, u + params["bias"])
