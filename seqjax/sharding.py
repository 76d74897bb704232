"""Sharding: meshes, partition rules, and the shardings of a training step.

`jax.jit` with `NamedSharding` splits the batch, parameters and features over the axes `data`,
`fsdp` and `tensor`. `jax.shard_map` splits time over the axis `sequence`; the model is then called
with `sequence_axis="sequence"`.

Example:
  >>> import jax, seqjax
  >>> from seqjax import sharding
  >>> backbone = seqjax.models.Backbone(seqjax.layers.LRU(dim=8), depth=2)
  >>> model = seqjax.models.LanguageModel(vocab_size=16, backbone=backbone)
  >>> mesh = sharding.make_mesh("fsdp=1,sequence=1", devices=jax.devices()[:1])
  >>> plan = sharding.shard(model, mesh, batch_shape=(4, 32))
  >>> params = jax.jit(model.init, out_shardings=plan.params)(jax.random.key(0))
  >>> [tuple(where.spec) for where in (plan.params["embedding"], plan.batch)]
  [('tensor', 'fsdp'), (('data', 'fsdp'), 'sequence')]
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqjax.layers import Layer
from seqjax.models import Backbone
from seqjax.ops.core import explicit_mesh

Model = TypeVar("Model", bound=Layer)

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")
# Logical axis of a parameter -> mesh axis. Axes without a rule are not split. If two axes of a
# parameter map to the same mesh axis, the first is split. Embedding tables are stored split over
# the vocabulary and gathered before use. Heads of keys and values that several query heads share
# are not split if the mesh axis does not divide their number. The axis "experts" of a mixture has
# no rule: its experts are split along "mlp". For expert parallelism add {"experts": "tensor"}.
RULES: Mapping[str, str] = MappingProxyType(
    {
        "embed": "fsdp",
        "vocab": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "state": "tensor",
    }
)


@dataclasses.dataclass(frozen=True)
class Shardings:
    """The shardings of a training step's arrays.

    Attributes:
      mesh: the mesh.
      params: a `NamedSharding` for each parameter.
      optimizer: a `NamedSharding` for each array of the optimizer state; None without a state.
      batch: the sharding of arrays [B, T].
      replicated: the sharding of arrays of which every device holds a full copy.
    """

    mesh: Mesh
    params: Any
    optimizer: Any
    batch: NamedSharding
    replicated: NamedSharding


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Return the size of each axis from a text such as "data=2,fsdp=4".

    Args:
      text: axes and their sizes. Missing axes have size 1. A size of -1 stands for the number of
        remaining devices.
      devices: the number of devices, which must be the product of the sizes.

    Raises:
      ValueError: if an axis is unknown, a size is not an integer, or the product does not fit.

    Example:
      >>> parse_mesh("data=-1,sequence=2", devices=8)
      {'data': 4, 'fsdp': 1, 'tensor': 1, 'sequence': 2}
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ValueError(f"mesh: unknown axis {name!r}; write {', '.join(AXES)}, as in data=2.")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(f"mesh: {part!r} must be an axis and an integer, as data=2.") from None
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh: sizes must be at least 1, with at most one -1, got {text!r}.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed == 0 and free:
        sizes[free[0]] = devices // fixed
    elif fixed != devices or free:
        others = fixed // sizes["data"] if not free else fixed
        raise ValueError(
            f"mesh: {text!r} requires {'a multiple of ' if free else ''}{fixed} devices, got"
            f" {devices}; "
            + (
                f"data={devices // others} would fit."
                if devices % others == 0 and not free
                else f"a product that divides {devices} would fit: {_both(fixed, devices)}."
            )
        )
    return sizes


def make_mesh(
    sizes: str | Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    *,
    axis_types: AxisType = AxisType.Auto,
) -> Mesh:
    """Make a mesh with the axes data, fsdp, tensor and sequence.

    On Auto axes, the default, the compiler chooses the shardings that are not specified.
    `jax.make_mesh` creates Explicit axes by default, on which every array's type has its sharding.
    All functions of this module accept both. The rules below shard the batch and the parameters
    over the same axis `fsdp`. On Explicit axes JAX rejects products of two such arrays, so the
    default here is Auto. Models accept them on both. Your own functions of parameters may
    fail on Explicit axes.

    Neighbors on the mesh are close to each other on a TPU's torus, whose axes are split where the
    sizes require it. The network between slices (by default hosts, on GPUs) is slow. The mesh axes
    data, fsdp, sequence and tensor cross it, in this order, as far as their sizes have common
    factors with the number of slices. If the size of `data` is the number of slices, only the sum
    of gradients crosses it.

    Args:
      sizes: sizes of the axes, as a mapping or a text; see `parse_mesh`.
      devices: the devices; by default all.
      axis_types: the type of all axes, `AxisType.Auto` or `AxisType.Explicit`.

    Raises:
      ValueError: see `parse_mesh`; or if slices have different sizes, or the devices do not form a
        part of the torus that fits the mesh.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not isinstance(sizes, str):
        sizes = ",".join(f"{name}={size}" for name, size in sizes.items())
    parsed = parse_mesh(sizes, len(devices))
    return Mesh(_placed(parsed, devices), AXES, axis_types=(axis_types,) * len(AXES))


