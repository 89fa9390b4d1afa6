"""Reads the settings: infermesh.toml, then INFERMESH_SECTION__NAME, then --section.name flags."""

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infermesh.config import Settings
from infermesh.config_fields import ConfigError, convert, sections

DEFAULT_FILE = "infermesh.toml"
ENV_PREFIX = "INFERMESH_"
# Set by a user's shell for other ends: not sections.
ENV_FILE = "INFERMESH_CONFIG"
ENV_OTHER = (ENV_FILE, "INFERMESH_API_KEY", "INFERMESH_URL")


def load(argv: list[str] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """See `infermesh.config.load`."""
    environ = os.environ if environ is None else environ
    file, flags = _split_flags(argv or [])
    file = file or environ.get(ENV_FILE)
    raw: dict[str, tuple[object, str]] = {}
    if file is not None:
        raw.update(_from_file(Path(file)))
    elif Path(DEFAULT_FILE).is_file():
        raw.update(_from_file(Path(DEFAULT_FILE)))
    raw.update(_from_environ(environ))
    raw.update(flags)
    return build(raw)


def build(raw: Mapping[str, tuple[object, str]]) -> Settings:
    """Settings from `section.name` -> (value, origin); what is absent keeps its default.

    Raises:
        ConfigError: an unknown key, or a value that its field doesn't allow.
    """
    known = sections(Settings)
    names = {f"{s}.{f.name}" for s, cls in known.items() for f in dataclasses.fields(cls)}
    for key, (_, origin) in raw.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown setting {key} ({origin}){hint}")
    built: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for section, cls in known.items():
        hints = typing.get_type_hints(cls)
        values = {}
        for item in dataclasses.fields(cls):
            key = f"{section}.{item.name}"
            origins[key] = "default"
            if key in raw:
                value, origin = raw[key]
                values[item.name] = convert(key, value, item, hints[item.name], origin)
                origins[key] = origin
        built[section] = cls(**values)
    return Settings(**built, origins=origins)


def _from_file(path: Path) -> Iterator[tuple[str, tuple[object, str]]]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for section, table in data.items():
        if not isinstance(table, dict):
            raise ConfigError(f"unknown setting {section} ({path}); settings stand in sections")
        for name, value in table.items():
            yield f"{section}.{name}", (value, str(path))


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[object, str]]]:
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in ENV_OTHER:
            continue
        section, _, name = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        yield f"{section}.{name}", (value, f"env {variable}")


def _split_flags(argv: list[str]) -> tuple[str | None, dict[str, tuple[object, str]]]:
    file: str | None = None
    flags: dict[str, tuple[object, str]] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; flags are --section.name=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"flag --{key} needs a value")
            value = following
        if key == "config":
            file = value
        else:
            flags[key.replace("-", "_")] = (value, f"flag --{key}")
    return file, flags
