from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class SeenRequest(_message.Message):
    __slots__ = ("request_id", "positions", "user_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    user_id: int
    def __init__(self, request_id: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., user_id: _Optional[int] = ...) -> None: ...

class SeenResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
