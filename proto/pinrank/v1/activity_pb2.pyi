from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordRequest(_message.Message):
    __slots__ = ("actions",)
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.RepeatedCompositeFieldContainer[Action]
    def __init__(self, actions: _Optional[_Iterable[_Union[Action, _Mapping]]] = ...) -> None: ...

class Action(_message.Message):
    __slots__ = ("event_id", "user_id", "pin_id", "action", "surface", "time_ms", "request_id", "position")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    event_id: int
    user_id: int
    pin_id: int
    action: str
    surface: str
    time_ms: int
    request_id: int
    position: int
    def __init__(self, event_id: _Optional[int] = ..., user_id: _Optional[int] = ..., pin_id: _Optional[int] = ..., action: _Optional[str] = ..., surface: _Optional[str] = ..., time_ms: _Optional[int] = ..., request_id: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class RecordResponse(_message.Message):
    __slots__ = ("added", "repeated_actions", "too_old", "refused_new_users", "refused_too_many")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REPEATED_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    TOO_OLD_FIELD_NUMBER: _ClassVar[int]
    REFUSED_NEW_USERS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_TOO_MANY_FIELD_NUMBER: _ClassVar[int]
    added: int
    repeated_actions: int
    too_old: int
    refused_new_users: int
    refused_too_many: int
    def __init__(self, added: _Optional[int] = ..., repeated_actions: _Optional[int] = ..., too_old: _Optional[int] = ..., refused_new_users: _Optional[int] = ..., refused_too_many: _Optional[int] = ...) -> None: ...
