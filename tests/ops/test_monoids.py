"""The examples of docs/guides/monoids.md against NumPy loops."""

import contextlib
import io
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.harness import assert_close

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "monoids.md"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_quickly")]


@pytest.fixture(scope="module")
def guide():
    """Run the code of the guide once, and return its names."""
    names = {}
    code = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "monoids.md", "exec", dont_inherit=True), names)
    return names


def test_kalman_filter(guide, x64):
    rng = np.random.default_rng(0)
    F, H = rng.standard_normal((3, 3)) / 2, rng.standard_normal((2, 3))
    Q, R, P = (
        z @ z.T + 0.1 * np.eye(len(z)) for z in map(rng.standard_normal, [(3, 3), (2, 2), (3, 3)])
    )
    y, mean = rng.standard_normal((2, 30, 2)), rng.standard_normal((2, 3))
    state = guide["prior"](mean, P)
    means, covariances = np.zeros((2, 30, 3)), np.zeros((2, 30, 3, 3))
    for b in range(2):
        m, S = mean[b], P
        for t in range(30):
            m, S = F @ m, F @ S @ F.T + Q
            gain = S @ H.T @ np.linalg.inv(H @ S @ H.T + R)
            m, S = m + gain @ (y[b, t] - H @ m), S - gain @ H @ S
            means[b, t], covariances[b, t] = m, S
    found = guide["kalman_filter"](F, Q, H, R, y, state)
    assert_close(found[:2], (means, covariances), 1e-11)
    # Continued from the state after 13 observations.
    *_, middle = guide["kalman_filter"](F, Q, H, R, y[:, :13], state)
    rest = guide["kalman_filter"](F, Q, H, R, y[:, 13:], middle)
    assert_close(rest[:2], (means[:, 13:], covariances[:, 13:]), 1e-11)


def test_forward_backward(guide, x64):
    """Compare with the recursions on probabilities."""
    rng = np.random.default_rng(0)
    start, transition = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4), 4)
    likelihood = rng.uniform(0.05, 1, (2, 20, 4))
    alpha, beta = np.zeros((2, 20, 4)), np.ones((2, 20, 4))
    for b in range(2):
        for t in range(20):
            before = alpha[b, t - 1] @ transition if t else start
            alpha[b, t] = before * likelihood[b, t]
        for t in reversed(range(19)):
            beta[b, t] = transition @ (likelihood[b, t + 1] * beta[b, t + 1])
    evidence = alpha[:, -1].sum(-1)
    arrays = (jnp.asarray(np.log(z)) for z in (start, transition, likelihood))
    found = guide["forward_backward"](*arrays)
    expected = alpha * beta / evidence[:, None, None]
    assert_close((np.exp(found[0]), found[1]), (expected, np.log(evidence)), 1e-12)


def test_learned_operator(guide, x64):
    rng = np.random.default_rng(0)
    x = np.exp(rng.standard_normal((2, 15, 3)))
    expected = np.cumsum(x**2.5, axis=1) ** (1 / 2.5)
    assert_close(guide["running_power_sum"](2.5, x), expected, 1e-13)
    assert_close(guide["fit"](x, expected), np.float64(2.5), 1e-3)
    assert abs(float(guide["learned"]) - 3) < 0.01
