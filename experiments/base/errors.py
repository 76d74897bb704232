"""Errors that a user can act on: one line, no traceback."""

from __future__ import annotations

import difflib
import errno
import importlib.metadata
import os
import re
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error that the user can correct; its one-line message names the problem and the fix."""

    exit_code = 2


class DivergedError(UserError):
    """A training run produced non-finite numbers. A sweep records this as a result."""

    exit_code = 3


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a hint with the closest of `choices`, if there is one, and all choices."""
    known = sorted(set(choices))
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? known: {', '.join(known)}"
    return f"known: {', '.join(known)}"


def installed_version(distribution: str, extra: str) -> str:
    """Return the version of a distribution; raise with the install command if it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{distribution} is not installed: pip install -e '.[{extra}]' from a clone"
        ) from error


# Errors of reads and writes on an open file, which carry no file name.
_DISK_ERRORS = (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
# Checkpoint libraries written in C++ report the errno as text only.
_SYSTEM_TEXTS = {
    os.strerror(number): number for number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
}


def system_error(error: BaseException | None) -> OSError | None:
    """Return the error of the file system that an error is or was raised from, or None."""
    while error is not None:
        if isinstance(error, OSError):
            if error.filename is not None or error.errno in _DISK_ERRORS:
                return error
        elif isinstance(error, ValueError):
            for text, number in _SYSTEM_TEXTS.items():
                if text in str(error):
                    path = re.search(r'file "(.+?)"', str(error))
                    return OSError(number, text, path[1] if path else None)
        error = error.__cause__
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error or its cause is a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # Checkpoint libraries written in C++ report the errno as text only.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_positive(section: Any, *names: str) -> None:
    """Raise an error unless these fields of a configuration are at least 1."""
    for name in names:
        if section[name] < 1:
            raise UserError(f"the config field {name}={section[name]} must be at least 1")
