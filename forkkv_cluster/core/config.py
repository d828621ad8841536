"""The one configuration file: a typed schema with a doc line, unit and default for each field.

Unknown keys and bad values are refused by name at start. ``forkkv serve --config cluster.yaml`` reads YAML (or JSON,
which is YAML); ``forkkv config`` prints this schema with its defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import Sharing, WriterMode

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}

_REFUSED = {
    "quantization": "quantised weights",
    "speculative_decoding": "speculative decoding",
    "disaggregation": "prefill/decode disaggregation",
    "tensor_parallel_size": "tensor parallelism",
}


def parse_bytes(value: object) -> int:
    """``1GiB``, ``512 MiB``, ``1000000`` -> bytes. Raises ValueError with the accepted forms."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip().lower().replace(" ", "")
    for unit, factor in _UNITS.items():
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    if text.isdigit():
        return int(text)
    raise ValueError("is not a size: write bytes, or a number with KiB, MiB, GiB, for example 512MiB")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class AdapterConfig(_Section):
    """One adapter to load at start."""

    name: Annotated[str, Field(min_length=1, description="Name that clients use as `model` or `adapter`.")]
    path: Annotated[str, Field(description="PEFT directory (adapter_config.json and adapter_model.safetensors).")]
    sharing: Annotated[
        Sharing | None, Field(description="How requests with sharing auto are served on it. Empty: defaults.adapter_sharing.")
    ] = None


class ModelConfig(_Section):
    """The base model and how it runs."""

    path: Annotated[str, Field(description="Hugging Face checkpoint directory. Empty: the embedded casebook model.")] = ""
    name: Annotated[str, Field(description="Name that clients use. Empty: the directory's name.")] = ""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Computation and KV dtype; auto: the checkpoint's on a GPU, float32 on a CPU."),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"],
        Field(description="auto: the checkpoint's safetensors; dummy: random weights from its config.json alone."),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="Accelerator; auto takes cuda when present.")] = "auto"
    max_model_len: Annotated[int, Field(ge=0, description="Longest sequence, tokens. 0: the model's own limit.")] = 0


class CacheConfig(_Section):
    """KV memory of one worker."""

    kv_bytes: Annotated[
        int,
        Field(
            gt=0, description="Bytes for base and residual KV together (also as 512MiB); of each rank, where the model is cut."
        ),
    ] = 256 * 2**20
    host_bytes: Annotated[
        int, Field(ge=0, description="Bytes of host memory for evicted KV, swapped back when cheaper than a prefill. 0: none.")
    ] = 0
    page_size: Annotated[int, Field(ge=1, le=1024, description="Tokens of one page; the same in the whole cluster.")] = 64

    merged_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of kv_bytes, at most, that whole K of adapters over shared context may borrow while nobody "
            "else needs it: decoding is faster with it. 0: never.",
        ),
    ] = 0.5

    @field_validator("kv_bytes", "host_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> int:
        return parse_bytes(value)


class SchedulerConfig(_Section):
    """Continuous batching in one worker."""

    max_num_seqs: Annotated[int, Field(ge=1, description="Sequences that run at once.")] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1, description="Tokens of one step; longer prompts run in chunks.")] = 512
    max_prefill_tokens_beside_decodes: Annotated[
        int,
        Field(
            ge=1,
            description="Prompt tokens of a step in which sequences decode: the longest that a prompt delays a running decode.",
        ),
    ] = 256
    max_num_waiting: Annotated[int, Field(ge=1, description="Waiting requests beyond which new ones are refused.")] = 1024
    max_overtakes: Annotated[
        int,
        Field(
            ge=0,
            description="Later requests that may take an adapter's slot before one that waits for a slot; then the least used "
            "slot is emptied for it.",
        ),
    ] = 16
    max_background_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Tokens of calibration and shadow probes in a step in which requests run: the most that they delay it.",
        ),
    ] = 64
    retry_after_s: Annotated[
        float, Field(gt=0, description="Least retry hint of a refused request, seconds; longer where requests end slowly.")
    ] = 1.0


class AdapterMemoryConfig(_Section):
    """Where one worker keeps the weights of its adapters. Those beyond both limits are read from disk again when needed."""

    max_device_adapters: Annotated[
        int, Field(ge=1, description="Adapters on the device at once; sequences of others wait for a slot.")
    ] = 64
    host_bytes: Annotated[
        int, Field(ge=0, description="Bytes of host memory for adapters (also as 512MiB); least recently used ones go first.")
    ] = 2**30

    @field_validator("host_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> int:
        return parse_bytes(value)


class CalibrationConfig(_Section):
    """How an adapter with sharing auto is measured before it shares: beside requests, at the lowest priority."""

    max_disagreement: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="Share of positions, at most, at which a sharing may disagree with isolated: the upper bound (Wilson, "
            "95 %) of the teacher-forced argmax disagreement.",
        ),
    ] = 0.005
    min_positions: Annotated[
        int, Field(ge=1, description="Positions to compare; an adapter with fewer is served isolated.")
    ] = 2000
    samples: Annotated[
        str,
        Field(
            description="JSONL file of sample contexts. Empty: calibration_samples.jsonl in the adapter's directory, else in "
            "the model's, else contexts generated from the vocabulary."
        ),
    ] = ""
    context_tokens: Annotated[int, Field(ge=16, description="Length of a generated context, tokens.")] = 256
    continuation_tokens: Annotated[
        int, Field(ge=1, description="Tokens of the adapter's own greedy output to compare on each sample, at most.")
    ] = 32
    max_samples: Annotated[
        int, Field(ge=1, description="Samples to run, at most: outputs that end early give few positions each.")
    ] = 512
    seed: Annotated[int, Field(ge=0, description="Of generated contexts.")] = 0
    timeout_s: Annotated[
        float, Field(gt=0, description="A calibration that has not ended by then leaves the adapter isolated, seconds.")
    ] = 900.0


