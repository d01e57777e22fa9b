"""Everything an operator can set, checked; `server/config_sources.py` reads it from files, variables and options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from feature_client.groups import Name
from feature_client.redaction import secrets_of
from kernels.engines import ON_GPU, known_engine
from model_store.registry.bucket_objects import SECRET_VARIABLES
from server.environment import PREFIX
from server.runtime.listening import is_host, socket_path

Port = Annotated[int, Field(ge=0, le=65535)]
Milliseconds = Annotated[float, Field(gt=0, le=60_000)]


class ConfigError(Exception):
    """The configuration cannot be used; the message names every bad value."""


def _host(text: str) -> str:
    if not is_host(text):
        raise ValueError(f"{text!r}: write an address (127.0.0.1, ::), a name, or unix:/path, without a port")
    return text


def _devices(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not numbers or any(type(number) is not int or not 0 <= number <= 63 for number in numbers):
        raise ValueError(f"{value!r}: write a GPU's number, from 0 to 63, or a list of them: [0, 1]")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{list(numbers)} names a GPU twice; how many runs one has in flight is engine_streams")
    return numbers


class SurfaceConfig(BaseModel):
    """What may differ by surface."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The time budget of a call that brings no gRPC deadline.
    deadline_ms: Milliseconds = 100
    #: Surfaces of a higher priority run first, as long as they use no more than their share.
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    #: This surface's part of the engine's time when there is not enough for all, against the shares of the others.
    share: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    #: What may be done, in this order, to a request that would miss its deadline, before it is refused.
    overload: tuple[Literal["trim", "cheaper"], ...] = ()
    #: A request is never trimmed to fewer candidates.
    trim_candidates_min: Annotated[int, Field(ge=1)] = 32
    #: The label that `cheaper` answers with; one of `labels`.
    cheaper_label: Name | None = None

    @model_validator(mode="after")
    def _cheaper_has_a_label(self) -> SurfaceConfig:
        if "cheaper" in self.overload and self.cheaper_label is None:
            raise ValueError("overload names `cheaper`: set cheaper_label to the label that answers instead")
        return self


class SwapConfig(BaseModel):
    """How versions are proven and taken in while traffic flows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: How often the model store is looked at.
    poll_s: Annotated[float, Field(gt=0, le=3_600)] = 2
    #: A version that failed for reasons outside its bundle (features not loaded yet, no memory) is tried again after so
    #: long.
    retry_s: Annotated[float, Field(gt=0, le=86_400)] = 30
    #: How long the model store may take to answer a look; to give a whole bundle, `proof_timeout_s`.
    store_timeout_s: Annotated[float, Field(gt=0, le=3_600)] = 30
    proof_timeout_s: Annotated[float, Field(gt=0, le=3_600)] = 120
    #: How long a version may warm up, its rests included; the shapes that it has not run by then cost their first
    #: requests more. What a run costs is measured all the same.
    warm_up_s_max: Annotated[float, Field(gt=0, le=3_600)] = 300
    bundle_bytes_max: Annotated[int, Field(ge=1 << 20)] = 2 << 30
    #: What the process that proves a bundle may take.
    proof_memory_bytes_max: Annotated[int, Field(ge=64 << 20)] = 8 << 30
    #: Memory that stays free for the rest of the server when a version is taken in.
    memory_bytes_kept: Annotated[int, Field(ge=0)] = 256 << 20
    #: Least mean rank correlation (Spearman) of a version's order with what recent requests were answered.
    rank_correlation_min: Annotated[float, Field(ge=-1, le=1)] = 0.2
    #: How many more of recent requests' candidates may lack a row than for the version that answered them.
    pins_missing_max: Annotated[float, Field(ge=0, le=1)] = 0.05
    #: The part of one core's time that taking a version in may use while requests are answered; down to a sixteenth of
    #: it while they take half of the engine streams or more.
    cpu_share: Annotated[float, Field(gt=0, le=1)] = 0.08
    #: Fields of the manifest that may change although callers notice (`surfaces.related`, `heads.hide`), or "*".
    accept_changes: tuple[str, ...] = ()
    #: Public Ed25519 keys (PEM); with any, only bundles signed by one of them are served.
    trusted_keys: tuple[FilePath, ...] = ()


class GuardConfig(BaseModel):
    """When a label is moved back to the default label's version by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    #: What is compared, and how many requests of each label it takes.
    window_s: Annotated[float, Field(gt=0, le=3_600)] = 60
    requests_min: Annotated[int, Field(ge=1)] = 200
    error_rate_max: Annotated[float, Field(ge=0, le=1)] = 0.01
    p99_ratio_max: Annotated[float, Field(ge=1)] = 1.5
    psi_max: Annotated[float, Field(gt=0)] = 1.0


