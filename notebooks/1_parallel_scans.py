# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Parallel scans from scratch
#
# A recurrent network reads its input step by step, which leaves most of a GPU or TPU idle. Linear recurrences can be computed for all steps at once. This notebook derives the method and then uses the library's `linear_scan`. It ends with the linear recurrent unit (LRU), whose memory is described by points on the unit disk.
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
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import seqjax

TINY = os.environ.get("SEQJAX_NOTEBOOK") == "tiny"  # small sizes, for tests
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## What a recurrence is
#
# A linear recurrence has a state `h`. Each step multiplies the state by a decay `a` and adds an input `x`:
#
# $$h_t = a_t\, h_{t-1} + x_t$$
#
# With a constant `a` between 0 and 1, the state is an exponential moving average. The closer `a` is to 1, the longer its memory. If `a_t` depends on the input, the recurrence can choose at each step what to keep. LRU, S5, Mamba and related layers are built from this recurrence.


# %%
def loop(a, x):
    """Compute the recurrence by its definition."""
    h, states = 0.0, []
    for a_t, x_t in zip(a, x, strict=True):
        h = a_t * h + x_t
        states.append(h)
    return np.array(states)


T = 64
rng = np.random.default_rng(0)
impulses = np.zeros(T)
impulses[[5, 30, 34]] = 1.0
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for a in (0.5, 0.9, 0.98):
    left.plot(loop(np.full(T, a), impulses), label=f"a = {a}")
left.set(title="constant a: exponential memory", xlabel="t", ylabel="h")
chosen = np.full(T, 0.98)
chosen[45] = 0.0
right.plot(loop(chosen, impulses), color="C2")
right.axvline(45, color="k", linestyle=":")
right.annotate("a = 0: forget", (45, 1.6), textcoords="offset points", xytext=(6, 0))
right.set(title="a varies: 0 at t = 45, else 0.98", xlabel="t")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Why it can be computed in parallel
#
# One step is a map, `h -> a h + x`. Two steps in a row are again a map of this form:
#
# $$h \mapsto a_2 (a_1 h + x_1) + x_2 = (a_2 a_1)\, h + (a_2 x_1 + x_2)$$
#
# So steps can be *composed before the state is known*. First compose pairs of neighboring steps, then pairs of pairs. After log2(T) rounds, every position has the map from the start of the sequence to itself. Within a round, all positions are computed in parallel.


# %%
def by_doubling(a, x):
    """Compute all states in log2(T) rounds; each composes position t with t - shift."""
    shift = 1
    while shift < len(x):
        earlier_x = jnp.pad(x, (shift, 0))[:-shift]
        earlier_a = jnp.pad(a, (shift, 0), constant_values=1)[:-shift]
        x = a * earlier_x + x
        a = a * earlier_a
        shift *= 2
    return x


a, x = rng.uniform(0.8, 1, T), rng.standard_normal(T)
with jax.enable_x64(True):
    difference = np.abs(np.asarray(by_doubling(jnp.asarray(a), jnp.asarray(x))) - loop(a, x)).max()
print(f"largest difference to the loop, in float64: {difference:.1e}")

# %%
steps = 16
rounds = int(np.log2(steps))
figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
for level in range(rounds):
    for t in range(steps):
        axis.plot([t, t], [level, level + 1], color="0.8", zorder=0)
        if t >= 2**level:
            last = t == steps - 1 or (steps - 1 - t) % 2 ** (level + 1) == 0
            color, width = ("C3", 1.8) if last else ("C0", 0.9)
            axis.plot([t - 2**level, t], [level, level + 1], color=color, linewidth=width)
for level in range(rounds + 1):
    axis.scatter(range(steps), [level] * steps, s=18, color="k", zorder=2)
