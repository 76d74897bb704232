# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Parallel scans from scratch
#
# A recurrent network reads its input step after step, and a GPU or TPU hates waiting. Yet the simplest recurrences can be computed for all steps at once. This notebook builds that trick from nothing, then uses the library's `linear_scan`, and ends with the linear recurrent unit (LRU), whose whole memory can be seen as points on a disk.

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
        packages = "./seqjax-checkout[flax,experiments]"
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

TINY = os.environ.get("SEQJAX_NOTEBOOK") == "tiny"  # as the tests run it
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## What a recurrence is
#
# A linear recurrence keeps a state `h`. Each step it forgets a part of it and adds something new:
#
# $$h_t = a_t\, h_{t-1} + x_t$$
#
# With a constant `a` between 0 and 1 this is an exponential moving average; how long it remembers depends on how close `a` is to 1. With an `a_t` that depends on the input it can decide, step by step, what to keep. LRU, S5, Mamba and their relatives are all made of this.


# %%
def loop(a, x):
    """The definition."""
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
left.set(title="a constant: an exponential memory", xlabel="t", ylabel="h")
chosen = np.full(T, 0.98)
chosen[45] = 0.0
right.plot(loop(chosen, impulses), color="C2")
right.axvline(45, color="k", linestyle=":")
right.annotate("a = 0: forget", (45, 1.6), textcoords="offset points", xytext=(6, 0))
right.set(title="a chosen at every step: 0.98, but once 0", xlabel="t")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Why it can be computed in parallel
#
# One step is a map, `h -> a h + x`. Two steps, one after the other, are again a map of the same kind:
#
# $$h \mapsto a_2 (a_1 h + x_1) + x_2 = (a_2 a_1)\, h + (a_2 x_1 + x_2)$$
#
# So steps can be *composed before the state is known*. Compose neighbours, then neighbours of neighbours, and after log2(T) rounds every position holds the map that leads from the beginning to itself. In each round all positions work at the same time.


