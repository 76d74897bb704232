"""Checks of the arguments of layers. An error is one line: argument, requirement, value, hint."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.ops.core.checks import check_sequence_axis, describe_tree

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


class _Layer(Protocol):
    def __hash__(self) -> int: ...

    def param_shapes(self) -> dict[str, Any]: ...

    def make_state(self, batch: int, dtype: Any, /) -> Any: ...


def positive(layer: object, **values: int) -> None:
    """Raise unless each value is an integer >= 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{type(layer).__name__}: `{name}` must be an integer >= 1, got {value!r}."
            )


def above_zero(layer: object, **values: float) -> None:
    """Raise a ValueError unless the numbers are greater than zero."""
    for name, value in values.items():
        require(layer, value > 0, f"`{name}` must be > 0, got {value}.")


def one_of(layer: object, name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    require(
        layer,
        value in choices,
        f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.",
    )


def require(layer: object, condition: bool, message: str) -> None:
    """Raise a ValueError that starts with the layer's name unless the condition holds."""
    if not condition:
        raise ValueError(f"{type(layer).__name__}: {message}")


def head_dim(layer: object, dim: int, heads: int, given: int | None) -> int:
    """Return the features per head: `given`, or `dim` split evenly if it is None."""
    positive(layer, dim=dim, heads=heads)
    if given is not None:
        positive(layer, head_dim=given)
        return given
    require(
        layer,
        dim % heads == 0,
        f"`dim` must be a multiple of `heads` without a `head_dim`, got dim={dim}, heads={heads};"
        " pass head_dim.",
    )
    return dim // heads


def float_dtype(layer: object, dtype: Any) -> jnp.dtype:
    """Return the dtype as an object; raise unless layers support it."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    require(
        layer,
        name in FLOAT_DTYPES,
        f"`dtype` must be one of {', '.join(FLOAT_DTYPES)}, got {name}.",
    )
    return jnp.dtype(name)


def array(layer: object, name: str, value: Any) -> jax.Array:
    """Return the value as an array; raise if it is not one, such as a tree of parameters."""
    if isinstance(value, Mapping):
        raise ValueError(
            f"{type(layer).__name__}: `{name}` must be an array, got a dict; the order of arguments"
            f" is (params, {name}, state, reset)."
        )
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{type(layer).__name__}: `{name}` must be an array, got {type(value).__name__}."
        ) from None


def key(layer: object, value: Any) -> None:
    """Raise unless the value is one `jax.random` key, typed or raw."""
    hint = "make one with jax.random.key(0)."
    if not isinstance(value, jax.Array | np.ndarray):
        kind = f"{value!r}" if isinstance(value, int) else type(value).__name__
        require(layer, False, f"`key` must be a jax.random key, got {kind}; {hint}")
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    require(
        layer,
        value.ndim == 0 if typed else value.ndim == 1 and value.dtype == jnp.uint32,
        f"`key` must be one jax.random key, got {value.dtype} of shape {list(value.shape)}; {hint}",
    )


def sequence_axis(layer: object, name: Any) -> None:
    """Raise unless `name` is None or a mesh axis of the `jax.shard_map` around the call."""
    check_sequence_axis(type(layer).__name__, name)


def batch_size(layer: object, value: int) -> None:
    """Raise unless the batch size is an integer >= 1."""
    positive(layer, batch_size=value)


def features(layer: object, x: jax.Array, dim: int, one_step: bool) -> None:
    """Raise unless `x` is floating [B, T, dim], or [B, dim] for one step."""
    name, wanted = ("x_t", f"[B, {dim}]") if one_step else ("x", f"[B, T, {dim}]")
    require(
        layer,
        x.ndim == (2 if one_step else 3) and x.shape[-1] == dim,
        f"`{name}` must have shape {wanted}, got {list(x.shape)}.",
    )
    require(
        layer,
        x.dtype.name in FLOAT_DTYPES,
        f"`{name}` must have the dtype {' or '.join(FLOAT_DTYPES)}, got {x.dtype.name};"
        f" cast it, e.g. {name}.astype(jnp.float32).",
    )
    _not_empty(layer, name, x)


def tokens(layer: object, x: jax.Array, one_step: bool) -> None:
    """Raise unless `x` is an integer array [B, T], or [B] for one step."""
    name, wanted = ("token", "[B]") if one_step else ("tokens", "[B, T]")
    require(
        layer,
        x.ndim == (1 if one_step else 2),
        f"`{name}` must have shape {wanted}, got {list(x.shape)}.",
    )
    require(
        layer,
        jnp.issubdtype(x.dtype, jnp.integer),
        f"`{name}` must be integers, got {x.dtype.name}; cast with .astype(jnp.int32).",
    )
    _not_empty(layer, name, x)


def in_vocabulary(layer: object, x: jax.Array, vocab_size: int, mask: Any = None) -> None:
    """Raise if a token lies outside the vocabulary, for concrete arrays on this process.

    The values of traced arrays, and of arrays on other processes, are not available. Tokens where
    `mask` is False may have any value.
    """
    arrays = [x] if mask is None else [x, mask]
    if any(isinstance(a, jax.core.Tracer) or not a.is_fully_addressable for a in arrays):
        return
    values, *masks = (np.asarray(a) for a in arrays)
    bad = (values < 0) | (values >= vocab_size)
    bad = bad & masks[0] if masks else bad
    if bad.any():
        require(
            layer,
            False,
            f"`tokens` must be from 0 to vocab_size - 1 = {vocab_size - 1}, got {values[bad][0]};"
            " check the tokenizer, or mask padding.",
        )


def reset(layer: object, value: jax.Array, wanted: tuple[int, ...]) -> None:
    """Raise unless `reset` is bool of the wanted shape."""
    boolean(layer, "reset", value, wanted)


def boolean(layer: object, name: str, value: jax.Array, wanted: tuple[int, ...]) -> None:
    """Raise unless the array is bool of the wanted shape."""
    require(
        layer,
        value.shape == wanted and value.dtype == jnp.bool_,
        f"`{name}` must be bool of shape {list(wanted)}, got {value.dtype.name}"
        f" of shape {list(value.shape)}.",
    )


def params(layer: _Layer, given: Any) -> None:
    """Raise unless `given` has the names and shapes of the parameters from `layer.init`."""
    _compare_params(layer, _param_shapes(layer), given, "params")


def state(layer: _Layer, given: Any, batch: int, dtype: Any) -> None:
    """Raise unless `given` has the structure, shapes and dtypes of the layer's state."""
    wanted = _state_spec(layer, batch, jnp.dtype(dtype).name)
    hint = f"start from layer.initial_state({batch}, dtype) or pass a state that apply returned."
    _compare_trees(layer, wanted, given, "state", hint)
    for (path, want), leaf in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(given), strict=True
    ):
        shape, leaf_dtype = jnp.shape(leaf), jnp.result_type(leaf)
        require(
            layer,
            shape == want.shape and leaf_dtype == want.dtype,
            f"`state{jax.tree_util.keystr(path)}` must be {want.dtype.name} of shape"
            f" {list(want.shape)}, got {leaf_dtype.name} of shape {list(shape)}; {hint}",
        )


