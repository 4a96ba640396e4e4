"""The shapes of the answers, for editors and type checkers.  At run time they are plain dicts, as the server sent them.

Times in seconds, memory in bytes.  What an engine adds beyond these keys is there too.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

# --- inference ---------------------------------------------------------------------------------------------------


class Message(TypedDict):
    """One message of a chat.  `content` is a text, or a list of parts (text, images, ...)."""

    role: str
    content: NotRequired[Any]
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


class AnswerMessage(TypedDict):
    role: str
    content: str
    reasoning: NotRequired[str | None]
    tool_calls: NotRequired[list[dict[str, Any]]]


class Usage(TypedDict):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: NotRequired[int]


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    finish_reason: str | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(TypedDict, total=False):
    role: str
    content: str | None
    reasoning: str | None
    tool_calls: list[dict[str, Any]]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    finish_reason: str | None


class ChatChunk(TypedDict):
    """One event of a streamed chat.  `choices` is empty in the last one when usage was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionChoice(TypedDict):
    index: int
    text: str
    finish_reason: str | None


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Embedding(TypedDict):
    index: int
    object: Literal["embedding"]
    embedding: list[float]


class Embeddings(TypedDict):
    id: str
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


# --- models and instances ----------------------------------------------------------------------------------------


class InstanceOfModel(TypedDict):
    id: str
    status: str


class ServerOfModel(TypedDict):
    url: str
    status: str


class Model(TypedDict):
    """A model that may be named in requests.  `root` is the path or hub id that it was loaded from, `servers` have it
    on other machines, `via` are the vllm-servers on the way to it, the asked one first."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    status: str
    instances: list[InstanceOfModel]
    servers: list[ServerOfModel]
    via: list[str]


class InstanceMemory(TypedDict):
    planned_bytes: int | None
    measured_bytes: int | None
    configured_bytes: int | None


class LastError(TypedDict):
    code: str
    message: str
    detail: str | None
    suggestion: dict[str, Any] | None


class Figures(TypedDict):
    """Of the last few seconds.  None is what nobody knows; `ttft_s` is the mean time to a first token."""

    tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    requests_per_s: float
    ttft_s: float | None
    in_flight: int
    waiting: float
    cache_usage: float | None


class Instance(TypedDict):
    """`why` it is in its state, for `elapsed` seconds; `because`: why it stands on these devices; `expected`: seconds
    that this start or wake took before."""

    id: str
    object: Literal["instance"]
    model_name: str
    aliases: list[str]
    status: str
    why: str
    because: str | None
    phase: str | None
    progress: float | None
    elapsed: float
    expected: float | None
    port: int | None
    pid: int | None
    gpus: list[int]
    memory: InstanceMemory
    params: dict[str, Any]
    flags: dict[str, Any]
    env: list[str]
    timeout: float
    expires_in: float | None
    in_flight: int
    sleep: int
    asleep: int | None
    stop_after: float | None
    priority: int
    pinned: bool
    configured_as: str | None
    added_for_load: bool
    made_with_new: bool
    created: int
    last_used: int
    restarts: int
    retry_in: float | None
    engine: dict[str, Any]
    last_error: LastError | None
    simulated: bool
    load: Figures


class BriefInstance(TypedDict):
    id: str
    status: str
    phase: str | None
    progress: float | None
    gpus: list[int]
    in_flight: int


class Replicas(TypedDict):
    """Where `max` is more than 1, their number follows the load: how many run, are wanted, and why."""

    min: int
    max: int
    running: NotRequired[int]
    wanted: NotRequired[int]
    because: NotRequired[str]


class ConfiguredModel(TypedDict):
    """A model of config.yaml.  Times that are None are the server's defaults."""

    id: str
    object: Literal["model"]
    model_path: str
    aliases: list[str]
    status: str
    instances: list[BriefInstance]
    params: dict[str, Any]
    env: list[str]
    gpus: int | list[int] | None
    memory_bytes: int | None
    param_count: float | None
    precision: str | None
    idle_timeout: float | None
    start_timeout: float | None
    sleep: int
    stop_after: float | None
    preload: bool
    pinned: bool
    priority: int
    replicas: Replicas


