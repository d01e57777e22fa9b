"""The sections of the server's settings: what stands under `[surfaces.NAME]`, `[swap]` and so on in `pinrank.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FilePath, model_validator

from feature_client.groups import Name
from server.runtime.tls import TlsFiles

Milliseconds = Annotated[float, Field(gt=0, le=60_000)]


def _loses_little(flush_s: float) -> float:
    if flush_s > 1:
        raise ValueError(
            f"{flush_s:g}: at most 1, because a server that is killed loses the rows of one interval, and the log "
            "promises to lose at most those of one second"
        )
    return flush_s


class SurfaceConfig(BaseModel):
    """The settings of one surface."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    deadline_ms: Milliseconds = 100
    """Time budget of a call that has no gRPC deadline."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Requests of a surface with a higher priority run first, as long as the surface stays within its share."""
    share: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    """The surface's part of the engine's time under overload, relative to the shares of the other surfaces."""
    overload: tuple[Literal["trim", "cheaper"], ...] = ()
    """What the server may do to a request that would miss its deadline, in this order, before it refuses it; see
    Overload."""
    trim_candidates_min: Annotated[int, Field(ge=1)] = 32
    """`trim` never leaves fewer candidates than this."""
    cheaper_label: Name | None = None
    """The label whose model answers for `cheaper`; one of `labels`."""

    @model_validator(mode="after")
    def _cheaper_has_a_label(self) -> SurfaceConfig:
        if "cheaper" in self.overload and self.cheaper_label is None:
            raise ValueError("overload names `cheaper`: set cheaper_label to the label that answers instead")
        return self


class SwapConfig(BaseModel):
    """How the server proves new versions and takes them into service under traffic."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    poll_s: Annotated[float, Field(gt=0, le=3_600)] = 2
    """Model store polling interval."""
    retry_s: Annotated[float, Field(gt=0, le=86_400)] = 30
    """Retry interval for a version that failed for reasons outside its bundle, such as missing features or memory."""
    store_timeout_s: Annotated[float, Field(gt=0, le=3_600)] = 30
    """Timeout of one poll of the model store. Reading a whole bundle has `swap.proof_timeout_s`."""
    proof_timeout_s: Annotated[float, Field(gt=0, le=3_600)] = 120
    """Timeout of the process that proves a bundle."""
    warm_up_s_max: Annotated[float, Field(gt=0, le=3_600)] = 300
    """Maximum duration of a version's warm-up, pauses for requests included. Shapes that have not run by then make
    their first requests slower. The server measures the cost of a run in any case."""
    bundle_bytes_max: Annotated[int, Field(ge=1 << 20)] = 2 << 30
    """Maximum size of a bundle."""
    proof_memory_bytes_max: Annotated[int, Field(ge=64 << 20)] = 8 << 30
    """Memory limit of the process that proves a bundle."""
    run_bytes_max: Annotated[int, Field(ge=1 << 20)] = 2 << 30
    """Memory limit of one run of `candidates_max` candidates, without the weights. The server computes it from the
    network's file, and refuses a version that would exceed it. Each engine stream may use as much."""
    run_s_max: Annotated[float, Field(gt=0, le=3_600)] = 2
    """Limit on the processor time of one run of `candidates_max` candidates, which the process that proves a bundle
    tries. A run cannot be interrupted: meanwhile its stream answers nobody else. A GPU's time is not counted."""
    memory_bytes_kept: Annotated[int, Field(ge=0)] = 256 << 20
    """Memory that must stay free for the rest of the server after a version has been loaded."""
    rank_correlation_min: Annotated[float, Field(ge=-1, le=1)] = 0.2
    """Minimum mean rank correlation (Spearman) between a new version's order and the order in which recent requests
    were answered."""
    pins_missing_max: Annotated[float, Field(ge=0, le=1)] = 0.05
    """How much larger the share of recent candidates, and of users, without a row may be than for the version that
    answered them."""
    cpu_share: Annotated[float, Field(gt=0, le=1)] = 0.08
    """The part of one core that proving and loading a version may use while the server answers requests. While
    requests occupy at least half of the engine streams, it falls to as little as a sixteenth of this."""
    accept_changes: tuple[str, ...] = ()
    """Manifest fields that may change although callers notice it, such as `surfaces.related` or `heads.hide`; `"*"`
    accepts all changes."""
    trusted_keys: tuple[FilePath, ...] = ()
    """Public Ed25519 keys (PEM files). If any are given, the server only serves bundles signed with one of them."""


