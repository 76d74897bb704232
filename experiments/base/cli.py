"""Runner of all commands: it parses absl flags and reports user errors in one line."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from experiments.base import usage
from experiments.base.errors import UserError, is_disk_full, system_error

EXAMPLE_CONFIG = "experiments/configs/lm.py:gated_deltanet"


def define_config(
    values: flags.FlagValues, argv: Sequence[str], default: str | None = None
) -> None:
    """Define `--config=FILE.py:ARG` and its `--config.FIELD=VALUE` overrides."""
    config_flags.DEFINE_config_file(
        "config",
        default,
        f"Configuration file and its words, for example {EXAMPLE_CONFIG}.",
        flag_values=values,
        sys_argv=list(argv),
    )


def run(
    define_flags: Callable[[flags.FlagValues, Sequence[str]], None],
    main: Callable[..., int],
    argv: Sequence[str] | None = None,
    *,
    takes_words: bool = False,
) -> int:
    """Parse `argv`, call `main` and return the exit code.

    Args:
      define_flags: called with the flag values and `argv`; defines the flags of the script.

      main: called with the flag values; returns the exit code.

      argv: name of the script and its arguments; by default the command line.

      takes_words: pass the arguments that are not flags as the second argument of `main`.
    """
    argv = list(sys.argv if argv is None else argv)
    # Orbax logs the traceback of every error that it raises; the error itself is reported here.
    absl_logging.set_verbosity(absl_logging.FATAL)
    sys.unraisablehook = _hide_closed_loops
    values = flags.FlagValues()
    try:
        words = _parse(define_flags, values, argv, takes_words)
        detail = usage.requested(values)
        if detail:
            if "config" in values and values["config"].value is not None:
                require_config(values)
            print(usage.text(sys.modules[main.__module__].__doc__ or "", values, detail))
            code = 0
        else:
            code = main(values, words) if takes_words else main(values)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT, prefix="")
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe.
        _discard_output()
        return 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        message = _environment_message(error, values)
        if message is None:
            raise
        return _fail(message)


def _hide_closed_loops(unraisable: Any) -> None:
    """Report an exception outside any handler, unless it follows another error of Orbax.

    TensorStore's threads find the event loop closed after one read of a restore failed.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _fail(message: str, exit_code: int = UserError.exit_code, prefix: str = "error: ") -> int:
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    # Libraries that failed report it again as the interpreter exits. Registered last, runs first.
    atexit.register(_discard, 2)
    with contextlib.suppress(OSError):
        print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)
    return exit_code


def _discard_output() -> None:
    """Redirect stdout to the null device: the interpreter flushes it once more when it exits."""
    _discard(sys.stdout.fileno())


def _discard(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _environment_message(error: Exception, values: flags.FlagValues) -> str | None:
    """Return the message for a failure of the machine, or None for every other error."""
    if is_disk_full(error):
        return (
            "the disk is full: free some space or give a --workdir on another disk, then start "
            "the same command again; it resumes from the last complete checkpoint"
        )
    cause = system_error(error)
    if cause is not None:
        return _path_message(cause, values)
    if isinstance(error, (AssertionError, RuntimeError)):
        return _backend_message()
    return None


def _path_message(error: OSError, values: flags.FlagValues) -> str:
    """Return the message for an unusable path, with the flag that names the path or its folder."""
    reason = error.strerror or "unknown reason"
    if error.filename is None:
        return f"cannot read or write: {reason}; check the disk of the --workdir"
    path = os.fsdecode(error.filename) if not isinstance(error.filename, int) else "a file"
    names = [name for name in values if _is_below(path, values[name].value)]
    if names:
        name = max(names, key=lambda flag: len(str(values[flag].value)))
        return (
            f"--{name}={values[name].value} must be a path that this user can read and write, "
            f"got {path}: {reason}; give another --{name}"
        )
    other = " or give another --workdir" if "workdir" in values else ""
    return f"cannot read or write {path}: {reason}; check its permissions{other}"


def _is_below(path: str, folder: Any) -> bool:
    if not isinstance(folder, str) or not folder:
        return False
    return Path(path).absolute().is_relative_to(Path(folder).absolute())


def _backend_message() -> str | None:
    """Return the message for a platform that JAX cannot initialize, or None if it can."""
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        # On a machine without a GPU, JAX fails an assertion that has no message.
        reason = (str(error).splitlines() or ["no such device on this machine"])[0]
        reason = reason.partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        return (
            f"JAX_PLATFORMS={platforms} must name platforms of this machine, "
            f"got: {reason}; unset it, or set JAX_PLATFORMS=cpu"
        )
    return None


def _parse(
    define_flags: Callable[[flags.FlagValues, Sequence[str]], None],
    values: flags.FlagValues,
    argv: Sequence[str],
    takes_words: bool,
) -> list[str]:
    usage.define_flags(values)
    config_argument = next(
        (argument for argument in argv if argument.startswith("--config=")), "--config"
    )
    try:
        define_flags(values, argv)  # reads the default of --config, with its overrides
        rest = values(argv)
    except UserError as error:
        raise UserError(f"{config_argument}: {error}") from error
    except (flags.Error, AttributeError, KeyError, OSError) as error:
        raise UserError(_flag_message(error, config_argument)) from error
    if len(rest) > 1 and not takes_words:
        raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value")
    return rest[1:]


def _flag_message(error: Exception, config_argument: str) -> str:
    text = str(error.args[0]) if error.args else str(error)
    if isinstance(error, flags.Error) and "Traceback" not in text:
        number = re.fullmatch(r"flag (--.*?): (invalid literal for int|could not convert).*", text)
        if number:
            kind = "an integer" if number[2].endswith("int") else "a number"
            return f"{number[1]}: must be {kind}"
        return text
    if isinstance(error, (AttributeError, KeyError)):
        # The text of ml_collections has the unknown field and, if there is one, a similar field.
        text = text.strip("'\"")
        meant = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text)
        if meant:
            return (
                f"{config_argument}: unknown config field {meant[2]!r}: did you mean {meant[1]!r}?"
            )
        return f"{config_argument}: unknown config field {text!r}; --help lists all fields"
    if isinstance(error, OSError):
        return _unreadable(config_argument)
    return f"{config_argument}: the config file failed: {_last_line(text)}"


def _unreadable(config_argument: str) -> str:
    hint = f"check its path, for example --config={EXAMPLE_CONFIG}"
    return f"{config_argument}: cannot read the file: {hint}"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


def require_config(values: Any) -> ConfigDict:
    """Return the parsed configuration; raise with an example if there is none."""
    config = values.config
    if config is None:
        raise UserError(f"no configuration: give --config={EXAMPLE_CONFIG}")
    if not isinstance(config, ConfigDict):
        # A file that cannot be read becomes an object that raises on any access.
        raise UserError(_unreadable(f"--config={usage.config_path(values)}"))
    return config
