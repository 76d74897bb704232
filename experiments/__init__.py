"""Commands that train, evaluate and sample recurrent models with seqjax."""

import importlib.util
import sys

# Top-level packages of the extra `experiments` that the commands import when they start.
REQUIRED = (
    "absl",
    "grain",
    "matplotlib",
    "ml_collections",
    "optax",
    "orbax",
    "tensorboardX",
    "tqdm",
)


def _require_extras() -> None:
    """Exit with one line if a command is started without the packages that it imports."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: experiments: {', '.join(missing)} must be installed;"
            " pip install -e '.[experiments]' from a clone",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _is_device_check() -> bool:
    """Return whether the command is `python -m experiments.bench device`, which needs no extra."""
    return "experiments.bench" in sys.orig_argv and sys.argv[1:2] == ["device"]


# Python sets argv[0] to "-m" while it looks for the module of `python -m experiments.train`.
if sys.argv[0] == "-m" and not _is_device_check():
    _require_extras()
