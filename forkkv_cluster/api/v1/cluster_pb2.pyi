from forkkv_cluster.api.v1 import adapters_pb2 as _adapters_pb2
from forkkv_cluster.api.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetClusterStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "digest", "vocab_size", "max_model_len", "base_bytes_per_token", "dtype", "eos_token_ids")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BASE_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    vocab_size: int
    max_model_len: int
    base_bytes_per_token: int
    dtype: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., base_bytes_per_token: _Optional[int] = ..., dtype: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class PoolStatus(_message.Message):
    __slots__ = ("name", "page_bytes", "num_total", "num_free", "num_cached", "num_pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_bytes: int
    num_total: int
    num_free: int
    num_cached: int
    num_pinned: int
    def __init__(self, name: _Optional[str] = ..., page_bytes: _Optional[int] = ..., num_total: _Optional[int] = ..., num_free: _Optional[int] = ..., num_cached: _Optional[int] = ..., num_pinned: _Optional[int] = ...) -> None: ...

class EngineCounters(_message.Message):
    __slots__ = ("num_steps", "num_finished", "num_failed", "prefill_tokens_run", "output_tokens", "base_hit_tokens", "residual_hit_tokens", "useful_hit_tokens", "cow_copies", "evictions", "preemptions", "peak_base_bytes", "peak_residual_bytes", "swapped_out_pages", "swapped_in_pages", "swapped_out_bytes", "swapped_in_bytes", "calibrations", "probes", "dropped_probes", "demotions")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_RUN_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BASE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USEFUL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COW_COPIES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_RESIDUAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_OUT_PAGES_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_IN_PAGES_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_OUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_IN_BYTES_FIELD_NUMBER: _ClassVar[int]
    CALIBRATIONS_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_PROBES_FIELD_NUMBER: _ClassVar[int]
    DEMOTIONS_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_finished: int
    num_failed: int
    prefill_tokens_run: int
    output_tokens: int
    base_hit_tokens: int
    residual_hit_tokens: int
    useful_hit_tokens: int
    cow_copies: int
    evictions: int
    preemptions: int
    peak_base_bytes: int
    peak_residual_bytes: int
    swapped_out_pages: int
    swapped_in_pages: int
    swapped_out_bytes: int
    swapped_in_bytes: int
    calibrations: int
    probes: int
    dropped_probes: int
    demotions: int
    def __init__(self, num_steps: _Optional[int] = ..., num_finished: _Optional[int] = ..., num_failed: _Optional[int] = ..., prefill_tokens_run: _Optional[int] = ..., output_tokens: _Optional[int] = ..., base_hit_tokens: _Optional[int] = ..., residual_hit_tokens: _Optional[int] = ..., useful_hit_tokens: _Optional[int] = ..., cow_copies: _Optional[int] = ..., evictions: _Optional[int] = ..., preemptions: _Optional[int] = ..., peak_base_bytes: _Optional[int] = ..., peak_residual_bytes: _Optional[int] = ..., swapped_out_pages: _Optional[int] = ..., swapped_in_pages: _Optional[int] = ..., swapped_out_bytes: _Optional[int] = ..., swapped_in_bytes: _Optional[int] = ..., calibrations: _Optional[int] = ..., probes: _Optional[int] = ..., dropped_probes: _Optional[int] = ..., demotions: _Optional[int] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("kind", "name", "num_bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    num_bytes: int
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class AdapterMemoryStatus(_message.Message):
    __slots__ = ("num_registered", "max_on_device", "num_on_device", "num_pinned", "num_loading", "device_bytes", "num_on_host", "host_bytes", "max_host_bytes", "disk_loads", "device_evictions")
    NUM_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    MAX_ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADING_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ON_HOST_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_LOADS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    num_registered: int
    max_on_device: int
    num_on_device: int
    num_pinned: int
    num_loading: int
    device_bytes: int
    num_on_host: int
    host_bytes: int
    max_host_bytes: int
    disk_loads: int
    device_evictions: int
    def __init__(self, num_registered: _Optional[int] = ..., max_on_device: _Optional[int] = ..., num_on_device: _Optional[int] = ..., num_pinned: _Optional[int] = ..., num_loading: _Optional[int] = ..., device_bytes: _Optional[int] = ..., num_on_host: _Optional[int] = ..., host_bytes: _Optional[int] = ..., max_host_bytes: _Optional[int] = ..., disk_loads: _Optional[int] = ..., device_evictions: _Optional[int] = ...) -> None: ...

class AdapterDrift(_message.Message):
    __slots__ = ("adapter", "digest", "sharing", "num_probes", "num_diverged", "agreement", "first_divergence")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    NUM_PROBES_FIELD_NUMBER: _ClassVar[int]
    NUM_DIVERGED_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    FIRST_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    digest: str
    sharing: _common_pb2.Sharing
    num_probes: int
    num_diverged: int
    agreement: _adapters_pb2.Agreement
    first_divergence: int
    def __init__(self, adapter: _Optional[str] = ..., digest: _Optional[str] = ..., sharing: _Optional[_Union[_common_pb2.Sharing, str]] = ..., num_probes: _Optional[int] = ..., num_diverged: _Optional[int] = ..., agreement: _Optional[_Union[_adapters_pb2.Agreement, _Mapping]] = ..., first_divergence: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "epoch", "pid", "device", "num_running", "num_waiting", "num_pinned_pages", "kv_bytes_total", "base_bytes_held", "residual_bytes_held", "pools", "counters", "events_published", "busy_request_ids", "adapters", "host_bytes_total", "host_bytes_held", "sharing_saved_bytes", "holdings", "adapter_memory", "merged_bytes_held", "drift")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_PAGES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BASE_BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    BUSY_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    SHARING_SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_MEMORY_FIELD_NUMBER: _ClassVar[int]
    MERGED_BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    pid: int
    device: str
    num_running: int
    num_waiting: int
    num_pinned_pages: int
    kv_bytes_total: int
    base_bytes_held: int
    residual_bytes_held: int
    pools: _containers.RepeatedCompositeFieldContainer[PoolStatus]
    counters: EngineCounters
    events_published: int
    busy_request_ids: _containers.RepeatedScalarFieldContainer[str]
    adapters: _containers.RepeatedCompositeFieldContainer[_adapters_pb2.Adapter]
    host_bytes_total: int
    host_bytes_held: int
    sharing_saved_bytes: int
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    adapter_memory: AdapterMemoryStatus
    merged_bytes_held: int
    drift: _containers.RepeatedCompositeFieldContainer[AdapterDrift]
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_pinned_pages: _Optional[int] = ..., kv_bytes_total: _Optional[int] = ..., base_bytes_held: _Optional[int] = ..., residual_bytes_held: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[PoolStatus, _Mapping]]] = ..., counters: _Optional[_Union[EngineCounters, _Mapping]] = ..., events_published: _Optional[int] = ..., busy_request_ids: _Optional[_Iterable[str]] = ..., adapters: _Optional[_Iterable[_Union[_adapters_pb2.Adapter, _Mapping]]] = ..., host_bytes_total: _Optional[int] = ..., host_bytes_held: _Optional[int] = ..., sharing_saved_bytes: _Optional[int] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ..., adapter_memory: _Optional[_Union[AdapterMemoryStatus, _Mapping]] = ..., merged_bytes_held: _Optional[int] = ..., drift: _Optional[_Iterable[_Union[AdapterDrift, _Mapping]]] = ...) -> None: ...

class DirectoryStatus(_message.Message):
    __slots__ = ("incarnation", "version", "num_workers", "num_base_blocks", "num_residual_blocks")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_BASE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESIDUAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    version: int
    num_workers: int
    num_base_blocks: int
    num_residual_blocks: int
    def __init__(self, incarnation: _Optional[str] = ..., version: _Optional[int] = ..., num_workers: _Optional[int] = ..., num_base_blocks: _Optional[int] = ..., num_residual_blocks: _Optional[int] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("version", "model", "workers", "directory", "num_sessions", "num_branches", "adapters")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_BRANCHES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: ModelInfo
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    directory: DirectoryStatus
    num_sessions: int
    num_branches: int
    adapters: _containers.RepeatedCompositeFieldContainer[_adapters_pb2.Adapter]
    def __init__(self, version: _Optional[str] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., directory: _Optional[_Union[DirectoryStatus, _Mapping]] = ..., num_sessions: _Optional[int] = ..., num_branches: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[_adapters_pb2.Adapter, _Mapping]]] = ...) -> None: ...
