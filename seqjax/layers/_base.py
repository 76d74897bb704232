"""Base class of all layers, with declared parameters and argument checks."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from seqjax.layers import _checks, _segments
from seqjax.layers.context import Context
from seqjax.ops.core import explicit_mesh
from seqjax.types import PyTree

Role = Literal["weight", "bias", "norm", "embedding", "recurrence"]
Params = dict[str, Any]
State = Any
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def state_dtype(dtype: Any) -> jnp.dtype:
    """Return the dtype of states and recurrence parameters: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def complex_dtype(dtype: Any) -> jnp.dtype:
    """Return the dtype of complex states: complex128 for float64, else complex64."""
    return jnp.dtype(jnp.complex128 if jnp.dtype(dtype) == jnp.float64 else jnp.complex64)


@dataclasses.dataclass(frozen=True)
class Param:
    """Declaration of one parameter array of a layer.

    Attributes:
      shape: the shape of the array.
      axes: a logical name per axis, None for an axis that is never split. `seqjax.sharding` maps
        names to mesh axes.
      role: "weight", "bias", "norm", "embedding" or "recurrence". Arrays with the role
        "recurrence" are at least float32, also if the other parameters are narrower.
      initializer: (key, shape, dtype) -> array, like those of `jax.nn.initializers`.

    Example:
      >>> import jax
      >>> from seqjax.layers import Param
      >>> decay = Param((8,), ("state",), "recurrence", jax.nn.initializers.ones)
      >>> print(decay.init(jax.random.key(0), jax.numpy.bfloat16).dtype)
      float32
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: Role
    initializer: Initializer

    def init(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Draw the array. Recurrence parameters are at least float32."""
        return self.initializer(
            key, self.shape, state_dtype(dtype) if self.role == "recurrence" else dtype
        )


