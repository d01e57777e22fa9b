"""Loads the server's settings from command-line options, `PINRANK_*` environment variables and a TOML file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from server.config import ConfigError, ServerConfig
from server.environment import OF_COMMANDS, PREFIX, service_links

#: Settings that are tables of settings themselves.
_NESTED = {name for name, field in ServerConfig.model_fields.items() if isinstance(field.default, BaseModel | dict)}


def load_config(path: Path | None, options: dict[str, Any] | None = None) -> ServerConfig:
    """Read the settings: options first, then `PINRANK_*` variables, then the TOML file, then the defaults.

    Args:
        path: the TOML file, if any; paths in it are relative to its folder.
        options: settings by name, such as from a command line; None means not given.

    Raises:
        ConfigError: lists every invalid, unknown or missing setting.
    """
    in_file = {} if path is None else _read_file(path)
    aside = service_links(os.environ) | OF_COMMANDS
    for name in os.environ:
        setting, nested, _ = name.upper().removeprefix(PREFIX).lower().partition("__")
        if not name.upper().startswith(PREFIX) or name in aside:
            continue
        if setting not in ServerConfig.model_fields or (nested and setting not in _NESTED):
            raise ConfigError(f"{name}: there is no such setting; unset the variable, or correct its name")

    class FromEverywhere(ServerConfig):
        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            **_: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            assert isinstance(env_settings, EnvSettingsSource)  # noqa: S101 - pydantic's own
            lowered = {name.lower() for name in aside}
            env_settings.env_vars = {k: v for k, v in env_settings.env_vars.items() if k not in lowered}
            return init_settings, env_settings, InitSettingsSource(settings_cls, in_file)

    try:
        return FromEverywhere(**{key: value for key, value in (options or {}).items() if value is not None})
    except (ValidationError, SettingsError) as error:
        where = f"{path}, {PREFIX}* variables and options" if path else f"{PREFIX}* variables and options"
        raise ConfigError(f"invalid configuration from {where}:\n{_problems(error)}") from error


def shadowing_links() -> list[str]:
    """Return the variables that have a setting's name and were ignored, because Kubernetes set them for a Service."""
    return sorted(
        name
        for name in service_links(os.environ)
        if name.removeprefix(PREFIX).lower().partition("__")[0] in ServerConfig.model_fields
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))  # TOML is UTF-8 in every locale
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    store = values.get("model_store")
    if isinstance(store, str) and "://" not in store:  # a folder
        values["model_store"] = path.parent / store
    return _under(path.parent, values, ServerConfig)


def _under(folder: Path, values: dict[str, Any], settings: type[BaseModel]) -> dict[str, Any]:
    """Return values of settings with all paths relative to a folder; what is no path is for the settings to judge."""
    found = dict(values)
    for name, field in settings.model_fields.items():
        value, kinds = values.get(name), set(_kinds(field.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if isinstance(value, dict) and section is not None and dict not in kinds:
            found[name] = _under(folder, value, section)
        elif Path in kinds and isinstance(value, str) and value:
            found[name] = folder / value
        elif Path in kinds and isinstance(value, list):
            found[name] = [folder / one if isinstance(one, str) else one for one in value]
    return found


def _kinds(annotation: Any) -> Iterator[Any]:
    """Return an annotation's types, those in a union, a tuple or an `Annotated` too."""
    yield annotation
    if get_origin(annotation) is dict:
        yield dict
    for one in get_args(annotation):
        if not isinstance(one, Hashable):  # what `Annotated` says of a type
            continue
        yield from _kinds(one)


def _problems(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return f'  {error} (lists are written as JSON: ["stable"])'
    return "\n".join(
        f"  {'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
    )
