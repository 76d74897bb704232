"""Runs a script: parses its absl flags and turns user errors into one line and exit code 2."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from experiments.errors import UserError, is_disk_full

EXAMPLE_CONFIG = "experiments/configs/lm.py:deltanet"


def define_config(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines `--config=FILE.py:ARG` and its `--config.FIELD=VALUE` overrides."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"Configuration file and its argument, for example {EXAMPLE_CONFIG}.",
        flag_values=values,
        sys_argv=list(argv),
    )


def run(
    define_flags: Callable[[flags.FlagValues, Sequence[str]], None],
    main: Callable[[Any], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv` (default: the command line), calls `main`, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        values = _parse(define_flags, argv)
        if values.help:
            print(values.get_help())
            return 0
        return main(values)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if not is_disk_full(error):
            raise
        return _fail(
            "the disk is full: free some space or give a --workdir on another disk, then start "
            "the same command again; it goes on from the last complete checkpoint"
        )


def _fail(message: str, exit_code: int = UserError.exit_code) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return exit_code


def _parse(
    define_flags: Callable[[flags.FlagValues, Sequence[str]], None], argv: Sequence[str]
) -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Show this help.", short_name="h", flag_values=values)
    define_flags(values, argv)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, OSError) as error:
        raise UserError(_flag_message(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value")
    return values


def _flag_message(error: Exception) -> str:
    text = str(error.args[0]).strip("'\"") if error.args else str(error)
    if isinstance(error, flags.Error) and "Traceback" not in text:
        return text
    if isinstance(error, (AttributeError, KeyError)):
        # ml_collections names the field and, where one is near, the field that was meant.
        meant = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text)
        if meant:
            return f"unknown config field {meant[2]!r}: did you mean {meant[1]!r}?"
        return f"unknown config field {text!r}"
    if isinstance(error, OSError):
        return f"cannot load the config file: {_last_line(text)}"
    return f"the config file failed: {_last_line(text)}"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


def require_config(values: Any) -> ConfigDict:
    """Returns the parsed configuration, or says how to give one."""
    config = values.config
    if config is None:
        raise UserError(f"no configuration: give --config={EXAMPLE_CONFIG}")
    if not isinstance(config, ConfigDict):
        # A file that cannot be read becomes an object that raises on any access.
        raise UserError(
            "cannot read the file given with --config: check its path, "
            f"for example --config={EXAMPLE_CONFIG}"
        )
    return config