class Layer(abc.ABC):
    """Base class of sequence layers: hyperparameters in a frozen dataclass, arrays passed in.

    A subclass is a frozen dataclass with a field `dim` and up to five hooks:

    - `declare_params` returns its parameters and sublayers by name.
    - `make_state` returns the state before the first step; by default there is none.
    - `forward` computes the layer.
    - `make_values` returns the arrays that a block hands to later blocks; by default none.
    - `declare_shared` returns layers whose parameters blocks share by name; by default none.
    - `visible_params` returns the parameters that all blocks of a backbone read; by default none.

    `init`, `param_axes`, `param_roles`, `apply`, `step`, `initial_state` and all argument checks
    follow from these. A layer calls its sublayers by their `forward`.

    Weights are cast to the dtype of `x` (bfloat16, float16, float32 or float64) and the output has
    that dtype. States, recurrence parameters and statistics are float32 (complex64), or float64
    (complex128) when `x` is float64.

    Example:
      >>> import dataclasses, jax, seqjax
      >>> import jax.numpy as jnp
      >>> @dataclasses.dataclass(frozen=True)
      ... class Leaky(seqjax.layers.Layer):
      ...     dim: int
      ...
      ...     def declare_params(self):
      ...         zeros = jax.nn.initializers.zeros
      ...         return {"keep": seqjax.layers.Param((self.dim,), ("embed",), "recurrence", zeros)}
      ...
      ...     def make_state(self, batch_size, dtype):
      ...         return jnp.zeros((batch_size, self.dim), dtype)
      ...
      ...     def forward(self, params, x, state, context):
      ...         decay = jax.nn.sigmoid(params["keep"])
      ...         y, state = seqjax.linear_scan(
      ...             decay,
      ...             (1 - decay) * x,
      ...             state,
      ...             reset=context.reset,
      ...             sequence_axis=context.sequence_axis,
      ...         )
      ...         return y.astype(x.dtype), state
      >>> layer = Leaky(dim=2)
      >>> y, state = layer.apply(layer.init(jax.random.key(0)), jnp.ones((1, 3, 2)))
      >>> print(y[0, :, 0])
      [0.5   0.75  0.875]
    """

    dim: int  # features per position of the input and of the output

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__repr__" not in cls.__dict__:  # a dataclass would add one that lists every field
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Return the call that makes the layer, without fields that have their default value."""
        given = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.init and (field.default is dataclasses.MISSING or value != field.default):
                given.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    @abc.abstractmethod
    def declare_params(self) -> Mapping[str, "Param | Layer"]:
        """Return the layer's parameters and sublayers by name."""

    def make_state(self, batch_size: int, dtype: Any) -> State:
        """Return the state before the first step; `dtype` is float32 or float64."""
        return ()

    def make_values(self, batch_size: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Return initial arrays [B, T, ...] for `context.values`, which blocks share by name."""
        return {}

    def declare_shared(self) -> Mapping[str, "Layer"]:
        """Return layers whose parameters a backbone holds once, in `context.shared`, by name."""
        return {}

    def visible_params(self, params: Params) -> dict[str, list[jax.Array]]:
        """Return lists of parameters that all blocks of a backbone read, by name.

        A layer with sublayers returns those of the sublayers in the order of their calls.
        `context.values` has the arrays of a name stacked along a first axis, in the order of the
        blocks.
        """
        return {}

    @abc.abstractmethod
    def forward(
        self, params: Params, x: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        """Compute `apply` on checked arguments, with the state filled in.

        With `context.sequence_axis`, `x` and `context.reset` are this device's shard of the
        sequence. `state` is then the state before the whole sequence, and the returned state is the
        state after it.
        """

    def state_flops(self) -> int:
        """Return the floating-point operations on the state for one position.

        A multiplication and an addition count as two. Products with weights are counted from the
        parameters elsewhere. By default this is the sum over the sublayers.
        """
        sublayers = [entry for entry in self.declare_params().values() if isinstance(entry, Layer)]
        return sum(layer.state_flops() for layer in sublayers)

    @property
    def causal(self) -> bool:
        """True if outputs depend on the past only, so that a state can carry it."""
        return True

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Draw the parameters: a nested dict of arrays.

        Args:
          key: a `jax.random` key.
          dtype: dtype of the parameters. Those of role 'recurrence' are at least float32.

        Raises:
          ValueError: if `key` is not a key, or `dtype` is not bfloat16, float16, float32 or
            float64.
        """
        _checks.key(self, key)
        dtype = _checks.float_dtype(self, dtype)
        spec = self.declare_params()
        keys = jax.random.split(key, max(len(spec), 1))
        return {
            name: entry.init(k, dtype) for (name, entry), k in zip(spec.items(), keys, strict=False)
        }

    def param_axes(self) -> dict[str, Any]:
        """Return the logical axis names of each parameter, in a tuple with one name per axis."""
        return {
            name: entry.axes if isinstance(entry, Param) else entry.param_axes()
            for name, entry in self.declare_params().items()
        }

    def param_roles(self) -> dict[str, Any]:
        """Return the role of each parameter; see `Param`."""
        return {
            name: entry.role if isinstance(entry, Param) else entry.param_roles()
            for name, entry in self.declare_params().items()
        }

    def param_shapes(self) -> dict[str, Any]:
        """Return the shape of each parameter."""
        return {
            name: entry.shape if isinstance(entry, Param) else entry.param_shapes()
            for name, entry in self.declare_params().items()
        }

    def initial_state(self, batch_size: int, dtype: Any = jnp.float32) -> State:
        """Return the state before the first step for inputs of `dtype`: a pytree, batch axis first.

        Raises:
          ValueError: if `batch_size` is not a positive integer, or `dtype` is not floating.
          NotImplementedError: if the layer is not causal, and so has no state.
        """
        self._require_causal("initial_state")
        _checks.batch_size(self, batch_size)
        return self.make_state(batch_size, state_dtype(_checks.float_dtype(self, dtype)))

    def apply(
        self,
        params: PyTree,
        x: jax.Array,
        state: State = None,
        reset: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        """Run the layer over whole sequences.

        Args:
          params: the tree that `init` returned.
          x: [B, T, dim], any T >= 1.
          state: the state that an earlier call returned; by default the initial state.
          reset: [B, T] bool, True where the state is cleared before that step is taken.
          segment_ids: [B, T] integers, an alternative to `reset`: the state is cleared wherever
            the id differs from the previous id. The first step of a call continues from `state`.
          key: a `jax.random` key for layers that draw random numbers (dropout). Without a key they
            are off.
          sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split, in the order
            of time. `x`, `reset` and `segment_ids` are then one device's shard. `state` is the
            state before the whole sequence and the returned state the one after it. Both are the
            same on all devices.

        Returns:
          `(y, state)`: y [B, T, dim] in the dtype of `x`, and the state after the last step.

        Raises:
          ValueError: if an argument has the wrong structure, shape or dtype.
          NotImplementedError: if `state` is given and the layer is not causal.
        """
        y, state, _ = self.apply_with_aux(
            params,
            x,
            state,
            reset,
            segment_ids=segment_ids,
            key=key,
            sequence_axis=sequence_axis,
        )
        return y, state

    @explicit_mesh.auto_inside(explicit_mesh.of_layer)
    def apply_with_aux(
        self,
        params: PyTree,
        x: jax.Array,
        state: State = None,
        reset: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        sequence_axis: str | None = None,
    ) -> tuple[jax.Array, State, dict[str, Any]]:
        """Run `apply`, and also return the extra outputs that layers recorded.

        Takes the arguments of `apply`.

        Returns:
          `(y, state, aux)`: aux is a dictionary of extra outputs by path, such as the `SolveInfo`
          of nonlinear RNNs. See `Context.record`.
        """
        x = _checks.array(self, "x", x)
        _checks.sequence_axis(self, sequence_axis)
        if segment_ids is not None:
            reset = _segments.to_reset(self, segment_ids, reset, x.shape[:2], sequence_axis)
        fresh = state is None
        state, reset = self._check_call(params, x, state, reset, one_step=False)
        context = Context(reset, sequence_axis, key, fresh=fresh)
        y, state = self.forward(params, x, state, context)
        return y, state, context.aux

    @explicit_mesh.auto_inside(explicit_mesh.of_layer)
    def step(
        self,
        params: PyTree,
        x_t: jax.Array,
        state: State,
        reset: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """Take one step: compute the values that `apply` returns at that position.

        Args:
          params: the tree that `init` returned.
          x_t: [B, dim].
          state: the state before this step.
          reset: [B] bool, True where the state is cleared before the step.
          key: as in `apply`.

        Returns:
          `(y_t, state)`: y_t [B, dim] and the state after the step.

        Raises:
          ValueError: if an argument has the wrong structure, shape or dtype.
          NotImplementedError: if the layer is not causal.
        """
        self._require_causal("step")
        x_t = _checks.array(self, "x_t", x_t)
        if state is None:
            raise ValueError(
                f"{type(self).__name__}: `state` must be the state before the step, got None; start"
                " from layer.initial_state(batch_size, x_t.dtype)."
            )
        state, reset = self._check_call(params, x_t, state, reset, one_step=True)
        context = Context(None if reset is None else reset[:, None], None, key)
        return self.forward_step(params, x_t, state, context)

    def forward_step(
        self, params: Params, x_t: jax.Array, state: State, context: Context
    ) -> tuple[jax.Array, State]:
        """Compute `step` on checked arguments: by default `forward` on a sequence of one step."""
        y, state = self.forward(params, x_t[:, None], state, context)
        return y[:, 0], state

    def _check_call(
        self, params: Params, x: jax.Array, state: State, reset: Any, *, one_step: bool
    ) -> tuple[State, jax.Array | None]:
        """Check the arguments of `apply` or `step`; return the state (new if None) and reset."""
        dtype = self._check_input(x, one_step)
        _checks.params(self, params)
        lead = x.shape[: 1 if one_step else 2]
        if reset is not None:
            reset = jnp.asarray(reset)
            _checks.reset(self, reset, lead)
        if state is None:
            return self.make_state(lead[0], state_dtype(dtype)), reset
        self._require_causal("continuing from a state")
        _checks.state(self, state, lead[0], state_dtype(dtype))
        return state, reset

    def _check_input(self, x: jax.Array, one_step: bool) -> jnp.dtype:
        """Check `x` and return the dtype to compute in. Models with other inputs override it."""
        _checks.features(self, x, self.dim, one_step)
        return x.dtype

    def _require_causal(self, what: str) -> None:
        if not self.causal:
            raise NotImplementedError(
                f"{type(self).__name__}: {what} requires a causal layer, got a bidirectional one,"
                " whose outputs depend on later inputs; pass whole sequences to apply, or set"
                " bidirectional=False."
            )
