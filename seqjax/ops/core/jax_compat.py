"""Differences between jax versions, and jax functions whose import path may change.

The library supports jax 0.10.2 and newer. Code that depends on unstable parts of jax belongs here.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = [
    "Primitive",
    "Target",
    "Zero",
    "ad",
    "avals_like",
    "batching",
    "is_split_by_compiler",
    "make_primitive",
    "mapped_avals",
    "match_varying",
    "parts",
]

Zero: Any = ad.Zero


def match_varying(*arrays: Any) -> tuple[Any, ...]:
    """Give all arrays the same varying mesh axes inside `jax.shard_map`; elsewhere do nothing.

    None stays None. The operands of loop carries and primitives must have equal varying axes, and a
    weight that all devices share does not vary where the data do.
    """
    axes: frozenset[Any] = frozenset()
    for array in arrays:
        if array is not None:
            axes |= jax.typeof(array).mat.varying
    if not axes:
        return arrays

    def cast(array: Any) -> Any:
        if array is None:
            return None
        missing = tuple(sorted(axes - jax.typeof(array).mat.varying))
        if missing and jnp.iscomplexobj(array):
            # The transpose is a sum over devices, which TPUs do not support for complex numbers
            # if the partitioner controls other axes.
            return lax.complex(*(lax.pcast(p, missing, to="varying") for p in parts(array)))
        return lax.pcast(array, missing, to="varying")

    return tuple(map(cast, arrays))


def parts(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the real and the imaginary part."""
    return lax.real(array), lax.imag(array)


class Target(NamedTuple):
    """The target of a compilation.

    Attributes:
      platform: "cpu", "tpu", "cuda", "rocm" or "other"; under ahead-of-time compilation that of the
        target, not of the host.
      partitioned: whether the compiler splits arrays over devices, which it does not support for
        kernels. It is False inside a `jax.shard_map` over all mesh axes.
      capability: the lowest compute capability of the GPUs, such as (9, 0). None on other
        platforms, in exports, and when lowered for CUDA without a GPU.
    """

    platform: str
    partitioned: bool
    capability: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The platform, or "hopper" for CUDA on GPUs of compute capability 9."""
        hopper = self.platform == "cuda" and self.capability is not None and self.capability[0] == 9
        return "hopper" if hopper else self.platform


def _is_partitioned(axis_context: Any) -> bool:
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return getattr(axis_context, "num_devices", 1) not in (None, 1)
    manual = axis_context.manual_axes | set(mesh.manual_axes)
    return manual != frozenset(mesh.axis_names)


def _capability(module: Any) -> tuple[int, int] | None:
    """Return the lowest compute capability of the GPUs that a module is compiled for, if known.

    An exported program may run on any GPU, so its capability is unknown.
    """
    if module.backend is None or module.lowering_parameters.for_export:
        return None
    devices = module.backend.devices()
    if not all(hasattr(device, "compute_capability") for device in devices):
        return None  # a CPU that lowers for CUDA
    versions = [device.compute_capability.split(".") for device in devices]
    return min((int(major), int(minor)) for major, minor in versions)


def is_split_by_compiler() -> bool:
    """Return whether the mesh around a trace leaves a split over devices to the compiler.

    Return False without a mesh: then the split is known at lowering, see `Target`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 for name, size in mesh.shape.items() if name not in mesh.manual_axes)


def avals_like(like: jax.Array, shapes: Sequence[jax.ShapeDtypeStruct]) -> tuple[Any, ...]:
    """Return types of these shapes and dtypes, with the mesh and varying axes of `like`."""
    aval = jax.typeof(like)
    return tuple([_reshaped(aval, shape.shape, shape.dtype) for shape in shapes])


def mapped_avals(avals: Sequence[Any], size: int) -> tuple[Any, ...]:
    """Return the types with a leading axis."""
    return tuple([_reshaped(aval, (size, *aval.shape), aval.dtype) for aval in avals])


def _reshaped(aval: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a type of another shape. In Auto mode its sharding has only a rank."""
    spec = jax.sharding.PartitionSpec(*(None,) * len(shape))
    sharding = aval.sharding.update(spec=spec)
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


_WIDE = ("float64", "complex128", "int64", "uint64")


def make_primitive(
    name: str,
    implementation: Callable[..., Sequence[jax.Array]],
    abstract: Callable[..., Sequence[Any]] | None = None,
    *,
    local: bool = False,
) -> Primitive:
    """Return a primitive with several results.

    Args:
      name: the name of the primitive.
      implementation: (target, *args, **params) -> the results, traced at lowering.
      abstract: (*avals, **params) -> the types of the results. By default they are the parameter
        `avals`.
      local: whether the primitive has no communication between devices. It is then compiled without
        the varying mesh axes of its operands, which the types inside a kernel do not have.

    A parameter `side_effects` lists the effects of `implementation`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    @primitive.def_effectful_abstract_eval
    def _abstract(*args: Any, **params: Any) -> tuple[Sequence[Any], Any]:
        avals = abstract(*args, **params) if abstract else list(params["avals"])
        return avals, params.get("side_effects", frozenset())

    @functools.cache
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **dict(params)))

    def eager(*args: jax.Array, **params: Any) -> Sequence[jax.Array]:
        return compiled(tuple(sorted(params.items())))(*args)

    primitive.def_impl(eager)

    def lower(platform: str, ctx: Any, *args: Any, **params: Any) -> Any:
        module = ctx.module_context
        capability = _capability(module) if platform == "cuda" else None
        target = Target(platform, _is_partitioned(module.axis_context), capability)
        run, inner = functools.partial(implementation, target), ctx
        if local:
            kind = type(ctx.avals_in[0].mat)
            inner = ctx.replace(avals_in=[a.update(manual_axis_type=kind()) for a in ctx.avals_in])
        # Mosaic for TPU has 32-bit scalars. With `jax_enable_x64`, Python numbers would be wider.
        narrow = local and platform == "tpu"
        narrow = narrow and not any(str(a.dtype) in _WIDE for a in (*ctx.avals_in, *ctx.avals_out))
        with jax.enable_x64(False) if narrow else contextlib.nullcontext():
            out = mlir.lower_fun(run, multiple_results=True)(inner, *args, **params)
        if params.get("side_effects"):
            ctx.set_tokens_out(inner.tokens_out)
        return out

    for platform in ("cpu", "tpu", "cuda", "rocm"):
        mlir.register_lowering(primitive, functools.partial(lower, platform), platform=platform)
    mlir.register_lowering(primitive, functools.partial(lower, "other"))
    return primitive
