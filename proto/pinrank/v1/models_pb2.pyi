from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class UnloadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetLabelRequest(_message.Message):
    __slots__ = ("label", "version", "by", "why", "expected_version")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    label: str
    version: int
    by: str
    why: str
    expected_version: int
    def __init__(self, label: _Optional[str] = ..., version: _Optional[int] = ..., by: _Optional[str] = ..., why: _Optional[str] = ..., expected_version: _Optional[int] = ...) -> None: ...

class SetLabelResponse(_message.Message):
    __slots__ = ("entry",)
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    entry: int
    def __init__(self, entry: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("model", "entry", "looked_s_ago", "store_failure", "versions", "labels", "traffic", "shadow", "events")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    LOOKED_S_AGO_FIELD_NUMBER: _ClassVar[int]
    STORE_FAILURE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    entry: int
    looked_s_ago: float
    store_failure: str
    versions: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    labels: _containers.RepeatedCompositeFieldContainer[LabelStatus]
    traffic: _containers.RepeatedCompositeFieldContainer[TrafficShare]
    shadow: ShadowStatus
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, model: _Optional[str] = ..., entry: _Optional[int] = ..., looked_s_ago: _Optional[float] = ..., store_failure: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ..., labels: _Optional[_Iterable[_Union[LabelStatus, _Mapping]]] = ..., traffic: _Optional[_Iterable[_Union[TrafficShare, _Mapping]]] = ..., shadow: _Optional[_Union[ShadowStatus, _Mapping]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("version", "digest", "phase", "reason", "phase_s", "in_flight", "memory_bytes", "checks")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PHASE_S_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    phase: str
    reason: str
    phase_s: float
    in_flight: int
    memory_bytes: int
    checks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., phase: _Optional[str] = ..., reason: _Optional[str] = ..., phase_s: _Optional[float] = ..., in_flight: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., checks: _Optional[_Iterable[str]] = ...) -> None: ...

class LabelStatus(_message.Message):
    __slots__ = ("label", "version", "wanted_version", "requests", "errors", "p99_ms", "guard")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WANTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    P99_MS_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    label: str
    version: int
    wanted_version: int
    requests: int
    errors: int
    p99_ms: float
    guard: str
    def __init__(self, label: _Optional[str] = ..., version: _Optional[int] = ..., wanted_version: _Optional[int] = ..., requests: _Optional[int] = ..., errors: _Optional[int] = ..., p99_ms: _Optional[float] = ..., guard: _Optional[str] = ...) -> None: ...

class TrafficShare(_message.Message):
    __slots__ = ("surface", "label", "share")
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    surface: str
    label: str
    share: float
    def __init__(self, surface: _Optional[str] = ..., label: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class ShadowStatus(_message.Message):
    __slots__ = ("version", "requests", "skipped", "failed", "top_10_overlap", "heads")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    TOP_10_OVERLAP_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    version: int
    requests: int
    skipped: int
    failed: int
    top_10_overlap: float
    heads: _containers.RepeatedCompositeFieldContainer[HeadComparison]
    def __init__(self, version: _Optional[int] = ..., requests: _Optional[int] = ..., skipped: _Optional[int] = ..., failed: _Optional[int] = ..., top_10_overlap: _Optional[float] = ..., heads: _Optional[_Iterable[_Union[HeadComparison, _Mapping]]] = ...) -> None: ...

class HeadComparison(_message.Message):
    __slots__ = ("head", "mean", "shadow_mean", "psi")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    SHADOW_MEAN_FIELD_NUMBER: _ClassVar[int]
    PSI_FIELD_NUMBER: _ClassVar[int]
    head: str
    mean: float
    shadow_mean: float
    psi: float
    def __init__(self, head: _Optional[str] = ..., mean: _Optional[float] = ..., shadow_mean: _Optional[float] = ..., psi: _Optional[float] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("s_ago", "text")
    S_AGO_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    s_ago: float
    text: str
    def __init__(self, s_ago: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...