def _compare_trees(layer: object, wanted: Any, given: Any, path: str, hint: str) -> None:
    """Raise at the first node where a state differs in structure."""
    names: list[Any] = []
    if isinstance(wanted, Mapping):
        names, same = list(wanted), isinstance(given, Mapping) and set(given) == set(wanted)
    elif isinstance(wanted, tuple | list):
        names = list(range(len(wanted)))
        same = isinstance(given, type(wanted)) and len(given) == len(wanted)
    elif jax.tree_util.all_leaves([wanted]):
        same = jax.tree_util.all_leaves([given])
    else:
        wanted_tree: Any = jax.tree.structure(wanted)
        same = wanted_tree == jax.tree.structure(given)
    text = f"`{path}` must be {describe_tree(wanted)}, got {describe_tree(given)}; {hint}"
    require(layer, same, text)
    for name in names:
        _compare_trees(layer, wanted[name], given[name], f"{path}[{name!r}]", hint)


def _not_empty(layer: object, name: str, x: jax.Array) -> None:
    require(
        layer,
        0 not in x.shape,
        f"`{name}` must have B >= 1 and T >= 1, got shape {list(x.shape)}.",
    )


def has_state(layer: _Layer) -> bool:
    """Return whether the layer carries a state from step to step."""
    return bool(jax.tree.leaves(_state_spec(layer, 1, "float32")))


@functools.lru_cache(maxsize=1024)
def _param_shapes(layer: _Layer) -> dict[str, Any]:
    return layer.param_shapes()


@functools.lru_cache(maxsize=1024)
def _state_spec(layer: _Layer, batch: int, dtype: str) -> Any:
    return jax.eval_shape(lambda: layer.make_state(batch, jnp.dtype(dtype)))


def _compare_params(layer: object, wanted: Any, given: Any, path: str) -> None:
    hint = "make params with layer.init(key)."
    if isinstance(wanted, tuple):
        require(
            layer,
            hasattr(given, "shape") and tuple(given.shape) == wanted,
            f"`{path}` must be an array of shape {list(wanted)}, got"
            f" {list(given.shape) if hasattr(given, 'shape') else type(given).__name__}; {hint}",
        )
        require(
            layer,
            given.dtype.name in FLOAT_DTYPES,
            f"`{path}` must be floating, got {given.dtype.name}; {hint}",
        )
        return
    require(
        layer,
        isinstance(given, Mapping) and set(given) == set(wanted),
        f"`{path}` must be a dict with the entries {sorted(wanted)}, got"
        f" {sorted(given) if isinstance(given, Mapping) else type(given).__name__}; {hint}",
    )
    for name, entry in wanted.items():
        _compare_params(layer, entry, given[name], f"{path}[{name!r}]")
