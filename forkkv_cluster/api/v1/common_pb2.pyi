from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Sharing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARING_UNSPECIFIED: _ClassVar[Sharing]
    SHARING_ISOLATED: _ClassVar[Sharing]
    SHARING_RESIDUAL: _ClassVar[Sharing]
    SHARING_EAGER: _ClassVar[Sharing]
    SHARING_BASE: _ClassVar[Sharing]
    SHARING_AUTO: _ClassVar[Sharing]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
SHARING_UNSPECIFIED: Sharing
SHARING_ISOLATED: Sharing
SHARING_RESIDUAL: Sharing
SHARING_EAGER: Sharing
SHARING_BASE: Sharing
SHARING_AUTO: Sharing
PRIORITY_UNSPECIFIED: Priority
PRIORITY_HIGH: Priority
PRIORITY_NORMAL: Priority
PRIORITY_LOW: Priority

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("code", "message", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PrefixUsage(_message.Message):
    __slots__ = ("base_hit_tokens", "residual_hit_tokens", "useful_hit_tokens", "prefill_tokens_run")
    BASE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USEFUL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_RUN_FIELD_NUMBER: _ClassVar[int]
    base_hit_tokens: int
    residual_hit_tokens: int
    useful_hit_tokens: int
    prefill_tokens_run: int
    def __init__(self, base_hit_tokens: _Optional[int] = ..., residual_hit_tokens: _Optional[int] = ..., useful_hit_tokens: _Optional[int] = ..., prefill_tokens_run: _Optional[int] = ...) -> None: ...
