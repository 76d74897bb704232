"""Array types of the signatures: a dtype and the names of the axes.

`B T H K V D N` are batch, time, heads, key, value, features and state size. Annotations are not
checked at run time; the tests check them.
"""

from typing import Any, TypeAlias

from jax import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Inexact as Inexact
from jaxtyping import Integer as Integer

PyTree: TypeAlias = Any
Reset: TypeAlias = Bool[Array, "B T"]
