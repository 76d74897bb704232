"""Argument checks and dtype rules that all ops share."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

OPTIONAL = ("initial_state", "log_decay", "D")
Arrays = Mapping[str, jax.Array | None]


def check_shapes(op: str, wanted: Mapping[str, str], given: Arrays) -> dict[str, int]:
    """Match shapes against patterns such as ``"B T H | B T H K"`` and return the axis sizes.

    ``|`` separates alternatives. Arrays that are ``None`` are skipped.

    Raises:
      ValueError: with the op, the argument, the required shape and the actual shape.
    """
    sizes: dict[str, int] = {}
    for name, pattern in wanted.items():
        array = given[name]
        if array is None and name not in OPTIONAL:
            text = " or ".join(f"[{', '.join(o.split())}]" for o in pattern.split("|"))
            raise ValueError(f"{op}: `{name}` must have shape {text}, got None.")
        if array is None:
            continue
        options = [option.split() for option in pattern.split("|")]
        for axes in options:
            if len(axes) == array.ndim and all(
                sizes.get(axis, size) == size for axis, size in zip(axes, array.shape, strict=True)
            ):
                sizes.update(zip(axes, array.shape, strict=True))
                break
        else:
            text = " or ".join(
                "[" + ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes) + "]"
                for axes in options
            )
            raise ValueError(f"{op}: `{name}` must have shape {text}, got {list(array.shape)}.")
        empty = [axis for axis in axes if sizes[axis] == 0]
        if empty:
            raise ValueError(
                f"{op}: `{name}` must have at least one element along {', '.join(empty)}, "
                f"got shape {list(array.shape)}; skip the call for empty input."
            )
    return sizes


def check_dtypes(op: str, given: Arrays, *, complex_ok: bool) -> None:
    """Raise for integers and booleans, and for complex numbers where the op has no complex form."""
    for name, array in given.items():
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            kind = "floating point or complex" if complex_ok else "floating point"
            raise ValueError(f"{op}: `{name}` must be {kind}, got {array.dtype}; cast it first.")
        if not complex_ok and jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ValueError(
                f"{op}: `{name}` must be real, got {array.dtype}; this op has no complex form."
            )


def check_time_axes(op: str, name: str, tree: Any) -> tuple[int, int]:
    """Return (B, T) of a pytree of [B, T, ...] arrays; raise unless all leaves have the same."""
    shapes = [list(leaf.shape) for leaf in jax.tree.leaves(tree)]
    if not shapes or any(len(s) < 2 or s[:2] != shapes[0][:2] or 0 in s[:2] for s in shapes):
        raise ValueError(
            f"{op}: every leaf of `{name}` must have shape [B, T, ...] with the same B and T >= 1,"
            f" got {', '.join(map(str, shapes)) or 'none'}."
        )
    return shapes[0][0], shapes[0][1]


def check_state_tree(op: str, state: Any, name: str, tree: Any) -> Any:
    """Return the initial state as arrays; raise unless it has `tree`'s structure and [B, ...]."""
    state = jax.tree.map(jnp.asarray, state)
    wanted_tree: Any = jax.tree.structure(tree)
    if wanted_tree != jax.tree.structure(state):
        raise ValueError(
            f"{op}: `initial_state` must have the structure of `{name}`, {describe_tree(tree)}, got"
            f" {describe_tree(state)}."
        )
    wanted = [[x.shape[0], *x.shape[2:]] for x in jax.tree.leaves(tree)]
    shapes = [list(leaf.shape) for leaf in jax.tree.leaves(state)]
    if wanted != shapes:
        raise ValueError(f"{op}: `initial_state` must have shapes {wanted}, got {shapes}.")
    return state


def check_reset(op: str, reset: Any, batch: int, length: int) -> jax.Array | None:
    """Return the reset as an array; raise unless it is boolean [B, T]."""
    if reset is None:
        return None
    reset = jnp.asarray(reset)
    if reset.shape != (batch, length):
        raise ValueError(
            f"{op}: `reset` must have shape [B={batch}, T={length}], got {list(reset.shape)}."
        )
    if reset.dtype != jnp.bool_:
        raise ValueError(
            f"{op}: `reset` must be boolean, got {reset.dtype}; "
            "seqjax.segment_starts makes one from segment ids."
        )
    return reset


