# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A nonlinear RNN solved by Newton
#
# A linear recurrence runs in parallel because its steps compose. The steps of a classical RNN, h_t = tanh(W h_{t-1} + x_t), do not compose because of the tanh. But all steps together form one large equation, which can be *solved* for all states at once. This notebook implements the solver, shows where it fails, and explains the safeguards of seqjax.
#
# It needs the extras `flax` and `experiments` of seqjax. In Colab, the next cell installs them.

# %%
# In Colab this cell installs seqjax; elsewhere it does nothing. Before you run it in Colab, put the
# address of seqjax's git repository between the quotes of REPOSITORY. It is what you would give to
# `git clone`, such as https://HOST/OWNER/seqjax.git. After a restart, run this cell again.
import os
import subprocess
import sys

REPOSITORY = ""  # @param {type:"string"}
if "COLAB_RELEASE_TAG" in os.environ:
    if not os.path.isdir("seqjax-checkout"):
        if not REPOSITORY:
            raise ValueError(
                "REPOSITORY must be the address of seqjax's git repository, got an empty string; "
                "fill it in at the top of this cell, as you would give it to `git clone`."
            )
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "seqjax-checkout"], check=True)
        packages = "./seqjax-checkout[flax,experiments,pretrained]"
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", packages], check=True)
    if "seqjax-checkout" not in sys.path:  # also after a restart of the kernel
        sys.path.insert(0, "seqjax-checkout")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import seqjax

TINY = os.environ.get("SEQJAX_NOTEBOOK") == "tiny"  # small sizes, for tests
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## One equation for all states
#
# Collect all states in one unknown, h = (h_1, ..., h_T). The recurrence is the equation h_t - f(h_{t-1}, x_t) = 0 for every t. Newton's method starts from a guess g and replaces f by its tangent at g:
#
# $$h_t = f(g_{t-1}, x_t) + J_t\,(h_{t-1} - g_{t-1}), \qquad J_t = \partial f / \partial h \text{ at } g_{t-1}$$
#
# This is a *linear* recurrence in h, which a parallel scan solves. Its solution is the next guess (DEER, arXiv 2309.12252). With an elementwise cell, h_t = tanh(w * h_{t-1} + x_t), the Jacobians are diagonal, so `linear_scan` solves it:


# %%
def cell(w, h, x):
    return jnp.tanh(w * h + x)


def newton_step(w, guess, x):
    """Compute one Newton step for all t; guess and x are [T, D]."""
    before = jnp.pad(guess, ((1, 0), (0, 0)))[:-1]  # h_0 = 0
    value = cell(w, before, x)
    slope = (1 - value**2) * w  # the diagonal of J
    h, _ = seqjax.linear_scan(slope[None], (value - slope * before)[None])
    return h[0]


def step_by_step(w, x):
    """Compute the recurrence sequentially."""

    def step(h, x_t):
        h = cell(w, h, x_t)
        return h, h

    return jax.lax.scan(step, jnp.zeros(x.shape[1]), x)[1]


T, D = (32, 4) if TINY else (200, 8)
x = jax.random.normal(jax.random.key(0), (T, D))


def iterate(w, count):
    """Return the Newton iterates, starting at zeros, and the exact states."""
    guesses = [jnp.zeros((T, D))]
    for _ in range(count):
        guesses.append(jax.jit(newton_step)(w, guesses[-1], x))
    return np.array(guesses), np.array(step_by_step(w, x))


ITERATIONS = 4 if TINY else 8
figure, axes = plt.subplots(1, 2, figsize=(11, 3), layout="constrained", width_ratios=[3, 2])
guesses, truth = iterate(0.9, ITERATIONS)
for i, color in ((1, "0.75"), (2, "#9ecae1"), (3, "#3182bd")):
    axes[0].plot(guesses[i, :80, 0], color=color, label=f"after {i}")
axes[0].plot(truth[:80, 0], "k--", linewidth=1, label="truth")
axes[0].set(title="one channel of the iterates, w = 0.9", xlabel="t", ylabel="h")
axes[0].legend(frameon=False, ncols=4, fontsize=8, loc="lower right")
axes[0].set_ylim(-1.6, 1.2)
for w in (0.5, 0.9, 1.5):
    guesses, truth = iterate(w, ITERATIONS)
    axes[1].semilogy(np.abs(guesses - truth).max(axis=(1, 2)) + 1e-9, "o-", label=f"w = {w}")
