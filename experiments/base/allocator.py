"""Settings of glibc's allocator for programs that XLA runs on CPU.

XLA allocates the temporaries of a program at each call. By default glibc returns large freed blocks
to the operating system. The next call then takes a page fault for each 4 KiB. These faults take a
quarter of a training step of small models; `python -m experiments.bench allocator` measures them.
"""

import ctypes
import importlib.util
import sys

import jax

# Parameters of `mallopt` and their values: one arena, no `mmap`, up to 2 GiB of free memory kept at
# the end of the arena, and growth by 64 MiB. See `man mallopt`.
SETTINGS = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 2**26}
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep_memory() -> bool:
    """Keep freed memory in the process if JAX runs on CPU; return whether the settings apply.

    Call this before JAX starts its backend: threads that have allocated memory keep their arenas.
    The process then keeps its peak of host memory until it ends. Without glibc, do nothing.
    """
    if not sys.platform.startswith("linux") or not _on_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(*setting) for setting in SETTINGS.items()]
    return all(accepted)


def _on_cpu() -> bool:
    """Return whether JAX will choose the CPU, without starting a backend."""
    if platforms := _platforms():
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ACCELERATORS)


def _platforms() -> str | None:
    """Return the platforms that the user chose for JAX, in order."""
    return getattr(jax.config, "jax_platforms", None)
