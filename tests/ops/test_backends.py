"""The backend that a call uses: the context that turns kernels off."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import seqjax

LAYER = seqjax.layers.DeltaNet(dim=8, heads=2)
PARAMS = LAYER.init(jax.random.key(0))
APPLY = jax.jit(LAYER.apply)


def program_for_tpu():
    x = jax.ShapeDtypeStruct((1, 64, 8), jnp.float32)
    return export.export(APPLY, platforms=("tpu",))(PARAMS, x).mlir_module()


def test_default_implementation_turns_kernels_off_in_a_compiled_function():
    assert "tpu_custom_call" in program_for_tpu()
    with seqjax.default_implementation("xla"):
        assert "tpu_custom_call" not in program_for_tpu()
        with seqjax.default_implementation(None):
            assert "tpu_custom_call" in program_for_tpu()
    assert "tpu_custom_call" in program_for_tpu()


def test_an_argument_has_priority_over_the_default():
    decay, x = jnp.full(4, 0.5), jnp.ones((1, 9, 4))
    with seqjax.default_implementation("xla"):
        interpreted, _ = seqjax.linear_scan(decay, x, interpret=True)
        with pytest.raises(NotImplementedError, match="there is no Pallas kernel for cpu"):
            jax.jit(lambda x: seqjax.linear_scan(decay, x, implementation="pallas"))(x)
    assert jnp.allclose(interpreted, seqjax.linear_scan(decay, x)[0], rtol=1e-5)


def test_a_default_that_is_not_supported():
    with pytest.raises(ValueError, match=r"^default_implementation: `impl.* must be 'xla'"):
        seqjax.default_implementation("pallas")