def _placed(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices in the order of the mesh.

    `jax.make_mesh` supports one slice only, and splits an axis of the torus on some generations of
    TPU only. On a v5p:4x4x4 it cannot make the mesh fsdp=8,sequence=8.
    """
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(set(slices.values())) > 1:
        raise ValueError(
            f"mesh: all slices must have equally many devices: of {len(slices)} slices there are"
            f" {', '.join(map(str, slices.values()))} devices; take equally many of each."
        )
    within, across, left = dict(sizes), dict.fromkeys(AXES, 1), len(slices)
    for name in (*BATCH_AXES, "sequence", "tensor"):
        across[name] = math.gcd(within[name], left)
        within[name] //= across[name]
        left //= across[name]
    try:
        if len(slices) == 1:
            return mesh_utils.create_device_mesh(
                tuple(within.values()), devices, allow_split_physical_axes=True
            )
        return mesh_utils.create_hybrid_device_mesh(
            tuple(within.values()),
            tuple(across.values()),
            devices,
            allow_split_physical_axes=True,
        )
    except (AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"mesh: {len(devices)} devices cannot be laid out as {tuple(sizes.values())}: {error};"
            " use all devices of a slice, or other sizes."
        ) from error


def shard(
    model: Layer,
    mesh: Mesh,
    *,
    batch_shape: tuple[int, int] | None = None,
    optimizer_state: Any = None,
    rules: Mapping[str, str] = RULES,
) -> Shardings:
    """Return the shardings of a training step for a model and a mesh.

    Args:
      model: a model or a layer.
      mesh: from `make_mesh`.
      batch_shape: (B, T), to be checked against the mesh; by default not checked.
      optimizer_state: the optimizer's state, or its shapes (`jax.eval_shape`). Arrays that belong
        to a parameter get the sharding of that parameter, for any optimizer. All other arrays are
        replicated.
      rules: logical axis -> mesh axis.

    Raises:
      ValueError: if the mesh does not divide the batch, the length, the heads or a parameter. The
        message contains the numbers and the nearest valid ones.
    """
    _check_heads(model, mesh.shape["tensor"] if "heads" in rules else 1)
    specs = param_specs(model, mesh, rules)
    if batch_shape is not None:
        over = math.prod(mesh.shape[name] for name in BATCH_AXES)
        _check("the batch", batch_shape[0], "data * fsdp", over)
        _check("the length", batch_shape[1], "sequence", mesh.shape["sequence"])

    def sharding(spec: P) -> NamedSharding:
        return NamedSharding(mesh, spec)

    replicated = sharding(P())
    params = jax.tree.map(sharding, specs, is_leaf=lambda leaf: isinstance(leaf, P))
    optimizer = None
    if optimizer_state is not None:
        optimizer = _like_params(optimizer_state, params, model, replicated)
    return Shardings(mesh, params, optimizer, sharding(P(BATCH_AXES, "sequence")), replicated)


def param_specs(model: Layer, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Any:
    """Return a `PartitionSpec` for each parameter, from its logical axes.

    Raises:
      ValueError: if the mesh does not divide an axis that the rules split.
    """

    shared = rules.get("kv_heads")
    whole = set() if shared is None else set(_whole_heads(model, mesh.shape[shared]))

    def spec(path: Any, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> P:
        taken: list[str | None] = []
        kept = "kv_heads" if tuple(entry.key for entry in path) in whole else None
        for axis, size in zip(axes, shape, strict=True):
            to = rules.get(axis) if axis not in (None, kept) else None
            to = None if to in taken else to
            if to is not None:
                where = f"{jax.tree_util.keystr(path, simple=True, separator='.')} ({axis})"
                _check(where, size, to, mesh.shape[to])
            taken.append(to)
        return P(*taken)

    return jax.tree_util.tree_map_with_path(
        spec,
        model.param_axes(),
        model.param_shapes(),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def _whole_heads(layer: Layer, over: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of parameters whose heads of keys and values cannot be split over devices."""
    inner: Any = layer
    while isinstance(getattr(inner, "layer", None), Layer):  # a wrapper with the same parameters
        inner = inner.layer
    for name, entry in inner.declare_params().items():
        if isinstance(entry, Layer):
            yield from _whole_heads(entry, over, (*path, name))
        elif "kv_heads" in entry.axes and inner.groups % over:
            yield (*path, name)


def split_time(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Return `function(*args, sequence_axis=...)` with time split over the mesh axis `sequence`.

    Only the axis `sequence` is manual. Inside, the partitioner still splits batch and parameters
    over the other axes. If the mesh has no such axis, the function is called unchanged with
    `sequence_axis=None`.

    On a mesh with Explicit axes the function runs in Auto mode. Its results are Explicit again,
    with the sharding of `out_specs`, which splits no axis but `sequence`.

    Args:
      function: a function with a keyword argument `sequence_axis`.
      mesh: from `make_mesh`; None for a single device.
      in_specs, out_specs: as in `jax.shard_map`; they may name "sequence" only.
    """
    split: Callable[..., Any]
    if mesh is None or mesh.shape.get("sequence", 1) == 1:
        split = functools.partial(function, sequence_axis=None)
    else:
        split = jax.shard_map(
            lambda *args: function(*args, sequence_axis="sequence"),
            mesh=explicit_mesh.auto_mesh(mesh),
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={"sequence"},
        )
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return split
    specs = functools.partial(jax.tree.broadcast, out_specs, is_leaf=lambda x: isinstance(x, P))
    # Outside `jax.shard_map`, because JAX cannot differentiate a change of mode inside it.
    return explicit_mesh.auto_inside(lambda _, out: specs(out))(split)


def constrain_activations(
    model: Model, mesh: Mesh | None, rules: Mapping[str, str] = RULES
) -> Model:
    """Return the model with its residual stream sharded along the batch.

    Without the constraint the partitioner may split features, like the parameters, which can be
    slower. If `mesh` is None, return the model unchanged.

    Args:
      model: a frozen dataclass with a `backbone`, or a `Backbone`.
      mesh: from `make_mesh`.
      rules: logical axis -> mesh axis.
    """
    if mesh is None:
        return model
    if isinstance(model, Backbone):
        return dataclasses.replace(model, constrain=_Constraint(mesh, tuple(sorted(rules.items()))))
    inner: Any = model
    return dataclasses.replace(inner, backbone=constrain_activations(inner.backbone, mesh, rules))


@dataclasses.dataclass(frozen=True)
class _Constraint:
    """A sharding constraint on arrays with logical axes."""

    mesh: Mesh
    rules: tuple[tuple[str, str], ...]

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        mesh_axes: dict[str | None, Any] = {**dict(self.rules), "batch": BATCH_AXES}
        # Inside `shard_map` use the current mesh, where the axis `sequence` is manual.
        around = jax.sharding.get_abstract_mesh()
        mesh = explicit_mesh.auto_mesh(self.mesh) if around.empty else around
        where = NamedSharding(mesh, P(*map(mesh_axes.get, axes)))
        return jax.lax.with_sharding_constraint(x, where)


def _like_params(state: Any, params: Any, model: Layer, replicated: NamedSharding) -> Any:
    """Return the shardings of a tree that contains trees of parameters at any depth."""
    shardings = {
        tuple(map(str, path)): (leaf, shape)
        for (path, leaf), shape in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(model.param_shapes(), is_leaf=lambda leaf: isinstance(leaf, tuple)),
            strict=True,
        )
    }

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(map(str, path))
        for start in range(len(names)):
            found = shardings.get(names[start:])
            if found is not None and found[1] == tuple(leaf.shape):
                return found[0]
        return replicated

    return jax.tree_util.tree_map_with_path(sharding, state)


def _check_heads(layer: Layer, over: int) -> None:
    heads = getattr(layer, "heads", None)
    if heads is not None:
        _check(f"{type(layer).__name__}: heads", heads, "tensor", over)
    for entry in layer.declare_params().values():
        if isinstance(entry, Layer):
            _check_heads(entry, over)


def _check(what: str, size: int, axis: str, over: int) -> None:
    if size % over == 0:
        return
    low = size - size % over
    near = f"{low} or {low + over}" if low else f"{over}"
    raise ValueError(
        f"sharding: {what} {size} cannot be split over {axis} = {over}; take {near}, or"
        f" {axis} = {_both(over, size)}."
    )


def _both(wanted: int, size: int) -> str:
    """Return the nearest divisors of `size` below and above `wanted`."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    return " or ".join(map(str, below + [d for d in divisors if d > wanted][:1]))