axes[1].set(title="largest error", xlabel="iteration")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Near the solution, every iteration doubles the number of correct digits at all steps, down to rounding errors. The number of iterations depends on the strength of the recurrence, not on T. At w = 1.5, eight iterations are not enough.
#
# ## Guaranteed convergence
#
# After i iterations, at least the first i states are exact. The first state does not depend on a guess, the second depends only on the first, and so on. So Newton always converges within T iterations, but it is only useful if it needs far fewer. The next cell uses a recurrent matrix, h_t = tanh(h_{t-1} W + x_t), with random W at three scales:

# %%
SIZE, T = (4, 24) if TINY else (16, 256)
elman = seqjax.cells.Elman(SIZE)
direction = jax.random.normal(jax.random.key(1), (SIZE, SIZE)) / SIZE**0.5
u = 0.5 * jax.random.normal(jax.random.key(2), (1, T, 1, SIZE))
h0 = elman.initial_state(1)


@jax.jit
def dense_newton_step(weight, guess):
    """Compute a plain Newton step of the Elman cell; a loop solves the linear recurrence."""
    before = jnp.concatenate([h0, guess[:-1]])

    def of_step(h, x_t):
        return elman({"W": weight}, h, x_t)

    value = jax.vmap(of_step)(before, u[0])
    slope = jax.vmap(jax.jacfwd(of_step))(before, u[0])

    def solve(h, inputs):
        value_t, slope_t, before_t = inputs
        h = value_t + slope_t @ (h - before_t)
        return h, h

    return jax.lax.scan(solve, h0[0], (value, slope, before))[1]


def truth_of(weight):
    hs, _, _ = seqjax.nonlinear_scan(elman, {"W": weight}, u, h0, algorithm="sequential")
    return np.asarray(hs[0])


SCALES = (0.5, 1.0, 2.0)
COUNT = 6 if TINY else 40
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained", sharey=True)
for axis, scale in zip(axes, SCALES, strict=True):
    weight, guess = scale * direction, jnp.zeros((T, SIZE))
    truth, errors = truth_of(weight), []
    for _ in range(COUNT):
        guess = dense_newton_step(weight, guess)
        errors.append(np.abs(np.asarray(guess) - truth).max(axis=1))
    errors = np.log10(np.where(np.isfinite(errors), np.maximum(errors, 1e-7), 1e6))
    image = axis.imshow(errors, aspect="auto", cmap="magma", vmin=-7, vmax=3, origin="lower")
    axis.set(title=f"scale {scale}", xlabel="t")
axes[0].set_ylabel("iteration")
figure.colorbar(image, ax=axes, label="log10 of the error")
plt.show()

# %% [markdown]
# Black is exact. At a small scale, all states are exact after a few iterations. At a large scale, the guess *diverges* (bright). Then only the exact states at the left grow, by one or a few steps per iteration, so Newton is no faster than a sequential loop.
#
# ## Predict convergence with Lyapunov exponents
#
# Convergence depends on whether neighboring trajectories approach or separate. The largest Lyapunov exponent is the average rate per step. Below zero, an error at one step dies out a few steps later, so Newton can solve all parts of the sequence independently. Above zero, the system is chaotic: the last states depend on every detail of the first ones. `seqjax.lyapunov` measures the exponent along a trajectory, and `nonlinear_scan` reports the number of iterations:

# %%
scales = np.array([0.5, 1.5]) if TINY else np.linspace(0.25, 3.0, 12)
solve = jax.jit(lambda params: seqjax.nonlinear_scan(elman, params, u, h0, algorithm="newton"))
exponents, iterations = [], []
for scale in scales:
    params = {"W": scale * direction}
    _, _, info = solve(params)
    truth = truth_of(params["W"])[None]
    exponents.append(float(seqjax.lyapunov(elman, params, u, truth)[0]))
    iterations.append(int(info.iterations[0]))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
axes[0].plot(scales, exponents, "o-")
axes[0].axhline(0, color="k", linewidth=0.8)
axes[0].set(xlabel="scale of W", ylabel="per step", title="largest Lyapunov exponent")
axes[1].semilogy(exponents, iterations, "o", color="C3")
axes[1].axhline(T, color="k", linestyle=":", label=f"T = {T}: as many as sequential steps")
axes[1].axvline(0, color="k", linewidth=0.8)
axes[1].set(xlabel="exponent", title="iterations of seqjax's solver")
axes[1].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Safeguards
#
# The library's solver has three safeguards, listed from cheapest to most expensive:
#
# 1. *Projection*: an Elman state is in [-1, 1]. Iterates outside are projected back and passed through the cell once more. This prevents divergence to large values.
# 2. *Windows*: if Newton has not converged over all of T after a few iterations, it continues in windows of 64 steps, one after the other. Each window starts from an exact state, so errors cannot grow beyond a window.
# 3. *Sequential steps*: a window that does not converge is computed step by step.
#
# The solver then checks the result and reports the numbers of iterations and sequential steps. The next cell adds the safeguards one by one, at a scale at which plain Newton diverges. The window sizes run without iterations over all of T, to compare them alone.
#
# The bars count the iterations of all windows, so they grow as windows shrink: windows of 16 steps are four times as many as windows of 64. The *work* does not grow with them. An iteration of a window of 16 steps computes 16 steps, not T. The label of each bar states the work as the number of passes over all of T: iterations x window / T.

