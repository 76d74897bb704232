"""What differs between jax versions, or is reached through names jax may still move.

The library runs on jax 0.10.2 and newer; everything that would break first sits here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["Primitive", "Zero", "ad", "batching", "make_primitive", "match_varying", "parts"]

Zero: Any = ad.Zero


def match_varying(*arrays: Any) -> tuple[Any, ...]:
    """Give all arrays the same varying mesh axes inside `jax.shard_map`; elsewhere do nothing.

    None stays None. Loop carries and primitives need operands that agree on them, and a weight
    shared by all devices does not vary where the data do.
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
            # The transpose is a sum over devices, which TPUs cannot take of complex numbers where
            # other axes are the partitioner's.
            return lax.complex(*(lax.pcast(p, missing, to="varying") for p in parts(array)))
        return lax.pcast(array, missing, to="varying")

    return tuple(map(cast, arrays))


def parts(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The real and the imaginary part."""
    return lax.real(array), lax.imag(array)


def make_primitive(
    name: str,
    implementation: Callable[..., Sequence[jax.Array]],
    abstract: Callable[..., Sequence[Any]],
) -> Primitive:
    """A primitive with several results, compiled from `implementation(platform, *args, **params)`.

    The platform is the one being compiled for, which under ahead-of-time compilation is not the
    host's.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)

    @functools.cache
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **dict(params)))

    def eager(*args: jax.Array, **params: Any) -> Sequence[jax.Array]:
        return compiled(tuple(sorted(params.items())))(*args)

    primitive.def_impl(eager)
    for platform in ("cpu", "tpu", "cuda", "rocm"):
        rule = mlir.lower_fun(functools.partial(implementation, platform), multiple_results=True)
        mlir.register_lowering(primitive, rule, platform=platform)
    mlir.register_lowering(
        primitive, mlir.lower_fun(functools.partial(implementation, "other"), multiple_results=True)
    )
    return primitive
