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

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Return a field that must be a number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _error(name, "a number", value)
        return float(value)

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        """Return a field that must be true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise _error(name, "true or false", value)
        return value

    def list_of(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> list:
        """Return a field that must be a list whose elements have the given type."""
        value = self.get(name, default)
        if isinstance(value, list):
            value = [_number_of(entry) for entry in value]
        if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
            raise _error(name, "a list", value)
        return value

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

    def rope(self, theta: float, partial: float = 1.0) -> tuple[float, float]:
        """Return the base of the rotary frequencies and the rotated share of each head.

        Newer configs have `rope_parameters`, older ones the same fields at the top level. Types
        other than 'default' scale frequencies or positions and are not supported.

        Args:
          theta: the reference's default base.
          partial: the reference's default share.
        """
        nested = self.inner("rope_parameters" if self.has("rope_parameters") else "rope_scaling")
        nested.expect("rope_type", "default", default=nested.get("type", "default"))
        theta = nested.number("rope_theta", self.number("rope_theta", theta))
        share = self.number("partial_rotary_factor", partial)
        return theta, nested.number("partial_rotary_factor", share)


def _error(name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"load: config field `{name}` must be {wanted}, got {value!r}.")


def _number_of(value: Any) -> Any:
    """Return infinity for {"__float__": "Infinity"}; other values unchanged."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        number = float(value["__float__"])
        return number if math.isinf(number) else value
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
