"""Initial values and argument checks of the layers with exponential gates and their relatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.layers import (
    MLSTM,
    RWKV4,
    SRWM,
    DeltaRNN,
    LightNet,
    LogLinearAttention,
    MesaNet,
    RecurrentDeltaNet,
)


def start(layer):
    return layer.init(jax.random.key(0))


@pytest.mark.slow
def test_gates_of_mlstm():
    xlstm, large = start(MLSTM(8, 4)), start(MLSTM(8, 4, variant="7b"))
    for params in (xlstm, large):
        np.testing.assert_allclose(params["fgate_bias"], [3, 4, 5, 6])
    assert not xlstm["igate_proj"].any()
    assert not xlstm["fgate_proj"].any()
    assert (np.abs(xlstm["igate_bias"]) < 0.5).all()
    np.testing.assert_array_equal(large["igate_bias"], -10)


def test_values_of_rwkv4_by_block():
    dim, block, depth = 6, 1, 4
    params = start(RWKV4(dim, block, depth, zero_init=True))
    i, rise, fall = np.arange(dim), block / (depth - 1), 1 - block / depth
    np.testing.assert_allclose(1 - params["x_k"], (i / dim) ** fall, rtol=1e-5)
    np.testing.assert_allclose(1 - params["x_v"], (i / dim) ** fall + 0.3 * rise, rtol=1e-5)
    np.testing.assert_allclose(1 - params["x_r"], (i / dim) ** (0.5 * fall), rtol=1e-5)
    present = start(RWKV4(dim, block, depth, present_share=True))
    for name in ("x_k", "x_v", "x_r"):
        np.testing.assert_allclose(1 - present[name], params[name], rtol=1e-5)
    omega = -5 + 8 * (i / (dim - 1)) ** (0.7 + 1.3 * rise)
    np.testing.assert_allclose(params["omega"], omega, rtol=1e-5)
    np.testing.assert_allclose(params["bonus"], np.log(0.3) + 0.5 * ((i + 1) % 3 - 1), rtol=1e-5)
    for name in ("key_proj", "receptance_proj", "out_proj"):
        assert not params[name].any()
    value = params["value_proj"]
    np.testing.assert_allclose(value @ value.T, np.eye(dim), atol=1e-5)


@pytest.mark.slow
def test_other_starts():
    mesa = start(MesaNet(8, 2))
    np.testing.assert_allclose(jax.nn.softplus(mesa["ridge"]) + 0.25, 1, rtol=1e-6)
    beta = start(SRWM(256, 2))["beta_proj"]
    assert abs(float(beta.mean()) + 1) < 0.02
    assert abs(float(beta.std()) - 128**-0.5) < 0.01
    levels = start(LogLinearAttention(8, 4))
    np.testing.assert_allclose(jnp.exp(levels["A_log"]), [1, 2, 3, 4], rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        (MLSTM, {"variant": "8b"}, "`variant` must be one of 'xlstm', '7b', 'sig', got '8b'"),
        (MLSTM, {"normalizer": True}, "`normalizer` must be False for variant='xlstm'"),
        (MLSTM, {"heads": 5}, "`expand` [*] dim must be a multiple of `heads`, got 16 and 5"),
        (MLSTM, {"block": 3}, "`expand` [*] dim must be a multiple of `block`, got 16 and 3"),
        (MLSTM, {"variant": "7b", "heads": 8}, "`expand_k [*] dim` must be a positive multiple"),
        (
            MLSTM,
            {"variant": "7b", "expand_v": 0.3},
            "`expand_v [*] dim` must be a positive multiple",
        ),
        (MLSTM, {"variant": "sig", "denominator_eps": 1e-6}, "`denominator_eps` must be >= 0, and"),
        (MLSTM, {"variant": "sig", "zero_maximum": True}, "`zero_maximum` must be False for"),
        (MLSTM, {"gate_cap": 0.0}, "`gate_cap` must be > 0, got 0.0"),
        (LightNet, {"gate_rank": 0}, "`gate_rank` must be an integer >= 1, got 0"),
        (MesaNet, {"iterations": 0}, "`iterations` must be an integer >= 1, got 0"),
        (SRWM, {"heads": 3}, "`dim` must be a multiple of `heads`"),
        (RecurrentDeltaNet, {"heads": 3}, "`dim` must be a multiple of `heads`"),
        (DeltaRNN, {"head_dim": 0}, "`head_dim` must be an integer >= 1, got 0"),
        (LogLinearAttention, {"levels": 25}, "`levels` must satisfy 2 <= levels <= 24, got 25"),
        (LogLinearAttention, {"rule": "hebb"}, "`rule` must be one of 'decay', 'delta'"),
    ],
)
def test_arguments_are_checked(layer, fields, message):
    with pytest.raises(ValueError, match=f"^{layer.__name__}: {message}"):
        layer(**{"dim": 8, "heads": 2, **fields})


@pytest.mark.parametrize(
    ("variant", "unused"),
    [
        *(("xlstm", name) for name in ("expand_k", "expand_v", "gate_cap")),
        *(("7b", "expand"), ("7b", "block"), ("sig", "conv_size")),
    ],
)
def test_mlstm_refuses_arguments_of_another_variant(variant, unused):
    with pytest.raises(ValueError, match=f"^MLSTM: `{unused}` must be .* for variant='{variant}'"):
        MLSTM(8, 2, variant=variant, **{unused: 8})