# %%
def by_doubling(a, x):
    """All states in log2(T) rounds: position t takes in what position t - shift has found."""
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
    title="every round doubles how far back each step has seen; in red, how the last one sees all",
    xlabel="t",
    ylabel="round",
    yticks=range(rounds + 1),
    xticks=range(steps),
)
axis.spines[["left", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# Doubling does T log T multiplications instead of T. Cleverer trees (Blelloch, 1990; `jax.lax.associative_scan`) do about 2 T. Either way it is *more* work in *fewer* rounds, which pays where thousands of multipliers would otherwise stand idle. Here is what this machine says, whatever it is:

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
axis.set(title=f"time over that of a + x, on {jax.default_backend()}", xlabel="times")
plt.show()

# %% [markdown]
# On a CPU a good loop wins and the trees lose: there is nothing idle that could be put to work. The library knows that, which is why `algorithm=None` asks for which platform the program is compiled and picks. You can name one, and get exactly that, or an error that says why not.
#
# ## `linear_scan`
#
# The library's version takes batches, real or complex numbers, a state to begin from, and `reset`, which clears the state where a new document begins. All algorithms keep to all of it.

# %%
decay = jnp.full((1, 60, 1), 0.95)
x = jnp.zeros((1, 60, 1)).at[0, jnp.array([3, 12, 33, 50]), 0].set(1.0)
document_ends = jnp.zeros((1, 60), bool).at[0, 30].set(True)
figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
for algorithm, style in (("sequential", "-"), ("associative", "--"), ("chunked", ":")):
    h, _ = seqjax.linear_scan(decay, x, reset=document_ends, algorithm=algorithm)
    axis.plot(h[0, :, 0], style, linewidth=2, label=algorithm)
axis.axvline(30, color="k", linewidth=0.8)
axis.text(30.5, 1.45, "reset: a new document")
axis.set(xlabel="t", ylabel="h", title="three algorithms, one answer")
axis.legend(frameon=False)
plt.show()

first, state = seqjax.linear_scan(decay[:, :20], x[:, :20])
second, _ = seqjax.linear_scan(decay[:, 20:], x[:, 20:], state)
whole, _ = seqjax.linear_scan(decay, x)
print("split and resumed:", np.abs(jnp.concatenate([first, second], 1) - whole).max())

# %% [markdown]
# ## Eigenvalues on the unit disk
#
# If `h` is a vector and `a` a matrix, the matrix can nearly always be diagonalised, over the *complex* numbers. So nothing is lost by giving each channel one complex decay λ and skipping the matrix. That is the LRU (arXiv 2303.06349). A channel with λ = r exp(iθ) remembers for about 1/(1 - r) steps, and turns by the angle θ at each:

# %%
layer = seqjax.layers.LRU(dim=1, state_dim=8 if TINY else 32, r_min=0.8, r_max=0.99)
params = layer.init(jax.random.key(1))


def eigenvalues(params):
    """The λ of an LRU."""
    nu, theta = jnp.exp(params["nu_log"]), jnp.exp(params["theta_log"])
    return np.asarray(jnp.exp(-nu + 1j * theta))


def disk(axis, title):
    """An empty unit disk."""
    angle = np.linspace(0, 2 * np.pi, 200)
    axis.plot(np.cos(angle), np.sin(angle), color="0.7", linewidth=1)
    axis.axhline(0, color="0.9", zorder=0)
    axis.axvline(0, color="0.9", zorder=0)
    axis.set(title=title, aspect="equal", xlabel="real", ylabel="imaginary")


figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=[1, 1, 1])
disk(axes[0], "λ as they start: on a ring")
found = eigenvalues(params)
axes[0].scatter(found.real, found.imag, s=14)
for r, theta, color in ((0.9, 0.1, "C1"), (0.97, 0.5, "C2"), (0.97, 2.5, "C3")):
    value = r * np.exp(1j * theta)
    axes[0].scatter(value.real, value.imag, color=color, s=50, zorder=3)
    axes[1].plot(np.real(value ** np.arange(60)), color=color, label=f"r={r}, θ={theta}")
axes[1].set(title="how three of them answer an impulse", xlabel="t")
axes[1].legend(frameon=False, fontsize=8)
radius = np.linspace(0.5, 0.999, 200)
axes[2].semilogy(radius, 1 / (1 - radius))
axes[2].set(title="memory, in steps", xlabel="r = |λ|")
plt.show()

# %% [markdown]
# ## Learning where to put them
#
# A task that needs memory of a certain kind: tell what the input was 20 steps ago. A single layer of a few complex decays has to become a delay line. Watch where its eigenvalues go.

# %%
DELAY, LENGTH, STEPS = (3, 16, 3) if TINY else (20, 128, 600)


def batch(key):
    """White noise, and the same noise `DELAY` steps later."""
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
print(f"mean squared error: {losses[0]:.2f} at first, {np.mean(losses[-20:]):.3f} in the end")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
axes[0].semilogy(losses)
axes[0].set(title="error", xlabel="step")
disk(axes[1], "where the λ go")
both = np.concatenate([path, path.conj()], axis=1)  # only Re(C h) is read, so -θ is as good as θ
axes[1].plot(both.real, both.imag, color="C0", linewidth=0.6, alpha=0.5)
axes[1].scatter(both[0].real, both[0].imag, s=8, color="C0", label="start")
axes[1].scatter(both[-1].real, both[-1].imag, s=14, color="C3", label="end", zorder=3)
axes[1].legend(frameon=False, fontsize=8, loc="center")
impulse = jnp.zeros((1, LENGTH, 1)).at[0, 5].set(1.0)
response, _ = layer.apply(params, impulse)
axes[2].plot(impulse[0, :60, 0], color="0.6", label="input")
axes[2].plot(response[0, :60, 0], color="C3", label="output")
axes[2].set(title=f"an impulse comes out {DELAY} steps later", xlabel="t")
axes[2].legend(frameon=False)
plt.show()

# %% [markdown]
# A delay of 20 steps needs all frequencies to be delayed alike, so the eigenvalues spread out around the disk at nearly one radius: close enough to 1 to carry the past for 20 steps, and not closer, to let go of it after.
#
# Next: five recurrences, four of which decide by their input what to keep, side by side on a task that needs it.