def check_sequence_axis(op: str, name: Any) -> None:
    """Raise unless `name` is None or a mesh axis of the `jax.shard_map` around the call."""
    if name is None:
        return
    text = f"{op}: `sequence_axis` must be a mesh axis of the jax.shard_map around the call, got"
    hint = "; call it inside jax.shard_map, or leave sequence_axis out."
    if not isinstance(name, str):
        raise ValueError(f"{text} {name!r}{hint}")
    try:
        lax.axis_size(name)
    except NameError:
        raise ValueError(f"{text} {name!r}{hint}") from None


def describe_tree(tree: Any) -> str:
    """Return a description of the outermost node of a pytree."""
    if isinstance(tree, Mapping):
        return f"a dict with the entries {sorted(map(str, tree))}"
    if isinstance(tree, tuple | list):
        return f"a {type(tree).__name__} of {len(tree)}"
    return "an array" if hasattr(tree, "shape") else type(tree).__name__


def check_positive(op: str, **given: int | None) -> None:
    """Raise for sizes that are neither positive integers nor None."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{op}: `{name}` must be a positive integer or None, got {value!r}.")


def check_block_sizes(
    op: str, given: Any, axis: str, size: int, *, unit: int, powers: bool = False
) -> tuple[int, int]:
    """Return the block sizes of a TPU kernel as a tuple of integers.

    Args:
      op: name of the op.
      given: the caller's choice, steps and elements along `axis`.
      axis: name of the second axis.
      size: its size.
      unit: the hardware tile along this axis, of which a block has a multiple or all elements.
      powers: whether the steps must be a power of two, and not only a multiple of 16.

    Raises:
      ValueError: if they are not two integers, or the kernel does not support them.
    """
    fits = False
    if isinstance(given, tuple | list) and all(type(n) is int for n in given) and len(given) == 2:
        steps, width = given
        fits = (
            steps >= 16 and steps % 16 == 0 and width >= 1 and (width % unit == 0 or width == size)
        )
        fits = fits and not (powers and steps & (steps - 1))
    if not fits:
        wanted = "a power of two from 16 on" if powers else "a multiple of 16"
        raise ValueError(
            f"{op}: `block_sizes` must be ({wanted}, a multiple of {unit} or {axis}={size}), got"
            f" {given}; leave it out to choose by shape."
        )
    return (steps, width)


def check_scale(op: str, scale: Any) -> jax.Array | None:
    """Return `scale` as an array; raise for arrays with axes and for complex numbers."""
    if scale is None:
        return None
    try:
        array = jnp.asarray(scale)
    except TypeError:
        raise ValueError(f"{op}: `scale` must be a real number, got {scale!r}.") from None
    if array.ndim or array.dtype == jnp.bool_ or jnp.iscomplexobj(array):
        raise ValueError(
            f"{op}: `scale` must be a real number or a real scalar array, got {array.dtype} of "
            f"shape {list(array.shape)}; multiply `q` by such factors."
        )
    return array


def check_state_dtype(op: str, dtype: Any, *arrays: jax.Array | None) -> None:
    """Raise unless `dtype`, that of the final state, is None or bfloat16 for real arrays."""
    if dtype is None:
        return
    is_complex = jnp.issubdtype(state_dtype(*arrays), jnp.complexfloating)
    if dtype not in (jnp.bfloat16, jnp.dtype(jnp.bfloat16), "bfloat16") or is_complex:
        wanted = "None for complex states" if is_complex else "bfloat16 or None"
        raise ValueError(f"{op}: `state_dtype` must be {wanted}, got {dtype!r}.")


def as_arrays(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as jax arrays, by name."""
    return {name: None if a is None else jnp.asarray(a) for name, a in given.items()}


def state_dtype(*arrays: jax.Array | None) -> jnp.dtype:
    """Return the dtype of states and sums: float32, or float64 if any array is; complex alike."""
    dtypes = [a.dtype for a in arrays if a is not None]
    wide = any(jnp.finfo(d).bits == 64 for d in dtypes)
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        return jnp.dtype(jnp.complex128 if wide else jnp.complex64)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def output_dtype(like: jax.Array, *others: jax.Array | None) -> jnp.dtype:
    """Return the dtype of outputs: that of `like`, or the state's if anything is complex."""
    state = state_dtype(like, *others)
    return state if jnp.issubdtype(state, jnp.complexfloating) else like.dtype