axis.set(
    title="each round doubles the number of composed steps; red: inputs of the last position",
    xlabel="t",
    ylabel="round",
    yticks=range(rounds + 1),
    xticks=range(steps),
)
axis.spines[["left", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# Doubling needs T log T multiplications instead of T. Better trees (Blelloch, 1990; `jax.lax.associative_scan`) need about 2 T. Both do *more* work in *fewer* rounds, which is faster on a device with thousands of otherwise idle multipliers. The next cell measures this machine:

# %%
B, T, D = (1, 64, 8) if TINY else (8, 2048, 256)
key = jax.random.key(0)
a = jax.random.uniform(key, (B, T, D), minval=0.8, maxval=1.0)
x = jax.random.normal(key, (B, T, D))


@jax.jit
def step_by_step(a, x):
    def step(h, inputs):
        a_t, x_t = inputs
        h = a_t * h + x_t
        return h, h

    _, states = jax.lax.scan(step, jnp.zeros((B, D)), (a.swapaxes(0, 1), x.swapaxes(0, 1)))
    return states.swapaxes(0, 1)


@jax.jit
def library_tree(a, x):
    def compose(early, late):
        return late[0] * early[0], late[0] * early[1] + late[1]

    return jax.lax.associative_scan(compose, (a, x), axis=1)[1]


ways = {
    "lax.scan": step_by_step,
    "doubling": jax.jit(jax.vmap(jax.vmap(by_doubling, in_axes=1, out_axes=1))),
    "associative_scan": library_tree,
    "seqjax.linear_scan": jax.jit(lambda a, x: seqjax.linear_scan(a, x)[0]),
    "(a + x, for scale)": jax.jit(jnp.add),
}
seconds = {}
for name, way in ways.items():
    way(a, x).block_until_ready()
    runs = []
    for _ in range(3 if TINY else 10):
        start = time.perf_counter()
        way(a, x).block_until_ready()
        runs.append(time.perf_counter() - start)
    seconds[name] = np.median(runs)
reference = seconds["(a + x, for scale)"]
figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
bars = axis.barh(list(seconds), [s / reference for s in seconds.values()], color="C0")
axis.bar_label(bars, fmt="%.1f", padding=3)
axis.invert_yaxis()
axis.set(title=f"time relative to a + x, on {jax.default_backend()}", xlabel="ratio")
plt.show()

# %% [markdown]
# On a CPU, a good loop is faster than the trees, because there are no idle units to use. Leave `algorithm` as `None` to choose by the platform that the program is compiled for. An explicit choice is honored, or raises an error that states the reason.
#
# ## `linear_scan`
#
# The library's version accepts batches, real or complex numbers and an initial state. `reset` clears the state at the start of a new document. All algorithms support all arguments.

# %%
decay = jnp.full((1, 60, 1), 0.95)
x = jnp.zeros((1, 60, 1)).at[0, jnp.array([3, 12, 33, 50]), 0].set(1.0)
document_ends = jnp.zeros((1, 60), bool).at[0, 30].set(True)
figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
for algorithm, style in (("sequential", "-"), ("associative", "--"), ("chunked", ":")):
    h, _ = seqjax.linear_scan(decay, x, reset=document_ends, algorithm=algorithm)
    axis.plot(h[0, :, 0], style, linewidth=2, label=algorithm)
axis.axvline(30, color="k", linewidth=0.8)
axis.text(30.5, 1.45, "reset: new document")
axis.set(xlabel="t", ylabel="h", title="three algorithms, the same result")
axis.legend(frameon=False)
plt.show()

first, state = seqjax.linear_scan(decay[:, :20], x[:, :20])
second, _ = seqjax.linear_scan(decay[:, 20:], x[:, 20:], state)
whole, _ = seqjax.linear_scan(decay, x)
print("split and resumed:", np.abs(jnp.concatenate([first, second], 1) - whole).max())

# %% [markdown]
# ## Eigenvalues on the unit disk
#
# If `h` is a vector and `a` a matrix, almost every matrix can be diagonalized over the *complex* numbers. So a layer can use one complex decay λ per channel instead of a matrix. That is the LRU (arXiv 2303.06349). A channel with λ = r exp(iθ) has a memory of about 1/(1 - r) steps and rotates by the angle θ in each step:

# %%
layer = seqjax.layers.LRU(dim=1, state_dim=8 if TINY else 32, r_min=0.8, r_max=0.99)
params = layer.init(jax.random.key(1))


def eigenvalues(params):
    """Return the λ of an LRU."""
    nu, theta = jnp.exp(params["nu_log"]), jnp.exp(params["theta_log"])
    return np.asarray(jnp.exp(-nu + 1j * theta))


def disk(axis, title):
    """Draw an empty unit disk."""
    angle = np.linspace(0, 2 * np.pi, 200)
    axis.plot(np.cos(angle), np.sin(angle), color="0.7", linewidth=1)
    axis.axhline(0, color="0.9", zorder=0)
    axis.axvline(0, color="0.9", zorder=0)
    axis.set(title=title, aspect="equal", xlabel="real", ylabel="imaginary")


figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=[1, 1, 1])
disk(axes[0], "initial λ: on a ring")
found = eigenvalues(params)
axes[0].scatter(found.real, found.imag, s=14)
for r, theta, color in ((0.9, 0.1, "C1"), (0.97, 0.5, "C2"), (0.97, 2.5, "C3")):
    value = r * np.exp(1j * theta)
    axes[0].scatter(value.real, value.imag, color=color, s=50, zorder=3)
    axes[1].plot(np.real(value ** np.arange(60)), color=color, label=f"r={r}, θ={theta}")
axes[1].set(title="impulse responses of three λ", xlabel="t")
axes[1].legend(frameon=False, fontsize=8)
radius = np.linspace(0.5, 0.999, 200)
axes[2].semilogy(radius, 1 / (1 - radius))
axes[2].set(title="memory, in steps", xlabel="r = |λ|")
plt.show()

# %% [markdown]
# ## Train the eigenvalues
#
# The task is to output the input of 20 steps ago. A single layer with a few complex decays must become a delay line. The figure below shows how its eigenvalues move.

# %%
DELAY, LENGTH, STEPS = (3, 16, 3) if TINY else (20, 128, 600)


def batch(key):
    """Return white noise, and the same noise delayed by `DELAY` steps."""
    x = jax.random.normal(key, (16, LENGTH, 1))
    return x, jnp.pad(x, ((0, 0), (DELAY, 0), (0, 0)))[:, :LENGTH]


def loss_of(params, key):
    x, wanted = batch(key)
    return jnp.mean((layer.apply(params, x)[0] - wanted) ** 2)


optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
optimizer_state = optimizer.init(params)


@jax.jit
def train_step(params, optimizer_state, key):
    loss, gradient = jax.value_and_grad(loss_of)(params, key)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state)
    return optax.apply_updates(params, updates), optimizer_state, loss


