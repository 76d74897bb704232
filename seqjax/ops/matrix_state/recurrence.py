"""Matrix-state recurrences: one class for the library's ops and for those of users.

    S_t = f(S_{t-1}, D_t S_{t-1}, x_t)      D_t = diag(exp g_t)      S [K, V],  g = log_decay
    o_t = scale * S_t^T q_t

`MatrixRecurrence` contains f, as a function of one step, and its chunked form. This module and
`chunked` implement checks, dtypes, resets, the choice of the algorithm, chunks, meshes and
derivatives for all instances.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.core import (
    backends,
    checks,
    explicit_mesh,
    jax_compat,
    kernel_op,
    linalg,
    sequence_parallel,
)
from seqjax.ops.core.custom_adjoint import unless_differentiated
from seqjax.ops.matrix_state import (
    chunked,
    decays,
    exclusive_read,
    input_maps,
    matrix_kernels,
    xla_form,
)
from seqjax.ops.matrix_state.algorithm_choice import CallOptions, default_algorithms
from seqjax.ops.matrix_state.input_maps import SoftplusGate
from seqjax.types import Array

ALGORITHMS = ("sequential", "chunked", "associative")


def _specs(arguments: Mapping[str, Any], out: Any) -> Any:
    """Return the specs of (outputs, final state), split by axis as the inputs are."""
    recurrence = arguments["self"]
    given = {**arguments, **arguments["inputs"]}
    return explicit_mesh.by_axes(recurrence.patterns, "B T H V", "B H K V")(given, out)


@dataclasses.dataclass(frozen=True)
class MatrixRecurrence:
    """Recurrence of matrix states, in parallel over time.

        S_t = f(S_{t-1}, D_t S_{t-1}, x_t)      D_t = diag(exp g_t)      S [K, V],  g = log_decay
        o_t = scale * S_t^T q_t

    Pass f as the function `step`, and optionally its chunked form, and call the recurrence like an
    op: `recurrence({"q": q, "k": k, "v": v}, log_decay)`. `delta_rule`, `linear_attention` and
    `generalized_delta_rule` are instances of this class. Create an instance once, at module level:
    each new instance is compiled again.

    f must be affine in the state and treat each of its columns alike. If all inputs with an axis V
    are zero, f must be linear in the state; otherwise results with `sequence_axis` are wrong. Use
    `nonlinear_scan` for other recurrences.

    Attributes:
      name: name of the op in error messages.
      step: maps (S, DS, x) to S_t. S is S_{t-1} after the reset, [B, H, K, V]. DS is D_t S_{t-1},
        or S without a `log_decay`. x holds the inputs of the step by name, [B, H, F] each, with
        F = 1 for inputs [B, T, H], in the dtype of the state. With a `log_decay`, its entry "decay"
        is the diagonal of D_t, [B, H, K] or [B, H, 1]. On CPU, S^T (D_t k) is faster than
        (D_t S)^T k: the product D_t S then never exists as an array.
      chunk: maps the inputs of a chunk of C steps by name, [..., C, F] each, to a `ChunkMap`, for
        any number of leading axes. Its entry "log_decay" is [..., C, 1] or [..., C, K] and -inf
        where the state is reset. Without decays it is a boolean [..., C, 1], True at resets. Pass
        it to `decayed_products` and `cumulative_decays`, which accept both. "q" is already scaled.
        A step whose inputs are zero must change the state by its decay only, because the last
        chunk is padded with such steps. Without `chunk`, the recurrence runs step by step.
      inputs: shapes of the other inputs than "q" [B, T, H, K] and "v" [B, T, H, V], by name:
        "B T H", or "B T H" and one more axis, such as "B T H K". With G in place of H the input
        and "q" may have fewer heads than "v". Then `step` and `chunk` get an axis more: [..., G, 1,
        F] for these inputs and [..., G, H / G, F] for the others. They must broadcast.
      complex_ok: whether inputs may be complex.
      diagonal: whether S_t - D_t S_{t-1} does not depend on the state. This saves arithmetic with
        `sequence_axis`.
      reads_before_decay: inputs that read S_{t-1} and not D_t S_{t-1}. They are set to zero where
        the state is reset.
      has_kernels: whether `pallas_kernels` has kernels under this name; for ops of the library.
      mixed: whether `chunk` accepts vectors in bfloat16 beside decays in float32. On accelerators
        it then gets "q", "v" and the inputs with a fourth axis in bfloat16 if all of them are, and
        "q" is not scaled. By default all inputs of `chunk` have the dtype of the state.
      cpu_chunks_from: number of elements K * V from which chunks are the default on CPU: without
        decays, with one per head, and with decays per channel.

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> def step(S, DS, x):  # linear attention whose writes have a gate
      ...     return DS + x["gate"][..., None] * x["k"][..., :, None] * x["v"][..., None, :]
      >>> def chunk(x):
      ...     k, decay = x["gate"] * x["k"], x["log_decay"]
      ...     from_start, to_end = seqjax.ops.cumulative_decays(decay, k.dtype)
      ...     [[scores]] = seqjax.ops.decayed_products((x["q"],), (k,), decay)
      ...     return seqjax.ops.ChunkMap(
      ...         outputs=scores @ x["v"],
      ...         reads=x["q"] * from_start,
      ...         offset=(k * to_end).mT @ x["v"],
      ...         transition=from_start[..., -1, :, None],
      ...     )
      >>> gated = seqjax.ops.MatrixRecurrence(
      ...     "gated", step, chunk, {"k": "B T H K", "gate": "B T H"}, diagonal=True
      ... )
      >>> one = jnp.ones((1, 3, 1, 1))
      >>> inputs = {"q": one, "k": one, "v": one, "gate": 2 * one[..., 0]}
      >>> o, S = gated(inputs, jnp.log(one / 2))
      >>> [round(float(value), 4) for value in o.ravel()]
      [2.0, 3.0, 3.5]
    """

    name: str
    step: Callable[[Array, Array, chunked.Arrays], Array]
    chunk: chunked.Chunk | None = None
    inputs: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"k": "B T H K"}, hash=False
    )
    complex_ok: bool = False
    diagonal: bool = False
    reads_before_decay: tuple[str, ...] = ()
    has_kernels: bool = False
    mixed: bool = False
    cpu_chunks_from: tuple[int, int, int] = (48 * 48,) * 3

    def __post_init__(self) -> None:
        if backends.BACKENDS.get(self.name) is not None and not self.has_kernels:
            raise ValueError(
                f"{self.name}: `name` must not be that of an op with Pallas kernels, got"
                f" {self.name!r}; choose another name."
            )
        reserved = {"q", "v", "decay", "log_decay", "initial_state"}
        for name, pattern in self.inputs.items():
            axes = [option.split() for option in pattern.split("|")]
            fits = all(a[:2] == ["B", "T"] and a[2:3] in (["H"], ["G"]) for a in axes)
            if name in reserved or not fits or any(len(a) > 4 for a in axes):
                raise ValueError(
                    f"{self.name}: `inputs` must have the shape 'B T H' or 'B T G', with at most"
                    f" one more axis, and a name other than {', '.join(sorted(reserved))}, got"
                    f" {name!r}: {pattern!r}."
                )
        object.__setattr__(self, "inputs", types.MappingProxyType(dict(self.inputs)))
        object.__setattr__(self, "reads_before_decay", tuple(self.reads_before_decay))
        unknown = set(self.reads_before_decay) - set(self.inputs)
        if unknown:
            raise ValueError(
                f"{self.name}: `reads_before_decay` must be names of `inputs`, got"
                f" {', '.join(sorted(unknown))}."
            )

    @property
    def patterns(self) -> dict[str, str]:
        """The shapes of all arrays by name."""
        decays = {"log_decay": "B T H | B T H K", "initial_state": "B H K V"}
        grouped = any(pattern.split()[2] == "G" for pattern in self.inputs.values())
        query = "B T G K" if grouped else "B T H K"
        return {"q": query, **self.inputs, "v": "B T H V", **decays}

    @explicit_mesh.auto_inside(_specs)
    def __call__(
        self,
        inputs: dict[str, Array],
        log_decay: Array | None = None,
        initial_state: Array | None = None,
        *,
        scale: float | Array | None = None,
        exclusive: bool = False,
        bonus: Array | None = None,
        state_dtype: Any = None,
        normalize: bool = False,
        gate: SoftplusGate | None = None,
        reset: Array | None = None,
        chunk_size: int | None = None,
        block_sizes: tuple[int, int] | None = None,
        algorithm: str | None = None,
        implementation: str | None = None,
        sequence_axis: str | None = None,
        interpret: bool = False,
    ) -> tuple[Array, Array]:
        """Run the recurrence over whole sequences.

        Args:
          inputs: arrays by name: "q" [B, T, H, K], "v" [B, T, H, V] and those of the attribute
            `inputs`.
          log_decay: None, [B, T, H] or [B, T, H, K]; real parts in [-inf, 0] for a stable state.
          initial_state: [B, H, K, V]; by default zeros.
          scale: factor of the queries, a real number or scalar array; by default K**-0.5.
          exclusive: whether outputs read S_{t-1}, after the reset and before the decay, and not
            S_t.
          bonus: [H, K] or [H]; with `exclusive`, outputs read S_{t-1} + diag(bonus) k_t v_t^T.
          state_dtype: bfloat16 for a final state of half the size; by default float32 or float64.
          normalize: whether to divide "q" and "k" by sqrt(|x|^2 + 1e-6) first.
          gate: function from `log_decay` to the logarithms of the decays; by default none.
          reset: [B, T] bool, True where the state is cleared before the step.
          chunk_size: steps in a chunk, rounded up to a power of two; by default 64, or 16 for the
            sequential algorithm, which recomputes its states in chunks.
          block_sizes: (steps, heads) of a block of the kernel for TPU; for ops of the library.
          algorithm: "sequential" (step by step), "chunked" (matmuls inside chunks, chunk after
            chunk) or "associative" (matmuls, and chunks in log depth). By default chunks are used
            if there is a `chunk`, the state is large enough and there are more than a few steps.
            On CPU the default without derivatives is sequential.
          implementation: "xla" or "pallas". Only ops of the library have Pallas kernels.
          sequence_axis: inside `jax.shard_map`, the mesh axis over which T is split.
          interpret: run the Pallas kernel in interpret mode, without its hardware. This is slow.

        Returns:
          (o [B, T, H, V] in the dtype of "v", final state [B, H, K, V] in float32, or float64 if
          any argument is); both complex if any argument is.

        Raises:
          ValueError: if names, shapes or dtypes do not fit.
          NotImplementedError: if the algorithm or implementation does not support the call or the
            platform.
        """
        op = self.name
        wanted = self.patterns
        given = checks.as_arrays({**inputs, "log_decay": log_decay, "initial_state": initial_state})
        if given.keys() != wanted.keys():
            names = ", ".join(sorted({"q", "v", *self.inputs}))
            raise ValueError(
                f"{op}: `inputs` must be a dict with the entries {names}, got"
                f" {', '.join(sorted(inputs))}."
            )
        if bonus is not None:
            if not exclusive:
                raise ValueError(f"{op}: `bonus` must be None without `exclusive`, got an array.")
            if "k" not in self.inputs:
                raise ValueError(f"{op}: `bonus` must be None without an input `k`, got an array.")
            given, wanted = given | {"bonus": jnp.asarray(bonus)}, wanted | {"bonus": "H K | H"}
        if normalize and "k" not in self.inputs:
            raise ValueError(f"{op}: `normalize` must be False without an input `k`, got True.")
        if gate is not None:
            gate_arrays, gate_patterns = input_maps.check_gate(op, gate, given["log_decay"])
            given, wanted = given | gate_arrays, wanted | gate_patterns
        sizes = checks.check_shapes(op, {name: wanted[name] for name in given}, given)
        groups = sizes.get("G", sizes["H"])
        if sizes["H"] % groups:
            raise ValueError(
                f"{op}: `v` must have a multiple of the G={groups} heads of `q`, got"
                f" {sizes['H']} heads."
            )
        checks.check_dtypes(op, given, complex_ok=self.complex_ok)
        bonus = given.pop("bonus", None)
        checks.check_state_dtype(op, state_dtype, *given.values())
        reset = checks.check_reset(op, reset, sizes["B"], sizes["T"])
        checks.check_sequence_axis(op, sequence_axis)
        checks.check_positive(op, chunk_size=chunk_size)
        scale = checks.check_scale(op, scale)
        if block_sizes is not None:
            block_sizes = matrix_kernels.check_block_sizes(op, block_sizes, sizes)
        if given["initial_state"] is None:
            shape = (sizes["B"], sizes["H"], sizes["K"], sizes["V"])
            given["initial_state"] = jnp.zeros(shape, checks.state_dtype(*given.values(), bonus))
        decay_axes = 0 if log_decay is None else given["log_decay"].ndim - 2
        algorithm = backends.select_algorithm(
            op,
            algorithm,
            algorithms=ALGORITHMS if self.chunk else ALGORITHMS[:1],
            length=sizes["T"],
            any_length=("sequential", "chunked"),
        )
        chosen = default_algorithms(
            sizes, decay_axes, self.diagonal, self.cpu_chunks_from if self.chunk else None
        )
        backend = backends.select_backend(
            op,
            algorithm,
            implementation,
            interpret,
            length=sizes["T"],
            unsupported=matrix_kernels.unsupported(given, interpret),
            block_sizes=block_sizes,
        )
        if gate is not None:
            gate = input_maps.SoftplusGate(given.pop("A_log"), given.pop("dt_bias"))
            given["log_decay"] = (given["log_decay"], gate)
        default = sizes["K"] ** -0.5 if scale is None else None
        algorithms = (algorithm,) * 3 if algorithm else chosen
        narrow = state_dtype is not None
        options = CallOptions(
            *algorithms, chunk_size, backend, default, exclusive, narrow, normalize
        )
        return _recur(
            given,
            reset,
            scale,
            bonus,
            recurrence=self,
            options=options,
            sequence_axis=sequence_axis,
        )


@functools.partial(jax.jit, static_argnames=("recurrence", "options", "sequence_axis"))
def _recur(
    given: dict[str, Any],
    reset: jax.Array | None,
    scale: jax.Array | None,
    bonus: jax.Array | None,
    *,
    recurrence: MatrixRecurrence,
    options: CallOptions,
    sequence_axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    leaves, tree = jax.tree.flatten((given, reset, scale, bonus))
    matched = jax_compat.match_varying(*leaves)
    arrays, reset, scale, bonus = jax.tree.unflatten(tree, matched)
    values = [*jax.tree.leaves(arrays), bonus]
    state = checks.state_dtype(*values)
    out = checks.output_dtype(arrays["v"], *values)
    S0, log_decay = arrays.pop("initial_state").astype(state), arrays.pop("log_decay")
    scale = None if scale is None else scale.astype(jnp.finfo(state).dtype)
    if options.exclusive and options.normalize:  # `exclusive` also reads the queries and keys
        arrays = input_maps.normalize(arrays)
        options = dataclasses.replace(options, normalize=False)

    run = functools.partial(xla_form.run, recurrence, options, out)
    xla = unless_differentiated(functools.partial(run, False), functools.partial(run, True))
    interpret = options.backend.mode is backends.Mode.INTERPRET
    kernels = matrix_kernels.functions(options, interpret, out)
    compute = kernel_op.kernel_op(options.backend, xla, *kernels)
    if options.exclusive:
        compute = exclusive_read.exclusive(compute, options.scale, bonus)

    def local(S0: jax.Array, values: dict[str, jax.Array] | None = None) -> Any:
        return compute(arrays | (values or {}), log_decay, S0, reset, scale)

    def carried(out: jax.Array, final: jax.Array) -> tuple[jax.Array, jax.Array]:
        return out, final.astype(jnp.bfloat16) if options.narrow_state else final

    if sequence_axis is None:
        return carried(*local(S0))
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    if not recurrence.diagonal:
        # With values of zero the step is linear, and the identity becomes the transition.
        size = S0.shape[-2]
        identity = jnp.eye(size, dtype=state) + jnp.zeros_like(S0[..., :1])
        no_values = {
            name: jnp.zeros_like(x, shape=(*x.shape[:-1], size))
            for name, x in arrays.items()
            if recurrence.patterns[name].split()[3:] == ["V"]
        }
        transition, apply = local(identity, no_values)[1], linalg.matmul
    else:
        transition, apply = (
            decays.shard_decay(input_maps.open_gate(log_decay), S0, reset),
            jnp.multiply,
        )
        if "value_log_decay" in arrays:
            of_columns = decays.shard_decay(arrays["value_log_decay"], S0, reset)
            transition = transition * of_columns.mT
    split = sequence_parallel.run_split(local, transition, S0, reset, sequence_axis, apply=apply)
    return carried(*split)