# %%
Newton = seqjax.Newton
limit = 8 if TINY else 64
solvers = {
    "plain": Newton(projection=False, whole_iterations=limit, window=T, max_iterations=1),
    "projection": Newton(whole_iterations=limit, window=T, max_iterations=1),
    "projection, windows of 64": Newton(whole_iterations=0, window=64),
    "projection, windows of 16": Newton(whole_iterations=0, window=16),
}
params = {"W": (1.5 if TINY else 1.75) * direction}
truth = truth_of(params["W"])
counts, notes = [], []
for solver in solvers.values():
    hs, _, info = seqjax.nonlinear_scan(
        elman, params, u, h0, algorithm="newton", solver=solver, on_failure="sequential"
    )
    iterations, walked = int(info.iterations[0]), int(info.sequential_steps[0])
    counts.append((iterations, walked))
    passes = iterations * min(solver.window, T) / T
    error = np.abs(np.asarray(hs[0]) - truth).max()
    notes.append(f"{passes:.0f} passes, error {error:.0e}")
counts = np.array(counts)
figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
axis.barh(list(solvers), counts[:, 0], color="C0", label="iterations, over all of T or a window")
ends = axis.barh(
    list(solvers), counts[:, 1], left=counts[:, 0], color="C3", label="sequential steps"
)
axis.bar_label(ends, notes, padding=4, fontsize=8)
axis.invert_yaxis()
axis.set_xlim(0, counts.sum(axis=1).max() * 1.35)
axis.legend(frameon=False, fontsize=8)
axis.set_title("all solvers return the same states")
plt.show()

# %% [markdown]
# ## Chaos
#
# Above zero, no method computes the exact trajectory, because rounding errors grow exponentially. Newton and the sequential loop find different trajectories. Both satisfy the equation of every step up to rounding.

# %%
params = {"W": 3.0 * direction}
found, _, info = seqjax.nonlinear_scan(elman, params, u, h0, algorithm="newton")
walked = truth_of(params["W"])
again, _, _ = seqjax.nonlinear_scan(
    elman, params, u, h0 + 1e-7, algorithm="sequential"
)  # sequential, from a slightly different initial state
exponent = float(seqjax.lyapunov(elman, params, u, walked[None])[0])
figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
axis.semilogy(
    np.abs(np.asarray(found[0]) - walked).max(axis=1) + 1e-9, label="Newton and sequential"
)
axis.semilogy(np.abs(np.asarray(again[0]) - walked).max(axis=1), label="sequential, from 1e-7 away")
t = np.arange(T)
axis.semilogy(t, np.minimum(1e-7 * np.exp(exponent * t), 2), "k:", label="1e-7 exp(exponent t)")
axis.set(
    xlabel="t",
    ylabel="distance of two runs",
    title=f"exponent {exponent:.2f} per step; Newton's residual {float(info.residual[0]):.0e}",
)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Gradients
#
# The gradient does not depend on the solver. It is one linear recurrence backward in time, with the exact Jacobians at the solution.

# %%
params = {"W": 0.9 * direction}


def loss(params, algorithm):
    hs, _, _ = seqjax.nonlinear_scan(elman, params, u, h0, algorithm=algorithm)
    return jnp.mean(hs**2)


by_newton = jax.grad(loss)(params, "newton")["W"]
by_walking = jax.grad(loss)(params, "sequential")["W"]
print("largest difference of the gradients:", float(jnp.abs(by_newton - by_walking).max()))
print("largest gradient:", float(jnp.abs(by_walking).max()))

# %% [markdown]
# ## When to use Newton
#
# On a CPU, use the sequential loop: it is faster, and it is the default there. On a GPU or TPU, a few iterations over all of T can be faster than T small steps if the exponent is well below zero. Measure before you decide: `info.iterations` is the number of iterations, and `python -m experiments.bench newton` measures the time.
#
# Next: from a notebook to a pod.
