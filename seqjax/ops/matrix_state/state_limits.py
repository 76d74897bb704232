"""Linear attention with a limited state: a largest norm, or a window of steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqjax.ops.core import checks, linalg
from seqjax.ops.matrix_state.grouped_heads import repeat
from seqjax.ops.matrix_state.linear_attention import linear_attention
from seqjax.ops.step_scan import step_scan
from seqjax.types import Array, Float, Reset


@dataclasses.dataclass(frozen=True)
class StateNorm:
    """Linear attention with a largest norm of the state.

        Z_t = exp(g_t) S_{t-1} + k_t v_t^T                                   g = log_decay
        S_t = Z_t min(1, largest / |Z_t|)                 Frobenius norm of each head
        o_t = scale S_t^T q_t

    This is the state normalization of Stuffed Mamba (first version of arXiv 2410.07145). It bounds
    the state in sequences that are longer than the training sequences. The recurrence is nonlinear,
    so it runs step by step.

    Departures: the authors' code (thunlp/stuffed-mamba) limits the state once every 128 steps. It
    multiplies the state by |Z_t| / largest, which enlarges the state. This class shrinks the norm
    to `largest`. The limits in the authors' code are the norms after a prompt, one for each head.

    Call it as `linear_attention`: limit(q, k, v, log_decay, initial_state, scale=, reset=,
    sequence_axis=) returns (o, final state [B, H, K, V]).

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> q = k = v = jnp.ones((1, 4, 1, 1))
      >>> limit = seqjax.methods.StateNorm(largest=2.5)
      >>> y, state = limit(q, k, v, jnp.zeros((1, 4, 1)))
      >>> y.ravel().tolist()
      [1.0, 2.0, 2.5, 2.5]

    Attributes:
      largest: the largest norm of a head's state, positive; or a tuple with one number per head.
    """

    largest: float | tuple[float, ...]

    def __post_init__(self) -> None:
        if np.ndim(self.largest) == 1:  # an array has no hash
            object.__setattr__(self, "largest", tuple(np.asarray(self.largest).tolist()))
        if np.ndim(self.largest) > 1:
            raise ValueError(
                "StateNorm: `largest` must be one number or one per head, got shape"
                f" {list(np.shape(self.largest))}."
            )
        limits = self.largest if isinstance(self.largest, tuple) else (self.largest,)
        if not (limits and all(limit > 0 for limit in limits)):
            raise ValueError(f"StateNorm: `largest` must be above 0, got {self.largest!r}.")

    def initial_state(
        self, batch_size: int, heads: int, K: int, V: int, dtype: Any, groups: int | None = None
    ) -> Array:
        """Return the state before the first step: zeros [B, H, K, V] for any `groups`."""
        del groups
        return jnp.zeros((batch_size, heads, K, V), dtype)

    def __call__(
        self,
        q: Float[Array, "B T G K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T H V"],
        log_decay: Float[Array, "B T H"],
        initial_state: Any = None,
        *,
        scale: float | None = None,
        reset: Reset | None = None,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T H V"], Any]:
        """Compute outputs and the final state; see `linear_attention` for the arguments."""
        _check("StateNorm", q, k, v, log_decay)
        heads, dtype = v.shape[2], v.dtype
        if isinstance(self.largest, tuple) and len(self.largest) != heads:
            raise ValueError(
                f"StateNorm: `largest` must have one number per head, {heads}, got"
                f" {len(self.largest)}."
            )
        state = _start(self, initial_state, q, k, v, log_decay)
        wide = state.dtype
        q, k, v, log_decay = (z.astype(wide) for z in (q, k, v, log_decay))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        y, state = step_scan(
            _limited_step,
            jnp.asarray(self.largest, wide)[..., None, None],
            (scale * repeat(q, heads), repeat(k, heads), v, jnp.exp(log_decay)),
            state,
            reset=reset,
            sequence_axis=sequence_axis,
        )
        return y.astype(dtype), state


def _limited_step(largest: Array, S: Array, x: Any) -> tuple[Array, Array]:
    """Take one step of all heads: S [H, K, V], largest [1, 1] or [H, 1, 1]."""
    q, k, v, decay = x
    Z = decay[:, None, None] * S + k[:, :, None] * v[:, None, :]
    square = jnp.sum(Z * Z, axis=(1, 2), keepdims=True)
    above = square > largest**2
    # A square root has no derivative at 0, where states start.
    norm = jnp.sqrt(jnp.where(above, square, 1))
    S = jnp.where(above, Z * (largest / norm), Z)
    return S, linalg.read(S, q)


@dataclasses.dataclass(frozen=True)
class StateWindow:
    """Linear attention over the last steps, as the difference of two states.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T                                   g = log_decay
        o_t = scale (S_t - exp(g_{t-window+1} + .. + g_t) S_{t-window})^T q_t

    This is the sliding window of Stuffed Mamba (arXiv 2410.07145, equation 8). A step reads exactly
    the last `window` writes of its document. The recurrence runs twice, so any algorithm of
    `linear_attention` computes it. The state also holds the inputs of `window` steps. The
    paper runs the model again on the tokens of these steps instead.

    Rounding errors are relative to S_t, which still sums all steps. Use it with decays below 1.

    Call it as `linear_attention`: limit(q, k, v, log_decay, initial_state, scale=, reset=) returns
    (o, final state). The state is a dictionary: "memory" and "earlier" [B, H, K, V], "k" [B,
    window, G, K], "v" [B, window, H, V], "log_decay" [B, window, H], "reset" [B, window].

    Example:
      >>> import jax.numpy as jnp, seqjax
      >>> q = k = v = jnp.ones((1, 4, 1, 1))
      >>> limit = seqjax.methods.StateWindow(window=2)
      >>> y, state = limit(q, k, v, jnp.log(jnp.full((1, 4, 1), 0.5)))
      >>> y.ravel().tolist()
      [1.0, 1.5, 1.5, 1.5]

    Attributes:
      window: the number of steps that a step reads, positive.
    """

    window: int

    def __post_init__(self) -> None:
        checks.check_positive("StateWindow", window=self.window)

    def initial_state(
        self, batch_size: int, heads: int, K: int, V: int, dtype: Any, groups: int | None = None
    ) -> dict[str, Array]:
        """Return the state before the first step; `groups` are the heads G of the keys."""
        memory, inputs = (batch_size, heads, K, V), (batch_size, self.window)
        return {
            "memory": jnp.zeros(memory, dtype),
            "earlier": jnp.zeros(memory, dtype),
            "k": jnp.zeros((*inputs, groups or heads, K), dtype),
            "v": jnp.zeros((*inputs, heads, V), dtype),
            "log_decay": jnp.zeros((*inputs, heads), dtype),
            "reset": jnp.zeros(inputs, dtype),
        }

    def __call__(
        self,
        q: Float[Array, "B T G K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T H V"],
        log_decay: Float[Array, "B T H"],
        initial_state: Any = None,
        *,
        scale: float | None = None,
        reset: Reset | None = None,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T H V"], Any]:
        """Compute outputs and the final state; see `linear_attention` for the arguments."""
        if sequence_axis is not None:
            raise NotImplementedError(
                "StateWindow: there is no `sequence_axis` for this recurrence; split the batch or"
                " the heads over devices."
            )
        _check("StateWindow", q, k, v, log_decay)
        (batch, length), (heads, dtype) = k.shape[:2], (v.shape[2], v.dtype)
        state = _start(self, initial_state, q, k, v, log_decay)
        wide = state["memory"].dtype
        # The difference of the outputs can be far smaller than they are. Narrow ones would round it
        # away.
        q, k, v, log_decay = (z.astype(wide) for z in (q, k, v, log_decay))
        reset = checks.check_reset("StateWindow", reset, batch, length)
        cut = jnp.zeros((batch, length), bool) if reset is None else reset
        now = {"k": k, "v": v, "log_decay": log_decay, "reset": cut}
        # The inputs of the steps from `window` before the first of this call.
        every = {name: _joined(state[name], z) for name, z in now.items()}
        late = {name: z[:, :length] for name, z in every.items()}
        o, memory = linear_attention(q, k, v, log_decay, state["memory"], scale=scale, reset=reset)
        # No reset in the window: the state at its start belongs to the same document.
        same = (_window_sum(every["reset"], self.window) == 0)[..., None]
        decay = jnp.exp(jnp.where(same, _window_sum(every["log_decay"], self.window), 0))
        reading = jnp.where(same[..., None], repeat(q, heads) * decay[..., None], 0)
        removed, earlier = linear_attention(
            reading,
            repeat(late["k"], heads),
            late["v"],
            late["log_decay"],
            state["earlier"],
            scale=scale,
            reset=late["reset"] > 0,
        )
        y = jnp.where(same[..., None], o - removed, o)
        recent = {name: z[:, length:] for name, z in every.items()}
        return y.astype(dtype), {"memory": memory, "earlier": earlier, **recent}


def _joined(before: Array, now: Array) -> Array:
    return jnp.concatenate([before, now.astype(before.dtype)], axis=1)


def _window_sum(z: Array, window: int) -> Array:
    """Return sums [B, T, ...] over the last `window` steps of z [B, window + T, ...]."""
    sizes = (1, window, *(1,) * (z.ndim - 2))
    return lax.reduce_window(
        z[:, 1:], np.zeros((), z.dtype), lax.add, sizes, (1,) * z.ndim, "VALID"
    )


def _start(
    limit: StateNorm | StateWindow, given: Any, q: Array, k: Array, v: Array, log_decay: Array
) -> Any:
    """Return the initial state in the state dtype: the given one, checked, or zeros."""
    op, (batch, _, groups, K), (heads, V) = type(limit).__name__, k.shape, v.shape[2:]
    leaves = [] if given is None else [jnp.asarray(leaf) for leaf in jax.tree.leaves(given)]
    for leaf in leaves:
        checks.check_dtypes(op, {"initial_state": leaf}, complex_ok=False)
    wide = checks.state_dtype(q, k, v, log_decay, *leaves)

    def make() -> Any:
        return limit.initial_state(batch, heads, K, V, wide, groups)

    if given is None:
        return make()
    wanted = jax.eval_shape(make)
    hint = "make one with `initial_state` of the same limit, sizes and groups."
    tree: Any = jax.tree.structure(wanted)
    if tree != jax.tree.structure(given):
        raise ValueError(
            f"{op}: `initial_state` must be {checks.describe_tree(wanted)}, got"
            f" {checks.describe_tree(given)}; {hint}"
        )
    for (path, want), leaf in zip(jax.tree_util.tree_leaves_with_path(wanted), leaves, strict=True):
        if want.shape != leaf.shape:
            raise ValueError(
                f"{op}: `initial_state{jax.tree_util.keystr(path)}` must have shape"
                f" {list(want.shape)}, got {list(leaf.shape)}; {hint}"
            )
    return jax.tree.unflatten(tree, [leaf.astype(wide) for leaf in leaves])


def _check(op: str, q: Array, k: Array, v: Array, log_decay: Array) -> None:
    """Check the dtypes and shapes of q, k, v and log_decay."""
    given = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    checks.check_dtypes(op, given, complex_ok=False)
    if q.ndim != 4 or v.ndim != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"{op}: `q` and `k` must have shape [B, T, G, K] and `v` [B, T, H, V], got"
            f" {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if v.shape[2] % q.shape[2]:
        raise ValueError(
            f"{op}: `q` must have a number of heads that divides {v.shape[2]}, got {q.shape[2]}."
        )
    if log_decay.shape != v.shape[:3]:
        raise ValueError(
            f"{op}: `log_decay` must have shape {list(v.shape[:3])}, one number per head, got"
            f" {list(log_decay.shape)}."
        )