class GuardrailConfig(_Section):
    """Shadow probes: finished branches run again under isolated, when nothing waits, to see whether sharing drifts."""

    share: Annotated[
        float, Field(ge=0, le=1, description="Share of finished branches to probe, of adapters that auto chose a sharing for.")
    ] = 0.05
    named_share: Annotated[
        float, Field(ge=0, le=1, description="The same of branches under a sharing that the request or session named.")
    ] = 0.0
    window_positions: Annotated[int, Field(ge=1, description="Positions of the sliding window of one adapter.")] = 4096
    min_positions: Annotated[
        int, Field(ge=1, description="Positions in the window, at least, before an adapter falls back to isolated.")
    ] = 512
    max_pending: Annotated[int, Field(ge=1, description="Branches that wait to be probed; more drop the oldest.")] = 8


class WorkerConfig(_Section):
    """The worker deployment."""

    num_replicas: Annotated[int, Field(ge=1, description="Workers.")] = 2
    num_cpus: Annotated[float, Field(ge=0, description="CPUs that Ray reserves for each worker.")] = 0.5
    num_gpus: Annotated[float, Field(ge=0, description="GPUs that Ray reserves for each worker.")] = 0.0
    num_threads: Annotated[int, Field(ge=1, description="Compute threads of each worker (CPU only).")] = 1
    tensor_parallel: Annotated[
        int, Field(ge=1, description="Processes that one worker's model is cut over; on GPUs, one each: set num_gpus to it.")
    ] = 1
    flush_interval_s: Annotated[float, Field(ge=0, description="Tokens are coalesced for at most this long, seconds.")] = 0.02
    stats_interval_s: Annotated[float, Field(gt=0, description="Period of load reports to the router, seconds.")] = 0.2


class GatewayConfig(_Section):
    """The ingress deployment."""

    num_replicas: Annotated[int, Field(ge=1, description="Gateways; more than one needs a Redis session store.")] = 1
    num_cpus: Annotated[float, Field(ge=0, description="CPUs that Ray reserves for each gateway.")] = 0.2
    max_ongoing_requests: Annotated[int, Field(ge=1, description="Requests in flight in one gateway.")] = 1024
    max_resumes: Annotated[int, Field(ge=0, description="Times a broken stream is resumed on another worker.")] = 3
    resume_grace_s: Annotated[
        float, Field(ge=0, description="A turn with a turn id outlives its client this long, seconds.")
    ] = 30.0
    session_store: Annotated[
        str,
        Field(
            description="`memory:`, `sqlite:PATH` or `redis://HOST:PORT/DB`. A relative PATH counts from where the server "
            "starts."
        ),
    ] = "sqlite:.forkkv/sessions.sqlite"
    api_tokens: Annotated[dict[str, str], Field(description="Bearer token -> tenant. Empty: no authentication.")] = {}
    salt: Annotated[str, Field(description="Server secret that separates tenants' pages; the same in all gateways.")] = "forkkv"

    @model_validator(mode="after")
    def _shared_store(self) -> GatewayConfig:
        if self.num_replicas > 1 and not self.session_store.startswith("redis://"):
            raise ValueError(
                f"num_replicas is {self.num_replicas} but session_store is {self.session_store!r}, which one process owns: "
                "use redis://HOST:PORT/DB, or one gateway"
            )
        if not self.session_store.startswith(("memory:", "sqlite:", "redis://")):
            raise ValueError(f"session_store {self.session_store!r} is not memory:, sqlite:PATH or redis://HOST:PORT/DB")
        return self


class RoutingConfig(_Section):
    """How a worker is chosen. Costs are in blocks of page_size tokens; see routing.policy."""

    policy: Annotated[Literal["prefix_affinity", "round_robin"], Field(description="round_robin is for comparison.")] = (
        "prefix_affinity"
    )
    prefill_scale: Annotated[float, Field(ge=0, description="Weight of a prefill block against a decode block.")] = 4.0
    active_weight: Annotated[float, Field(ge=0, description="Cost of one active request, blocks.")] = 1.0
    memory_weight: Annotated[float, Field(ge=0, description="Cost of new bytes over free bytes, blocks.")] = 8.0
    adapter_load_blocks: Annotated[float, Field(ge=0, description="Cost of loading an adapter, blocks.")] = 4.0
    spill_blocks: Annotated[
        float, Field(ge=0, description="Queued prefill beyond the least loaded that makes a request spill.")
    ] = 256.0
    speculative_ttl_s: Annotated[
        float, Field(gt=0, description="A just-routed prefix counts as present this long, seconds.")
    ] = 5.0


