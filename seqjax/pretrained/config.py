"""Fields of a checkpoint's `config.json`, read with the defaults of its reference."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

_REQUIRED = object()


class Config:
    """Fields of a config, with one-line errors that name the field.

    Each reader takes the default of the reference implementation, for configs that omit a field.
    Without a default the field is required.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = {name: _number_of(value) for name, value in values.items()}

    def has(self, name: str) -> bool:
        """Return whether the config has a value other than null."""
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a field; null counts as missing."""
        if self.has(name):
            return self.values[name]
        if default is _REQUIRED:
            raise ValueError(f"load: config.json must have the field `{name}`, got none.")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """Return a field that must be an integer, positive or at least `least`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _error(
                name, "a positive integer" if least == 1 else f"an integer >= {least}", value
            )
        return value

    def at_most(self, name: str, limit: int, what: str, default: Any = _REQUIRED) -> int:
        """Return a field that must be a positive integer up to a limit, described by `what`."""
        value = self.integer(name, default)
        if value > limit:
            raise _error(name, f"at most {what} = {limit}", value)
        return value

    def number(self, name: str, default: Any = _REQUIRED, least: float = -math.inf) -> float:
        """Return a field that must be a finite number, at least `least`."""
        value = self.get(name, default)
        number = _float(value)
        if number is None or not math.isfinite(number):
            raise _error(name, "a finite number" if _is_number(value) else "a number", value)
        if number < least:
            raise _error(name, f">= {least}", value)
        return number

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        """Return a field that must be true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise _error(name, "true or false", value)
        return value

    def list_of(
        self,
        name: str,
        kind: type,
        default: Any = _REQUIRED,
        *,
        length: int | None = None,
        least: int = 0,
    ) -> list:
        """Return a field that must be a list whose elements have the given type.

        With the type float, the elements are numbers, which may be infinite and are not NaN.

        Args:
          name: the field.
          kind: the type: str, int or float.
          default: the value of a missing field.
          length: the number of elements; by default any.
          least: the smallest number of elements.
        """
        value = self.get(name, default)
        entries = [_number_of(entry) for entry in value] if isinstance(value, list) else None
        if entries is not None and kind is float:
            entries = [_float(entry) for entry in entries]
        valid = entries is not None and all(
            isinstance(entry, kind) and not isinstance(entry, bool) and entry == entry
            for entry in entries
        )
        if entries is None or not valid:
            names = {str: "strings", int: "integers", float: "numbers"}
            raise _error(name, f"a list of {names[kind]}", value)
        if length is not None and len(entries) != length:
            raise _error(name, f"a list of {length} elements", value)
        if len(entries) < least:
            raise _error(name, f"a list of {least} or more elements", value)
        return entries

    def expect(self, name: str, *supported: Any, default: Any = _REQUIRED) -> Any:
        """Return a field that must have one of the supported values."""
        value = self.get(name, default)
        if value not in supported:
            raise _error(name, " or ".join(map(repr, supported)), value)
        return value

    def inner(self, name: str) -> "Config":
        """Return a config inside this one; empty if it is missing."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise _error(name, "an object", value)
        return Config(value)

    def rope_fields(self) -> "Config":
        """Return the fields of the rotary embedding: `rope_scaling`, if it is not empty, wins."""
        scaling = self.inner("rope_scaling")
        return scaling if scaling.values else self.inner("rope_parameters")

    def rope(self, theta: float, partial: float = 1.0) -> tuple[float, float]:
        """Return the base of the rotary frequencies and the rotated share of each head.

        Newer configs have `rope_parameters`, older ones `rope_scaling` and fields at the top level.
        Types other than 'default' scale frequencies or positions and are not supported.

        Args:
          theta: the reference's default base.
          partial: the reference's default share.
        """
        nested = self.rope_fields()
        kind = nested.get("rope_type", nested.get("type", None))
        nested.expect("rope_type", "default", default="default" if kind is None else kind)
        if kind is None:
            nested.expect("factor", 1, default=1)  # the type would say what it scales
        theta = nested.number("rope_theta", self.number("rope_theta", theta))
        share = self.number("partial_rotary_factor", partial)
        return theta, nested.number("partial_rotary_factor", share)


def _error(name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"load: config field `{name}` must be {wanted}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: Any) -> float | None:
    """Return a number as a float, too large integers as infinity; None for other values."""
    if not _is_number(value):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _number_of(value: Any) -> Any:
    """Return infinity for {"__float__": "Infinity"}; other values unchanged."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        number = value["__float__"]
        return float(number) if number in ("Infinity", "-Infinity") else value
    return value


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return the content of a folder's `config.json`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"load: folder {str(folder)!r} must have a config.json, got none.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load: config.json must be valid JSON, got {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"load: config.json must be an object, got {type(values).__name__}.")
    return values