class Displaced(TypedDict):
    id: str
    model: str | None


class Plan(TypedDict):
    """What a load would do: `sleep` and `stop` are who would go for it, `source` is where the bytes come from."""

    object: Literal["plan"]
    model: str
    fits: bool
    gpus: list[int]
    bytes_per_gpu: int | None
    source: str
    sleep: list[Displaced]
    stop: list[Displaced]
    seconds_expected: float | None
    because: str


class DeviceMemory(TypedDict):
    total: int
    used: int
    free: int


class DeviceProcess(TypedDict):
    pid: int
    memory: int | None


class Device(TypedDict):
    """A GPU, or (`kind` "host") the machine's memory where there is none."""

    index: int
    uuid: str
    name: str
    kind: str
    memory: DeviceMemory
    utilization: float | None
    temperature_c: int | None
    processes: list[DeviceProcess]
    error: str | None
    instances: list[str]


class Devices(TypedDict):
    object: Literal["list"]
    driver: str | None
    cuda: str | None
    data: list[Device]


class ConfigState(TypedDict):
    """Which config.yaml is in force, and what is wrong with the one on disk."""

    file: str | None
    error: str | None


class Health(TypedDict):
    status: str
    instances: int
    ready: int
    vllm_processes: int
    config: ConfigState
    version: str
    simulated: bool


class Version(TypedDict):
    version: str
    simulated: bool


AuditEntry = TypedDict("AuditEntry", {      # "from" is no name for a field of a class
    "at": float, "who": str, "from": str | None, "method": str, "path": str, "status": int, "code": str | None,
    "id": str | None, "model": str | None, "request_id": str})
"""One call to the management.  `at` is wall clock seconds; `id` and `model` are of the instance that was answered."""


class ReloadedModels(TypedDict):
    added: list[str]
    removed: list[str]
    changed: list[str]


class Reload(TypedDict):
    object: Literal["reload"]
    changed: list[str]
    models: ReloadedModels


# --- what goes on ------------------------------------------------------------------------------------------------


class BackendLoad(TypedDict):
    """An instance, or a server on another machine (`kind`).  Rates are of the last few seconds, and of instances only;
    the last fields are mvllm's names for some of the others."""

    id: str
    kind: str
    url: str | None
    health: str
    why: str
    status: bool
    running: float
    waiting: float
    in_flight: int
    capacity: int
    weight: float
    utilization: float
    cache_usage: float | None
    circuit: str
    models: list[str]
    tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    requests_per_s: float | None
    ttft_s: float | None
    current_load: float
    max_capacity: int
    available_capacity: float
    utilization_percent: float
    last_updated: str | None


class LoadSummary(TypedDict):
    """Capacity and load are those of the backends that serve."""

    total_servers: int
    healthy_servers: int
    total_running: float
    total_waiting: float
    total_active_load: float
    total_capacity: float
    overall_utilization_percent: float


class LoadStats(TypedDict):
    servers: list[BackendLoad]
    summary: LoadSummary
    policy: str


class History(TypedDict):
    """Of the last hour, column by column (names as in Figures), each as long as `at`; `total` of all together."""

    object: Literal["history"]
    every_s: float
    kept_s: float
    at: list[float]
    total: dict[str, list[float | None]]
    instances: dict[str, dict[str, Any]]
    models: dict[str, dict[str, list[float | None]]]


Event = TypedDict("Event", {      # "from" is no name for a field of a class
    "id": int, "at": float, "event": str, "instance": NotRequired[str], "model": NotRequired[str],
    "from": NotRequired[str | None], "to": NotRequired[str], "why": NotRequired[str], "phase": NotRequired[str],
    "progress": NotRequired[float | None]})
"""What happened: a `state` that an instance came into, or a `phase` of its load.  `at` is wall clock seconds."""


class RecentRequest(TypedDict):
    """A request for a model, as it was answered.  `seconds` is None while its answer goes on."""

    at: float
    model: str | None
    backend: str | None
    path: str
    status: int | None
    code: str | None
    key: str | None
    first_byte_s: float | None
    seconds: float | None
    request_id: str