class ServerConfig(_Section):
    """Listening addresses. Plaintext: end TLS in front of it."""

    host: Annotated[
        str,
        Field(
            description="Address to listen on. Ray Serve binds gRPC to every interface: on a loopback host, calls from other "
            "machines are refused; on any other, guard the port."
        ),
    ] = "127.0.0.1"
    http_port: Annotated[int, Field(ge=0, le=65535, description="OpenAI-compatible HTTP. 0: a free port.")] = 8000
    grpc_port: Annotated[int, Field(ge=0, le=65535, description="gRPC. 0: a free port.")] = 9000
    app_name: Annotated[str, Field(min_length=1, description="Ray Serve application name.")] = "forkkv"


class DefaultsConfig(_Section):
    """What a request gets that does not say."""

    session_sharing: Annotated[
        Sharing,
        Field(
            description="Sharing of a session that names none. auto: an adapter shares once a measurement has shown that it "
            "may; any other: whatever it loses."
        ),
    ] = Sharing.AUTO
    adapter_sharing: Annotated[
        Sharing,
        Field(
            description="How requests with sharing auto are served on an adapter that was loaded without one. auto: it is "
            "measured once it has been used. One that is loaded with auto by name is measured at once."
        ),
    ] = Sharing.AUTO
    writer: Annotated[WriterMode, Field(description="Who writes shared base KV: canonical, or first for comparison.")] = (
        WriterMode.CANONICAL
    )
    max_tokens: Annotated[int, Field(ge=1, description="Tokens to generate when a request names no limit.")] = 128


class ClusterConfig(_Section):
    """A whole cluster."""

    model: ModelConfig = ModelConfig()
    adapters: Annotated[tuple[AdapterConfig, ...], Field(description="Adapters to load at start.")] = ()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    adapter_memory: AdapterMemoryConfig = AdapterMemoryConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    guardrail: GuardrailConfig = GuardrailConfig()
    worker: WorkerConfig = WorkerConfig()
    gateway: GatewayConfig = GatewayConfig()
    routing: RoutingConfig = RoutingConfig()
    server: ServerConfig = ServerConfig()
    defaults: DefaultsConfig = DefaultsConfig()

    @model_validator(mode="after")
    def _unique_names(self) -> ClusterConfig:
        names = [adapter.name for adapter in self.adapters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"adapters: the name {name!r} is used {names.count(name)} times; names must be unique")
        return self


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for section in (raw, *(v for v in raw.values() if isinstance(v, dict))):
        for key, feature in _REFUSED.items():
            value = section.get(key)
            if value is True or value not in (None, False, 0, 1, "", {}):
                raise Unsupported(key, value, f"{feature} is not supported", "Remove the key.")


def parse_config(raw: object) -> ClusterConfig:
    """Validate plain data. Raises InvalidArgument that names the first bad field by its dotted path."""
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise InvalidArgument("config", raw, "is not a mapping", "Start from deploy/cluster.yaml.")
    _refuse_unsupported(raw)
    try:
        return ClusterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(_public(first["loc"])) or "config"
        remedy = (
            "Remove it, or see `forkkv config` for the keys there are."
            if first["type"] == "extra_forbidden"
            else ("See `forkkv config` for what is accepted.")
        )
        told = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
        problem = "is not a known key" if first["type"] == "extra_forbidden" else told
        raise InvalidArgument(path, _shown(first["loc"], first.get("input")), problem, remedy) from None


def _public(loc: tuple[int | str, ...]) -> list[str]:
    """The path to a bad field, cut before anything secret: below ``api_tokens`` the keys are the tokens themselves."""
    parts = [str(part) for part in loc]
    return parts[: parts.index("api_tokens") + 1] if "api_tokens" in parts else parts


def _shown(loc: tuple[int | str, ...], value: object) -> object:
    """What an error may say of a bad value: it ends up in logs, and a section may hold secrets."""
    if {"api_tokens", "salt"} & set(loc):
        return "(secret)"
    return f"(section with {', '.join(map(str, value)) or 'nothing'})" if isinstance(value, dict) else value


def load_config(path: str | Path) -> ClusterConfig:
    """Read a YAML or JSON file. Raises InvalidArgument for a missing file, bad YAML, unknown keys and bad values."""
    import yaml  # Here, so that the pure core needs no YAML library unless a file is read.

    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InvalidArgument("config", str(path), f"cannot be read ({error.strerror})", "Name an existing file.") from None
    except UnicodeDecodeError:
        raise InvalidArgument("config", str(path), "is not UTF-8 text", "Name a YAML file.") from None
    except yaml.YAMLError as error:
        raise InvalidArgument("config", str(path), f"is not YAML ({error})", "Mend the file.") from None
    return parse_config(raw)