losses, path = [], [eigenvalues(params)]
for i in range(STEPS):
    params, optimizer_state, loss = train_step(params, optimizer_state, jax.random.key(i))
    losses.append(float(loss))
    path.append(eigenvalues(params))
path = np.array(path)
print(f"mean squared error: {losses[0]:.2f} at first, {np.mean(losses[-20:]):.3f} at the end")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
axes[0].semilogy(losses)
axes[0].set(title="error", xlabel="step")
disk(axes[1], "paths of the λ")
both = np.concatenate([path, path.conj()], axis=1)  # -θ and θ have the same output, Re(C h)
axes[1].plot(both.real, both.imag, color="C0", linewidth=0.6, alpha=0.5)
axes[1].scatter(both[0].real, both[0].imag, s=8, color="C0", label="start")
axes[1].scatter(both[-1].real, both[-1].imag, s=14, color="C3", label="end", zorder=3)
axes[1].legend(frameon=False, fontsize=8, loc="center")
impulse = jnp.zeros((1, LENGTH, 1)).at[0, 5].set(1.0)
response, _ = layer.apply(params, impulse)
axes[2].plot(impulse[0, :60, 0], color="0.6", label="input")
axes[2].plot(response[0, :60, 0], color="C3", label="output")
axes[2].set(title=f"response to an impulse, {DELAY} steps later", xlabel="t")
axes[2].legend(frameon=False)
plt.show()

# %% [markdown]
# A delay line must delay all frequencies equally, so the eigenvalues spread around the disk at nearly one radius. The radius is close enough to 1 to keep an input for 20 steps, and far enough from 1 to forget it afterwards.
#
# Next: five recurrences compared on a recall task. Three of them choose by their input what to keep.
