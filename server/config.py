"""Everything an operator can set: a TOML file, `PINRANK_*` variables on top; the server reads them only here."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from feature_client.groups import Name
from kernels.opening import ENGINES

Port = Annotated[int, Field(ge=0, le=65535)]
Milliseconds = Annotated[float, Field(gt=0, le=60_000)]


class ConfigError(Exception):
    """The configuration cannot be used; the message names every bad value."""


class SurfaceConfig(BaseModel):
    """What may differ by surface."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The time budget of a call that brings no gRPC deadline.
    deadline_ms: Milliseconds = 100


class ServerConfig(BaseSettings):
    """The server's settings. Port 0 takes a free one and logs it."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="PINRANK_", env_nested_delimiter="__")

    host: str = "127.0.0.1"
    grpc_port: Port = 50051
    http_port: Port = 9095

    #: Where models live, which one to serve, and which of its labels; the first is the default.
    model_store: Path
    model: str
    labels: Annotated[tuple[Name, ...], Field(min_length=1)] = ("stable",)
    #: A utility table to use instead of the bundle's own.
    utility: Path | None = None
    engine: Literal["openvino", "numpy"] = "openvino"
    #: Runs in flight at once; 0 takes one per processor core.
    engine_streams: Annotated[int, Field(ge=0, le=256)] = 0

    #: lmdb:///path, redis://host:port/db or memory://
    feature_store: str
    #: The share of a request's time budget that its feature reads may use before defaults stand in.
    fetch_budget_share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    candidates_max: Annotated[int, Field(ge=1, le=100_000)] = 5_000
    message_bytes_max: Annotated[int, Field(ge=1_024)] = 1 << 20
    requests_in_flight_max: Annotated[int, Field(ge=1)] = 256
    rows_in_flight_max: Annotated[int, Field(ge=1)] = 65_536
    #: Small requests share a run until it holds this many rows; beyond, a row costs the same in any batch.
    run_rows_target: Annotated[int, Field(ge=1)] = 32
    #: How long a stopping server lets requests in flight finish.
    drain_s: Annotated[float, Field(ge=0, le=600)] = 10

    surfaces: dict[Name, SurfaceConfig] = {}

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: `auto` writes for people on a terminal and JSON elsewhere.
    log_format: Literal["auto", "json", "console"] = "auto"

    def surface(self, name: str) -> SurfaceConfig:
        return self.surfaces.get(name, SurfaceConfig())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


assert set(ENGINES) == {"openvino", "numpy"}, "ServerConfig.engine lists the engines by name"  # noqa: S101


def load_config(path: Path | None, overrides: dict[str, Any] | None = None) -> ServerConfig:
    """Read a TOML file, then `PINRANK_*` variables over it; `overrides` replace file values but not variables.

    Relative paths in the file are relative to the file.

    Raises:
        ConfigError: names every bad, unknown or missing setting.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        for key in ("model_store", "utility"):
            if isinstance(values.get(key), str):
                values[key] = path.parent / values[key]
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    try:
        return ServerConfig(**values)
    except ValidationError as error:
        source = f"{path} and PINRANK_* variables" if path else "PINRANK_* variables and options"
        problems = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"unusable configuration from {source}:\n{problems}") from error
