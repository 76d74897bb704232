"""Support for meshes with Explicit axes, which `jax.make_mesh` creates by default.

On such a mesh the sharding of every array is a part of its type, and JAX raises where an operation
does not determine the sharding of its result. Ops and layers run in Auto mode instead, in which the
compiler chooses the shardings inside. Their results are Explicit again: they are split along the
batch, heads and features as the arguments are.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqjax.types import PyTree

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Arguments = Mapping[str, Any]
# (arguments by name, outputs) -> a PartitionSpec for each output
Specs = Callable[[Arguments, Any], PyTree]


def auto_inside(
    specs: Specs,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a function so that it runs in Auto mode on a mesh with Explicit axes.

    The mesh is that of `jax.set_mesh`, or else that of the arguments. Without Explicit axes the
    function is called unchanged.

    Args:
      specs: (arguments by name, outputs) -> the tree of the outputs with a `PartitionSpec` for each
        array. `spec_of` reads the spec of an argument.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            leaves, tree = jax.tree.flatten((args, kwargs))
            mesh = _explicit_mesh(leaves)
            if mesh is None:
                return function(*args, **kwargs)
            auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
            with jax.sharding.use_abstract_mesh(auto):
                inside = [
                    jax.sharding.reshard(x, P()) if isinstance(x, jax.Array) else x for x in leaves
                ]
                inner_args, inner_kwargs = jax.tree.unflatten(tree, inside)
                out = function(*inner_args, **inner_kwargs)
            wanted = specs(signature.bind(*args, **kwargs).arguments, out)
            return jax.tree.map(
                lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), out, wanted
            )

        return run

    return decorate


def auto_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh with Auto axes instead of Explicit ones."""
    kinds = (AxisType.Auto if k == AxisType.Explicit else k for k in mesh.axis_types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=tuple(kinds))


def _explicit_mesh(leaves: list[Any]) -> AbstractMesh | None:
    """Return the mesh around a call, or that of its arrays, if it has Explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        meshes = (jax.typeof(x).sharding.mesh for x in leaves if isinstance(x, jax.Array))
        mesh = next((m for m in meshes if not m.empty), mesh)
    return mesh if mesh.explicit_axes else None


def spec_of(array: Any) -> tuple[Any, ...]:
    """Return the mesh axes of each axis of an array; those of a NumPy array are None."""
    if not isinstance(array, jax.Array):
        return (None,) * np.ndim(array)
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def joined(*entries: Any) -> P:
    """Return a spec in which no mesh axis occurs twice: the first occurrence counts."""
    used: set[str] = set()
    kept = []
    for entry in entries:
        names = {entry} if isinstance(entry, str) else set(entry or ())
        kept.append(None if names & used else entry)
        used |= names
    return P(*kept)


def like_state(given: PyTree, state: PyTree, batch: Any) -> PyTree:
    """Return the specs of a new state: those of `given`, or by default split along the batch.

    The types must be equal because loops carry the state.
    """
    if not jax.tree.leaves(given):
        return jax.tree.map(lambda x: joined(batch, *(None,) * (x.ndim - 1)), state)
    return jax.tree.map(lambda x: P(*spec_of(x)), given)


def of_layer(arguments: Arguments, out: Any) -> tuple[PyTree, ...]:
    """Return the specs of a layer's (outputs, state, aux): split as its input and its state are."""
    x = arguments["x"] if "x" in arguments else arguments["x_t"]
    y, state, *aux = out
    spec = spec_of(x)
    if y.shape[: len(spec)] != np.shape(x):  # one output per sequence
        spec = spec[:1]
    outputs = joined(*spec, *(None,) * (y.ndim - len(spec)))
    state_specs = like_state(arguments.get("state"), state, spec[0])

    def of_aux(leaf: Any) -> P:
        by_sequence = leaf.ndim > 0 and leaf.shape[0] == y.shape[0]
        return joined(spec[0]) if by_sequence else P()

    return outputs, state_specs, *jax.tree.map(of_aux, aux)


def by_axes(patterns: Mapping[str, str], output: str, state: str) -> Specs:
    """Return the specs of an op (output, final state) from patterns in the form of `check_shapes`.

    An axis of a result is split as the first argument that has the axis split, by name.
    """

    def specs(arguments: Arguments, out: Any) -> tuple[P, P]:
        entries: dict[str, Any] = {}
        for name, pattern in patterns.items():
            spec = spec_of(arguments.get(name))
            for axes in (option.split() for option in pattern.split("|")):
                if len(axes) == len(spec):
                    for axis, entry in zip(axes, spec, strict=True):
                        entries[axis] = entries.get(axis) or entry
        output_spec, state_spec = (
            joined(*(entries.get(axis) for axis in axes.split())) for axes in (output, state)
        )
        given = arguments.get("initial_state")
        return output_spec, state_spec if given is None else P(*spec_of(given))

    return specs
