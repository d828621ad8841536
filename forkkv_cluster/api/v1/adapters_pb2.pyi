from forkkv_cluster.api.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "sharing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    sharing: _common_pb2.Sharing
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., sharing: _Optional[_Union[_common_pb2.Sharing, str]] = ...) -> None: ...

class Agreement(_message.Message):
    __slots__ = ("num_positions", "num_disagreements", "kl_sum", "lower_bound", "upper_bound")
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_DISAGREEMENTS_FIELD_NUMBER: _ClassVar[int]
    KL_SUM_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_FIELD_NUMBER: _ClassVar[int]
    UPPER_BOUND_FIELD_NUMBER: _ClassVar[int]
    num_positions: int
    num_disagreements: int
    kl_sum: float
    lower_bound: float
    upper_bound: float
    def __init__(self, num_positions: _Optional[int] = ..., num_disagreements: _Optional[int] = ..., kl_sum: _Optional[float] = ..., lower_bound: _Optional[float] = ..., upper_bound: _Optional[float] = ...) -> None: ...

class PolicyAgreement(_message.Message):
    __slots__ = ("sharing", "agreement")
    SHARING_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    sharing: _common_pb2.Sharing
    agreement: Agreement
    def __init__(self, sharing: _Optional[_Union[_common_pb2.Sharing, str]] = ..., agreement: _Optional[_Union[Agreement, _Mapping]] = ...) -> None: ...

class SharingVerdict(_message.Message):
    __slots__ = ("sharing", "state", "reference", "reason", "max_disagreement", "measured", "samples", "decided_s")
    SHARING_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MAX_DISAGREEMENT_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DECIDED_S_FIELD_NUMBER: _ClassVar[int]
    sharing: _common_pb2.Sharing
    state: str
    reference: _common_pb2.Sharing
    reason: str
    max_disagreement: float
    measured: _containers.RepeatedCompositeFieldContainer[PolicyAgreement]
    samples: str
    decided_s: float
    def __init__(self, sharing: _Optional[_Union[_common_pb2.Sharing, str]] = ..., state: _Optional[str] = ..., reference: _Optional[_Union[_common_pb2.Sharing, str]] = ..., reason: _Optional[str] = ..., max_disagreement: _Optional[float] = ..., measured: _Optional[_Iterable[_Union[PolicyAgreement, _Mapping]]] = ..., samples: _Optional[str] = ..., decided_s: _Optional[float] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "digest", "path", "lora_rank", "target_modules", "residual_bytes_per_token", "invocation_tokens", "trained_for", "sharing", "verdict")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    INVOCATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FOR_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    path: str
    lora_rank: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    residual_bytes_per_token: int
    invocation_tokens: _containers.RepeatedScalarFieldContainer[int]
    trained_for: _common_pb2.Sharing
    sharing: _common_pb2.Sharing
    verdict: SharingVerdict
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., path: _Optional[str] = ..., lora_rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., residual_bytes_per_token: _Optional[int] = ..., invocation_tokens: _Optional[_Iterable[int]] = ..., trained_for: _Optional[_Union[_common_pb2.Sharing, str]] = ..., sharing: _Optional[_Union[_common_pb2.Sharing, str]] = ..., verdict: _Optional[_Union[SharingVerdict, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...
