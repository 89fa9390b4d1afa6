"""What one setting is: default, documentation, allowed range; and how a raw value becomes it."""

import dataclasses
import re
import typing
from typing import Any

# user:password@ of a URL, and passwords among its parameters
_PASSWORD = re.compile(
    r"(://[^/@?#\s]*?:)[^/?#\s]*(?=@)|([?&](?:\w*password|sslkey)=)[^&\s]*", re.I
)


class ConfigError(Exception):
    """A setting that can't be used: one sentence naming key, value, origin and what is allowed."""


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its documentation and allowed range."""
    facts = {"doc": doc, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=facts)


def masked(text: str) -> str:
    """A value as it may be shown: the passwords of URLs in it are not."""
    return _PASSWORD.sub(lambda found: f"{found[1] or found[2]}***", text)


def sections(settings_class: type) -> dict[str, type]:
    """Section name to its dataclass."""
    hints = typing.get_type_hints(settings_class)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def convert(key: str, raw: object, field: "dataclasses.Field[Any]", kind: Any, origin: str) -> Any:
    """`raw` (a TOML value, or text from the environment or a flag) as the field's type.

    Raises:
        ConfigError: wrong type, out of range, or not one of the choices.
    """
    value = _typed(key, raw, kind, origin)
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{key} is {value!r} ({origin}); it must be one of {', '.join(choices)}")
    low, high = field.metadata["low"], field.metadata["high"]
    if low is not None and value < low:
        raise ConfigError(f"{key} is {value} ({origin}); it must be at least {low}")
    if high is not None and value > high:
        raise ConfigError(f"{key} is {value} ({origin}); it must be at most {high}")
    return value


def _typed(key: str, raw: object, kind: Any, origin: str) -> Any:
    if typing.get_origin(kind) is tuple:
        items = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(
                f"{key} is {masked(repr(raw))} ({origin}); it must be a list of strings"
            )
        return tuple(item.strip() for item in items if item.strip())
    try:
        return _scalar(raw, kind)
    except (ValueError, TypeError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        raise ConfigError(
            f"{key} is {masked(repr(raw))} ({origin}); it must be {names[kind]}"
        ) from None


def _scalar(raw: object, kind: type) -> Any:
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(raw, str) and raw.lower() in words:
            return words[raw.lower()]
        raise ValueError
    if isinstance(raw, bool):
        raise ValueError
    if isinstance(raw, str):
        return kind(raw)
    if kind is float and isinstance(raw, int | float):
        return float(raw)
    if isinstance(raw, kind):
        return raw
    raise ValueError