class TlsConfig(BaseModel):
    """TLS on both ports; see TLS."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    certificate: FilePath | None = None
    """The server's certificate, followed by its chain (PEM file). It turns on TLS on the gRPC port, and HTTPS on the
    other."""
    key: FilePath | None = None
    """The certificate's private key (PEM file without a passphrase)."""
    client_ca: FilePath | None = None
    """The authorities whose client certificates the gRPC port accepts (PEM file)."""
    client_certificates: Literal["off", "ask", "require"] | None = None
    """Whether clients of the gRPC port must show a certificate of `client_ca` (`require`), may show one (`ask`), or are
    not asked for one (`off`). The default is `require` with a `client_ca`, and otherwise `off`. The edge `grpcio`
    cannot `ask`."""
    minimum: Literal["1.2", "1.3"] = "1.2"
    """Lowest version of TLS. The edge `grpcio` takes 1.2 and 1.3."""
    reload_s: Annotated[float, Field(gt=0, le=86_400)] = 10
    """Interval at which the server looks whether the files have changed."""

    @model_validator(mode="after")
    def _files_belong_together(self) -> TlsConfig:
        if (self.certificate is None) != (self.key is None):
            given, missing = ("key", "certificate") if self.certificate is None else ("certificate", "key")
            raise ValueError(f"{given} is set without {missing}; set both, or neither")
        if self.certificate is None and (self.client_ca or self.clients != "off"):
            raise ValueError("client certificates need TLS: set certificate and key")
        if self.client_ca is None and self.clients != "off":
            raise ValueError(
                f'client_certificates = "{self.clients}" needs client_ca: set it to the PEM file of the authorities '
                "whose certificates to accept"
            )
        return self

    @property
    def clients(self) -> Literal["off", "ask", "require"]:
        """Whether clients are asked for a certificate, and must have one."""
        return self.client_certificates or ("off" if self.client_ca is None else "require")

    @property
    def files(self) -> TlsFiles | None:
        """The files and how they are used; None without TLS."""
        if self.certificate is None or self.key is None:
            return None
        return TlsFiles(self.certificate, self.key, self.client_ca, self.clients, self.minimum)


class GuardConfig(BaseModel):
    """When the server moves a label back to the default label's version by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Whether the server compares each label that has traffic with the default label."""
    window_s: Annotated[float, Field(gt=0, le=3_600)] = 60
    """Length of the window over which the guard compares the labels."""
    requests_min: Annotated[int, Field(ge=1)] = 200
    """Minimum number of requests of each label in the window before the guard judges."""
    error_rate_max: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Maximum increase of the share of failed requests over the default label's."""
    p99_ratio_max: Annotated[float, Field(ge=1)] = 1.5
    """Maximum ratio of the label's P99 latency to the default label's."""
    psi_max: Annotated[float, Field(gt=0)] = 1.0
    """Maximum distance (population stability index) of a head's probabilities from the default label's."""
    party_loss_max: Annotated[float, Field(ge=0)] = 0.25
    """Maximum loss of a party's mean utility per request against the default label's, as a fraction of it. The guard
    also moves a label back whose party gets less than the `at_least` of its utility table."""


class ShadowConfig(BaseModel):
    """The label whose rankings are compared and never returned."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    label: Name = "shadow"
    """The label that the server ranks with for comparison only."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The part of all requests that the server also ranks with this label."""


class HttpConfig(BaseModel):
    """The bounds of the HTTP port."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    connections_max: Annotated[int, Field(ge=4, le=10_000)] = 64
    """Maximum number of HTTP connections. When it is reached, the oldest one that is not being answered is closed."""
    request_s_max: Annotated[float, Field(gt=0, le=60)] = 5
    """Maximum time of an HTTP connection, from its acceptance to the last byte of the answer."""
    metrics_age_s_max: Annotated[float, Field(ge=0, le=60)] = 1
    """Scrapes within this time after a collection get its values, so that many scrapes cost what one costs."""
    loop_silence_s_max: Annotated[float, Field(gt=0, le=600)] = 5
    """Time without a turn of the event loop after which `/livez` answers 503."""


class ImpressionsConfig(BaseModel):
    """What was answered, what users did, and what they looked at, as a log. It needs `pinrank[impressions]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    to: str | None = None
    """Where the log is kept: `file:///folder`, or `s3://bucket/prefix` with the usual AWS_* variables. Unset, the
    server keeps no log."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of the answers that the server logs."""
    features_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The part of the logged answers that also keep all stored rows that were read for them."""
    spool_folder: Path | None = None
    """A local folder for rows on their way to `to`; the default is the folder `spool` in it. A log in a bucket needs
    one."""
    spool_bytes_max: Annotated[int, Field(ge=1 << 20)] = 8 << 30
    """Size of the rows in the spool folder from which it takes no more, because `to` cannot be written. Rows then wait
    in memory, and are dropped when the queue is full."""
    flush_s: Annotated[float, AfterValidator(_loses_little), Field(gt=0, le=1)] = 0.5
    """Interval at which rows are written to the spool folder. A killed server loses the rows of one interval."""
    rotate_bytes: Annotated[int, Field(ge=1 << 16)] = 256 << 20
    """Size of the rows in the spool folder from which the server makes a Parquet file of them."""
    rotate_s: Annotated[float, Field(gt=0, le=86_400)] = 300
    """Age of the rows in the spool folder from which the server makes a Parquet file of them."""
    queue_bytes_max: Annotated[int, Field(ge=1 << 20)] = 64 << 20
    """Memory for rows that wait to be written. The server drops and counts rows that do not fit."""
    retention_days: Annotated[float, Field(gt=0)] | None = None
    """Age from which the server deletes files of the log; unset, it keeps them all."""