class ShadowConfig(BaseModel):
    """What nobody is answered with, only compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Name = "shadow"
    share: Annotated[float, Field(ge=0, le=1)] = 0.05


class ServerConfig(BaseSettings):
    """The server's settings. Port 0 takes a free one and logs it."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__", hide_input_in_errors=True
    )

    #: An address (`::` and `0.0.0.0` are all of them, of both families), a name, or `unix:/path` for the gRPC port.
    host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
    grpc_port: Port = 50051
    http_port: Port = 9095

    #: Servers on one gRPC port, each a process; /metrics of the second is at http_port + 1, and so on.
    processes: Annotated[int, Field(ge=1, le=256)] = 1

    #: Where models live (a folder, or s3://bucket/prefix), which one to serve, and which of its labels, as soon as they
    #: are there; the first is the default.
    model_store: Annotated[str, BeforeValidator(str)]
    model: str
    labels: Annotated[tuple[Name, ...], Field(min_length=1)] = ("stable", "canary", "shadow")
    #: A folder of this server's own, for what should outlive a restart: which versions it refused, and why.
    state_folder: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = None
    #: How versions are taken in, when a label is moved back, what is compared in the shadow.
    swap: SwapConfig = SwapConfig()
    guard: GuardConfig = GuardConfig()
    shadow: ShadowConfig = ShadowConfig()
    #: A file with the token that callers of ModelService bring; without it the service takes no calls.
    admin_token_file: FilePath | None = None
    #: A utility table to use instead of the bundle's own.
    utility: FilePath | None = None
    #: What computes the networks; `kernels/engines.py` lists the engines.
    engine: Annotated[str, AfterValidator(known_engine)] = "openvino"
    #: The GPUs that the engine computes on, by their CUDA numbers: one, or a list. Without it, the first.
    device: Annotated[tuple[int, ...] | None, BeforeValidator(_devices)] = None
    #: Runs in flight at once, on each GPU; 0 takes one per processor core, three per GPU.
    engine_streams: Annotated[int, Field(ge=0, le=256)] = 0

    #: lmdb:///path, redis://host:port/db, redis+cluster://host:port or memory://; may hold a password.
    feature_store: SecretStr
    #: The share of a request's time budget that its feature reads may use before defaults stand in.
    fetch_budget_share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    #: Memory for pins' rows that were read before, and how long such a row may stand for the stored one.
    near_cache_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    near_cache_stale_s: Annotated[float, Field(ge=0, le=86_400)] = 30
    #: The same while the feature store cannot be read; such rows are counted in the answer.
    near_cache_outage_s: Annotated[float, Field(ge=0, le=604_800)] = 3_600

    #: Whether ActivityService writes users' actions into the feature store.
    record_actions: bool = False

    candidates_max: Annotated[int, Field(ge=1, le=100_000)] = 5_000
    message_bytes_max: Annotated[int, Field(ge=1_024)] = 1 << 20
    requests_in_flight_max: Annotated[int, Field(ge=1)] = 256
    rows_in_flight_max: Annotated[int, Field(ge=1)] = 65_536
    #: Estimated memory of the requests in flight: their features and tensors.
    bytes_in_flight_max: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    #: Kept free of every deadline for the answer's way back.
    answer_margin_ms: Annotated[float, Field(ge=0, le=1_000)] = 0.5
    #: How long a stopping server lets requests in flight finish.
    drain_s: Annotated[float, Field(ge=0, le=600)] = 10

    surfaces: dict[Name, SurfaceConfig] = {}

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: `auto` writes for people on a terminal and JSON elsewhere.
    log_format: Literal["auto", "json", "console"] = "auto"

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, _: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is given and nothing else: `load_config` reads the environment, once."""
        return (init_settings,)

    @model_validator(mode="after")
    def _a_unix_socket_is_one_process(self) -> ServerConfig:
        if self.processes > 1 and socket_path(self.host) is not None:
            raise ValueError(
                f"processes: {self.processes} cannot share {self.host}; set host to an address, or 1 process"
            )
        return self

    @model_validator(mode="after")
    def _devices_are_the_engines(self) -> ServerConfig:
        if self.device is not None and self.engine not in ON_GPU:
            raise ValueError(
                f"device: engine {self.engine!r} computes on the processor; leave device out, or set engine to one of "
                f"{', '.join(ON_GPU)}"
            )
        return self

    @model_validator(mode="after")
    def _cheaper_labels_are_served(self) -> ServerConfig:
        for name, surface in self.surfaces.items():
            if surface.cheaper_label is not None and surface.cheaper_label not in self.labels:
                raise ValueError(
                    f"surfaces.{name}.cheaper_label: {surface.cheaper_label!r} is not served; add it to labels "
                    f"({', '.join(self.labels)})"
                )
        return self

    @property
    def devices(self) -> tuple[int, ...]:
        """The GPUs to compute on, one of no matter where the engine is of the processor."""
        return self.device or (0,)

    def devices_of(self, process: int) -> tuple[int, ...]:
        """Return the GPUs of one of `processes`: some for it alone where there are enough for that, or else all."""
        alone = len(self.devices) >= self.processes
        return self.devices[process :: self.processes] if alone else self.devices

    def surface(self, name: str) -> SurfaceConfig:
        return self.surfaces.get(name, SurfaceConfig())

    def secrets(self) -> frozenset[str]:
        """Return what no log line may hold: the store's password, and the keys of a bucket."""
        keys = {os.environ[name] for name in SECRET_VARIABLES if name in os.environ}
        return secrets_of(self.feature_store.get_secret_value()) | keys
