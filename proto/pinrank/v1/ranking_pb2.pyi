from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankRequest(_message.Message):
    __slots__ = ("user_id", "pin_ids", "surface", "query", "label", "version", "top_k", "explain")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PIN_IDS_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    pin_ids: _containers.RepeatedScalarFieldContainer[int]
    surface: str
    query: Query
    label: str
    version: int
    top_k: int
    explain: bool
    def __init__(self, user_id: _Optional[int] = ..., pin_ids: _Optional[_Iterable[int]] = ..., surface: _Optional[str] = ..., query: _Optional[_Union[Query, _Mapping]] = ..., label: _Optional[str] = ..., version: _Optional[int] = ..., top_k: _Optional[int] = ..., explain: _Optional[bool] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ("pin_id", "embedding")
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    pin_id: int
    embedding: QueryEmbedding
    def __init__(self, pin_id: _Optional[int] = ..., embedding: _Optional[_Union[QueryEmbedding, _Mapping]] = ...) -> None: ...

class QueryEmbedding(_message.Message):
    __slots__ = ("space", "values")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    space: str
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, space: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("pin_ids", "utilities", "explanation", "versions", "timings", "degradation", "request_id", "exploration")
    PIN_IDS_FIELD_NUMBER: _ClassVar[int]
    UTILITIES_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DEGRADATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPLORATION_FIELD_NUMBER: _ClassVar[int]
    pin_ids: _containers.RepeatedScalarFieldContainer[int]
    utilities: _containers.RepeatedScalarFieldContainer[float]
    explanation: Explanation
    versions: Versions
    timings: StageTimings
    degradation: Degradation
    request_id: int
    exploration: Exploration
    def __init__(self, pin_ids: _Optional[_Iterable[int]] = ..., utilities: _Optional[_Iterable[float]] = ..., explanation: _Optional[_Union[Explanation, _Mapping]] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ..., timings: _Optional[_Union[StageTimings, _Mapping]] = ..., degradation: _Optional[_Union[Degradation, _Mapping]] = ..., request_id: _Optional[int] = ..., exploration: _Optional[_Union[Exploration, _Mapping]] = ...) -> None: ...

class Exploration(_message.Message):
    __slots__ = ("arm",)
    ARM_FIELD_NUMBER: _ClassVar[int]
    arm: str
    def __init__(self, arm: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("heads", "head_probabilities", "parties", "party_utilities", "party_weights")
    HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    PARTIES_FIELD_NUMBER: _ClassVar[int]
    PARTY_UTILITIES_FIELD_NUMBER: _ClassVar[int]
    PARTY_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    heads: _containers.RepeatedScalarFieldContainer[str]
    head_probabilities: _containers.RepeatedScalarFieldContainer[float]
    parties: _containers.RepeatedScalarFieldContainer[str]
    party_utilities: _containers.RepeatedScalarFieldContainer[float]
    party_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, heads: _Optional[_Iterable[str]] = ..., head_probabilities: _Optional[_Iterable[float]] = ..., parties: _Optional[_Iterable[str]] = ..., party_utilities: _Optional[_Iterable[float]] = ..., party_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class Versions(_message.Message):
    __slots__ = ("model", "model_version", "model_digest", "utility", "feature_groups", "products")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    UTILITY_FIELD_NUMBER: _ClassVar[int]
    FEATURE_GROUPS_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_version: int
    model_digest: str
    utility: str
    feature_groups: _containers.RepeatedScalarFieldContainer[str]
    products: str
    def __init__(self, model: _Optional[str] = ..., model_version: _Optional[int] = ..., model_digest: _Optional[str] = ..., utility: _Optional[str] = ..., feature_groups: _Optional[_Iterable[str]] = ..., products: _Optional[str] = ...) -> None: ...

class StageTimings(_message.Message):
    __slots__ = ("wire_us", "fetch_us", "assemble_us", "queue_us", "score_us", "utility_us", "select_us", "total_us")
    WIRE_US_FIELD_NUMBER: _ClassVar[int]
    FETCH_US_FIELD_NUMBER: _ClassVar[int]
    ASSEMBLE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    SCORE_US_FIELD_NUMBER: _ClassVar[int]
    UTILITY_US_FIELD_NUMBER: _ClassVar[int]
    SELECT_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    wire_us: int
    fetch_us: int
    assemble_us: int
    queue_us: int
    score_us: int
    utility_us: int
    select_us: int
    total_us: int
    def __init__(self, wire_us: _Optional[int] = ..., fetch_us: _Optional[int] = ..., assemble_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., score_us: _Optional[int] = ..., utility_us: _Optional[int] = ..., select_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class Degradation(_message.Message):
    __slots__ = ("user_missing", "sequence_missing", "pins_missing", "sequence_pins_missing", "query_missing", "foreign_values", "store_unavailable", "non_finite_scores", "pins_trimmed", "fallback_order", "cheaper_model", "stale_rows")
    USER_MISSING_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_MISSING_FIELD_NUMBER: _ClassVar[int]
    PINS_MISSING_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_PINS_MISSING_FIELD_NUMBER: _ClassVar[int]
    QUERY_MISSING_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_VALUES_FIELD_NUMBER: _ClassVar[int]
    STORE_UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_SCORES_FIELD_NUMBER: _ClassVar[int]
    PINS_TRIMMED_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_ORDER_FIELD_NUMBER: _ClassVar[int]
    CHEAPER_MODEL_FIELD_NUMBER: _ClassVar[int]
    STALE_ROWS_FIELD_NUMBER: _ClassVar[int]
    user_missing: bool
    sequence_missing: bool
    pins_missing: int
    sequence_pins_missing: int
    query_missing: bool
    foreign_values: int
    store_unavailable: bool
    non_finite_scores: int
    pins_trimmed: int
    fallback_order: bool
    cheaper_model: bool
    stale_rows: int
    def __init__(self, user_missing: _Optional[bool] = ..., sequence_missing: _Optional[bool] = ..., pins_missing: _Optional[int] = ..., sequence_pins_missing: _Optional[int] = ..., query_missing: _Optional[bool] = ..., foreign_values: _Optional[int] = ..., store_unavailable: _Optional[bool] = ..., non_finite_scores: _Optional[int] = ..., pins_trimmed: _Optional[int] = ..., fallback_order: _Optional[bool] = ..., cheaper_model: _Optional[bool] = ..., stale_rows: _Optional[int] = ...) -> None: ...
