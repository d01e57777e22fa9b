"""The server's settings and their validation; `server/config_sources.py` loads them from files and variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
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

from feature_client.action_times import DAY_S
from feature_client.groups import Name
from feature_client.redaction import secrets_of
from kernels.engines import LOWERS_PRODUCTS, ON_GPU, known_engine
from model_store.registry.bucket_objects import SECRET_VARIABLES
from server.config_sections import (
    GuardConfig,
    HttpConfig,
    ImpressionsConfig,
    ShadowConfig,
    SurfaceConfig,
    SwapConfig,
    TlsConfig,
)
from server.environment import PREFIX
from server.runtime.listening import is_host, is_loopback, socket_path

Port = Annotated[int, Field(ge=0, le=65535)]


class ConfigError(Exception):
    """The configuration is invalid; the message lists every invalid value."""


def _host(text: str) -> str:
    if not is_host(text):
        raise ValueError(f"{text!r}: use an address (127.0.0.1, ::), a host name, or unix:/path, without a port")
    return text


def _devices(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not numbers or any(type(number) is not int or not 0 <= number <= 63 for number in numbers):
        raise ValueError(f"{value!r}: use a GPU's number from 0 to 63, or a list of such numbers: [0, 1]")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{list(numbers)} names a GPU twice; set engine_streams for more concurrent runs on a GPU")
    return numbers


_DEFAULT_SURFACE = SurfaceConfig()


class ServerConfig(BaseSettings):
    """The server's settings. Port 0 takes a free one and logs it."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
    """Where both ports listen: an address (`::1`, `10.0.0.1`), a host name (all of its addresses), `::` or `0.0.0.0`
    (all addresses, IPv4 and IPv6), or `unix:/path` (gRPC only; HTTP then listens on 127.0.0.1). The image sets
    `0.0.0.0`."""
    grpc_port: Port = 50051
    """gRPC port. 0 takes a free port and logs it."""
    http_port: Port = 9095
    """HTTP port of `/metrics` and of the probes `/livez`, `/readyz`, `/startupz` and `/healthz`. 0 takes a free port
    and logs it."""
    http: HttpConfig = HttpConfig()
    ready_without_features: bool = True
    """Whether the server is ready while the feature store cannot be read, and answers with default features. `false`
    lets `/readyz` answer 503, and gRPC's health service NOT_SERVING."""

    tls: TlsConfig = TlsConfig()
    insecure: bool | None = None
    """Whether the ports may listen without TLS, so that everyone on the network path can read and change what is sent.
    By default only on loopback addresses and on a Unix socket; `true` allows it everywhere, for a trusted network or
    behind a proxy that ends TLS; `false` forbids it there, too."""

    grpc_edge: Literal["auto", "native", "grpcio"] = "auto"
    """The server behind the gRPC port. `native` is pinrank's own, on nghttp2: it takes a third or less of grpcio's CPU
    time a call. `auto` takes it where it is built, and grpcio elsewhere."""
    connections_max: Annotated[int, Field(ge=0)] = 0
    """Maximum number of gRPC connections. A further one takes the place of the one that does least: the oldest that
    never had a call, or else the one without a call for the longest time. 0 means as many as the process may open,
    less 128."""
    connection_calls_max: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    """Maximum number of calls at once on a connection. Clients let further ones wait."""
    connection_idle_s_max: Annotated[float, Field(ge=0)] = 0
    """Time without a call after which the server closes a gRPC connection. 0 means never."""
    header_bytes_max: Annotated[int, Field(ge=1 << 10, le=1 << 20)] = 16 << 10
    """Maximum size of a call's metadata."""
    connection_age_s_max: Annotated[float, Field(ge=0)] = 0
    """Age from which the server closes gRPC connections, give or take a tenth, so that clients spread over new
    replicas. Calls in flight are answered first. 0 means never."""

    processes: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of server processes on the gRPC port. `http_port` answers for all of them."""

    model_store: Annotated[str, BeforeValidator(str)]
    """Model store: a folder, or `s3://bucket/prefix`; see models.md."""
    model: str
    """Name of the model to serve."""
    labels: Annotated[tuple[Name, ...], Field(min_length=1)] = ("stable", "canary", "shadow")
    """Labels to serve as soon as they exist. The first one is the default label and must exist."""
    state_folder: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = None
    """A folder that only this server uses, for state that should survive a restart: the versions that it refused, and
    why; see models.md."""
    swap: SwapConfig = SwapConfig()
    guard: GuardConfig = GuardConfig()
    shadow: ShadowConfig = ShadowConfig()
    admin_token_file: FilePath | None = None
    """File with the token of `ModelService` calls: one line of printable ASCII without spaces. Without a token, only
    callers of `callers_file` that may `models` can call the service."""
    callers_file: FilePath | None = None
    """File of the callers (TOML): who may do what, and how much of it; see security.md. Without it, every caller may do
    everything except manage models."""
    callers_reload_s: Annotated[float, Field(gt=0, le=86_400)] = 10
    """Interval at which the server looks for changes of `callers_file`."""
    reflection: bool = True
    """Whether the gRPC port describes its services to clients (`grpcurl` needs it)."""
    utility: FilePath | None = None
    """A utility table that replaces the bundle's own."""
    engine: Annotated[str, AfterValidator(known_engine)] = "openvino"
    """The runtime that scores candidates: `openvino` on CPUs; `tensorrt`, `tensorrt_rtx` or `torch` on GPUs (see
    gpu.md); `numpy` is the slow reference."""
    device: Annotated[tuple[int, ...] | None, BeforeValidator(_devices)] = None
    """The GPUs of a GPU engine, by CUDA ordinal: one (`1`) or several (`[0, 1]`). The default is GPU 0. If there are at
    least as many GPUs as processes, each process gets GPUs of its own; otherwise all processes share all GPUs. CPU
    engines refuse this setting."""
    engine_streams: Annotated[int, Field(ge=0, le=256)] = 0
    """Maximum number of concurrent engine runs, on each GPU. 0 means one per core that the process may use (a CPU quota
    counts), or three on a GPU."""
    engine_products: Literal["float32", "bf16"] = "float32"
    """What the products of the native encoder multiply. `bf16` computes faster and rounds to 8 bits, on processors with
    AVX512_BF16. The server uses it for a version only if the golden scores stay within the bundle's tolerance and a run
    measures faster; otherwise it computes in float32, and the log and `pinrank model status` say why. Answers say what
    was used. Only for engine `openvino`."""

    feature_store: SecretStr
    """Feature store: `lmdb:///path`, `redis://[user:password@]host:port/db`, `redis+cluster://host:port` of any node
    (`rediss` for TLS) or `memory://`; see features.md."""
    fetch_budget_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The part of a request's remaining time that its feature reads may use before defaults replace missing values."""

    near_cache_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    """Memory for the near cache, which keeps pins' rows that were read before. 0 turns it off."""
    near_cache_stale_s: Annotated[float, Field(ge=0, le=86_400)] = 30
    """Maximum age of a row in the near cache while the feature store can be read."""
    near_cache_outage_s: Annotated[float, Field(ge=0, le=604_800)] = 3_600
    """Maximum age of a row in the near cache while the feature store cannot be read. Answers count such rows as
    `stale_rows`."""

    record_actions: bool = False
    """Whether `ActivityService` writes users' actions into the feature store."""
    record_actions_max: Annotated[int, Field(ge=1)] = 10_000
    """Maximum number of actions in a Record call, or in a message of RecordStream."""
    record_retention_days: Annotated[float, Field(ge=0, le=36_500)] = 90
    """Time after which a user's recorded sequence is deleted if nothing new came, and the greatest age of an action.
    Sequences that were loaded in bulk stay until the user's first recorded action. 0 keeps all sequences, and takes
    actions of any age. Give `features follow` the same time."""
    record_new_users_per_s: Annotated[float, Field(ge=0, le=1e9)] = 1_000
    """Maximum rate at which users who have no sequence yet get one, per process and sequence; ten seconds' worth may
    come at once. Further actions of such users are refused, and those of known users are stored. 0 has no limit."""
    record_user_actions_per_s: Annotated[float, Field(ge=0, le=1e9)] = 10
    """Maximum rate of a user's new actions, per process and sequence; ten seconds' worth may come at once. Further ones
    are refused. 0 has no limit, as a backfill of old actions needs."""
    record_values_max: Annotated[int, Field(ge=0)] = 0
    """Number of values in the feature store, of users, pins and sequences together, from which users who have no
    sequence yet are refused. The server counts every 5 s. 0 has no limit."""

    explore: bool = True
    """Whether models with an exploration table explore; `false` answers every request in the tuned order."""
    impressions: ImpressionsConfig = ImpressionsConfig()

    candidates_max: Annotated[int, Field(ge=1, le=100_000)] = 5_000
    """Maximum number of candidates in a request. The network of every version must be fit for as many; see
    `swap.run_bytes_max`."""
    message_bytes_max: Annotated[int, Field(ge=1_024)] = 1 << 20
    """Maximum size of a gRPC message. gRPC refuses larger ones with RESOURCE_EXHAUSTED."""
    requests_in_flight_max: Annotated[int, Field(ge=1)] = 256
    """Maximum number of requests in flight. The server refuses further requests on arrival."""
    rows_in_flight_max: Annotated[int, Field(ge=1)] = 65_536
    """Maximum number of candidates in flight. The server refuses further requests on arrival."""
    bytes_in_flight_max: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    """Maximum estimated memory of the requests in flight, for their features and tensors. The server refuses further
    requests on arrival."""
    answer_margin_ms: Annotated[float, Field(ge=0, le=1_000)] = 1.0
    """The part of every deadline that is reserved for the ways that the server does not see: of the request, and of its
    answer."""
    lame_duck_s: Annotated[float, Field(ge=0, le=600)] = 0
    """Time for which a stopping server still answers everything while its health says NOT_SERVING, so that load
    balancers take it out before it refuses calls. Give it what they need to notice; the image sets 5."""
    drain_s: Annotated[float, Field(ge=0, le=600)] = 10
    """Maximum time that a stopping server then waits for requests in flight; it refuses new ones with UNAVAILABLE."""

    surfaces: dict[Name, SurfaceConfig] = {}

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of the events that are logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """`console` writes columns, `json` one JSON object a line; `auto` picks `console` on a terminal."""

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, _: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only the given values; `load_config` reads the environment."""
        return (init_settings,)

    @model_validator(mode="after")
    def _a_unix_socket_is_one_process(self) -> ServerConfig:
        if self.processes > 1 and socket_path(self.host) is not None:
            raise ValueError(
                f"processes: {self.processes} cannot share {self.host}; set host to an address, or processes to 1"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_not_insecure(self) -> ServerConfig:
        if self.insecure and self.tls.certificate is not None:
            raise ValueError("insecure: tls.certificate is set, and both ports use it; unset one of the two")
        return self

    @model_validator(mode="after")
    def _devices_are_the_engines(self) -> ServerConfig:
        if self.device is not None and self.engine not in ON_GPU:
            raise ValueError(
                f"device: engine {self.engine!r} runs on the CPU; unset device, or set engine to one of "
                f"{', '.join(ON_GPU)}"
            )
        return self

    @model_validator(mode="after")
    def _products_are_the_engines(self) -> ServerConfig:
        if self.engine_products != "float32" and self.engine not in LOWERS_PRODUCTS:
            raise ValueError(
                f"engine_products: engine {self.engine!r} takes no {self.engine_products}; unset engine_products, or "
                f"set engine to one of {', '.join(LOWERS_PRODUCTS)}"
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

    def check_transport(self) -> None:
        """Make sure that the server does not listen without TLS where others could listen in, unless it was told to.

        Raises:
            ConfigError: it would.
            ListenError: the name `host` does not resolve.
        """
        if self.tls.certificate is not None or self.insecure:
            return
        if self.insecure is False or not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host}: without TLS, everyone on the network path could read and change what is sent. Set "
                "tls.certificate and tls.key; or, if the network is trusted or a proxy ends TLS, set insecure = true "
                f"(--insecure, {PREFIX}INSECURE=true)"
            )

    @property
    def record_lasts_s(self) -> float | None:
        """How long recorded sequences are kept; None for ever."""
        return self.record_retention_days * DAY_S or None

    @property
    def devices(self) -> tuple[int, ...]:
        """The CUDA ordinals of the GPUs to run on; (0,) for a CPU engine, which ignores it."""
        return self.device or (0,)

    def devices_of(self, process: int) -> tuple[int, ...]:
        """Return the GPUs of one process: GPUs of its own if there are enough for all processes, otherwise all GPUs."""
        alone = len(self.devices) >= self.processes
        return self.devices[process :: self.processes] if alone else self.devices

    @property
    def stop_s_max(self) -> float:
        """Maximum time from the signal to stop until the last call has ended, in seconds."""
        return self.lame_duck_s + self.drain_s

    def surface(self, name: str) -> SurfaceConfig:
        return self.surfaces.get(name, _DEFAULT_SURFACE)

    def secrets(self) -> frozenset[str]:
        """Return the secrets to redact from logs: the feature store's password and the keys of a bucket."""
        keys = {os.environ[name] for name in SECRET_VARIABLES if name in os.environ}
        return secrets_of(self.feature_store.get_secret_value()) | keys
