"""The table of routes as the OpenAPI document tells it.  Whoever adds a route to the daemon adds its line here.

tests/test_openapi.py compares it with the daemon's own routes, both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from instances.startup_log import CAUSES
from routing import paths
from web.openapi_schemas import (
    ADAPTER,
    CHAT,
    COMPLETION,
    CREATE,
    EMBED,
    FORM,
    INFERENCE,
    SLEEP,
    UNLOAD,
    WAIT,
    Schema,
    boolean,
    free,
    list_of,
    named,
    number,
    text,
    whole,
)

OPEN, INFER, MANAGE = "open", "inference", "management"
"""Who may call it: everyone, who has a key for inference, who has one for management."""

TEXT, EVENTS = "text/plain", "text/event-stream"


@dataclass(frozen=True)
class Answer:
    """`schema` None: no body that one can describe."""

    what: str
    schema: Schema | None = None
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """`call` is METHOD and path; `errors` are its own, beside those that everything of this `access` may answer."""

    call: str
    access: str
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    errors: Mapping[int, str] = field(default_factory=dict)
    what: str = ""
    query: Mapping[str, Schema] = field(default_factory=dict)
    body: Schema | None = None
    body_required: bool = False
    body_kinds: tuple[str, ...] = ("application/json",)
    stream: bool = False        # the answer may also come in events
    engine: bool = False        # an engine answers: its own errors pass through as they are

    @property
    def method(self) -> str:
        return self.call.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.call.partition(" ")[2]


NO_INSTANCE = {404: "`not_found`: no such instance; the message says how it ended, if it was there"}
NO_MODEL = {404: "`model_not_found`: the message names those that there are"}
BAD_BODY = {
    400: "The body or the query is wrong; `param` names the field: `bad_request`, `invalid_json`, `missing_field`, "
         "`unknown_field`, `duplicate_field`",
    413: "`request_too_large`: more than 1 MiB", 415: "`unsupported_media_type`: the body is not JSON"}
BAD_QUERY = {400: "`bad_request`: a word of the query is wrong; `param` names it"}
LOAD_FAILURES = {cause.status: "" for cause in CAUSES} | {507: "", 504: "", 503: ""}
FAILED_LOADS = {status: "With `wait`: why it failed to load (`README.md` lists the codes)" for status in LOAD_FAILURES
                if status not in (400, 403, 404, 500)}
ENDS = {503: "`shutting_down`: the daemon ends"}


def merged(*errors: Mapping[int, str]) -> dict[int, str]:
    """What stands in several is told together."""
    found: dict[int, str] = {}
    for each in errors:
        for status, what in each.items():
            found[status] = f"{found[status]}. {what}" if found.get(status) else what
    return found


# --- management -------------------------------------------------------------------------------------------------------

ONE = named("Instance")
MODEL = named("ConfiguredModel")

INSTANCES = (
    Route("GET /instances", MANAGE, "instances", "List the instances", {200: Answer("All of them", list_of(ONE))}),
    Route("POST /instances", MANAGE, "instances", "Start an instance",
          {201: Answer("It was made, and loads; with `wait` it is ready", ONE, headers={"Location": "Where it is"}),
           200: Answer("One with the same model and flags is active: that", ONE, headers={"Location": "Where it is"})},
          merged(BAD_BODY, {
              403: "`unsafe_param`: a flag that names files or code (ALLOW_UNSAFE_PARAMS). With `wait`: `model_gated`",
              404: "With `wait`: `model_not_found`, `bad_model_path`, `no_weights`",
              409: "`instance_exists`: the model is active with other flags; `name_taken`: another model has this name",
              503: "`too_many_instances`, `no_free_port`, `state_dir`"}, ENDS, FAILED_LOADS),
          body=CREATE, body_required=True),
    Route("GET /instances/{instance_id}", MANAGE, "instances", "One instance", {200: Answer("It", ONE)}, NO_INSTANCE),
    Route("DELETE /instances/{instance_id}", MANAGE, "instances", "Stop an instance",
          {200: Answer("It has gone, or had failed before", ONE), 202: Answer("It lets its requests finish", ONE)},
          merged(NO_INSTANCE, BAD_QUERY, ENDS),
          query={"wait": boolean("Answer when it has gone"), "force": boolean("Cut the requests in flight")}),
    Route("POST /instances/{instance_id}/sleep", MANAGE, "instances", "Put an instance to sleep",
          {200: Answer("It sleeps", ONE), 202: Answer("It ends its requests and falls asleep", ONE)},
          merged(NO_INSTANCE, BAD_BODY, ENDS, {
              409: "`not_sleepable`: started without sleep mode; `not_ready`, `not_sleeping`, `no_host_memory`"}),
          body=SLEEP),
    Route("POST /instances/{instance_id}/wake", MANAGE, "instances", "Wake an instance",
          {200: Answer("It serves", ONE), 202: Answer("It wakes", ONE)},
          merged(NO_INSTANCE, BAD_BODY, ENDS, {409: "`not_sleeping`, or with `wait` `not_ready`: it did not wake"}),
          body=WAIT),
    Route("GET /instances/{instance_id}/logs", MANAGE, "instances", "The log of its engine",
          {200: Answer("Lines", text(), TEXT)}, merged(NO_INSTANCE, BAD_QUERY),
          query={"tail": whole("The last lines, so many", minimum=0, maximum=100_000, default=200),
                 "follow": boolean("Go on with what comes, until the instance ends")}),
)

MODELS = (
    Route("GET /admin/models", MANAGE, "models", "The models of config.yaml", {200: Answer("All", list_of(MODEL))}),
    Route("GET /admin/models/{name}", MANAGE, "models", "One of them", {200: Answer("It", MODEL)}, NO_MODEL),
    Route("GET /admin/models/{name}/plan", MANAGE, "models", "What a load would do, without doing it",
          {200: Answer("Whether it fits, where, and who would go for it", named("Plan"))}, NO_MODEL),
    Route("POST /admin/models/{name}/load", MANAGE, "models", "Load a model",
          {200: Answer("It is ready", MODEL), 202: Answer("It loads", MODEL)},
          merged(NO_MODEL, BAD_BODY, {403: "With `wait`: `model_gated`",
                                      503: "`too_many_instances`, `state_dir`"}, ENDS, FAILED_LOADS), body=WAIT),
    Route("POST /admin/models/{name}/unload", MANAGE, "models", "Stop all instances of a model",
          {200: Answer("Nothing of it is left", MODEL), 202: Answer("Its requests end", MODEL)},
          merged(NO_MODEL, BAD_BODY, ENDS), what="The next request loads it again.", body=UNLOAD),
    *(Route(f"POST {path}", MANAGE, "models", f"{'Load' if path == paths.ADAPTERS[0] else 'Unload'} a LoRA adapter",
            {200: Answer("The engine's answer", text(), TEXT)},
            merged(BAD_BODY, NO_MODEL, {409: "", 429: "", **FAILED_LOADS}), body=ADAPTER, body_required=True,
            engine=True) for path in paths.ADAPTERS),
)

DAEMON = (
    Route("GET /gpus", MANAGE, "daemon", "Devices, their memory and what is on them",
          {200: Answer("All", named("Devices"))}),
    Route("GET /admin/audit", MANAGE, "daemon", "Who managed what lately",
          {200: Answer("The newest, oldest first", list_of(named("AuditEntry")))}, BAD_QUERY,
          query={"tail": whole("So many", minimum=0, maximum=1000, default=200)}),
    Route("GET /admin/history", MANAGE, "daemon", "Figures of the last hour",
          {200: Answer("Samples", named("History"))}, BAD_QUERY,
          query={"since": number("Unix time: only what is later")}),
    Route("GET /admin/events", MANAGE, "daemon", "What happened, or what happens",
          {200: Answer("The newest, oldest first", list_of(named("Event")))},
          merged(BAD_QUERY, {503: "`too_many_listeners`"}), stream=True,
          what="With `follow`, or for who accepts nothing but `text/event-stream`: server-sent events as they come, "
               "beside these `instance` (one that changed), `gone` and `sample` (the newest figures). "
               "`Last-Event-ID` asks for what was missed.",
          query={"tail": whole("So many", minimum=0, maximum=500, default=100), "follow": boolean("As they come")}),
    Route("GET /admin/requests", MANAGE, "daemon", "The last requests for models",
          {200: Answer("The newest, oldest first", list_of(named("RecentRequest")))}, BAD_QUERY,
          query={"tail": whole("So many", minimum=0, maximum=1000, default=100), "failed": boolean("Only failures")}),
    Route("POST /admin/reload", MANAGE, "daemon", "Read the settings anew",
          {200: Answer("What has changed", named("Reloaded"))},
          {400: "`bad_config`: what is wrong, with file and line; the old settings stay"}),
    *(Route(f"GET {path}", OPEN, "daemon", "Whether the daemon serves", {200: Answer("It does", named("Health"))})
      for path in ("/health", "/ping")),
    Route("GET /version", OPEN, "daemon", "Its version", {200: Answer("Version", named("Version"))}),
    Route("GET /load-stats", OPEN, "daemon", "The load of each instance and server",
          {200: Answer("All, and their sum", named("LoadStats"))}),
    Route("GET /metrics", OPEN, "daemon", "For Prometheus", {200: Answer("Series", text(), TEXT)}, BAD_QUERY,
          what="docs/METRICS.md lists the series.", query={"instances": boolean("The engines' own series too")}),
    Route("GET /prometheus/targets", OPEN, "daemon", "What Prometheus can scrape",
          {200: Answer("For `http_sd_configs`", named("Targets"))}),
    Route("GET /", OPEN, "daemon", "The page",
          {200: Answer("It", text(), "text/html"), 304: Answer("It is as it was")}),
    Route("GET /dashboard/{file}", OPEN, "daemon", "A file of the page",
          {200: Answer("A script, a style sheet or a picture"), 304: Answer("It is as it was")},
          {404: "`route_not_found`: the page has no such file"}),
    Route("GET /openapi.json", OPEN, "daemon", "This document", {200: Answer("OpenAPI 3.1", free(""))}),
)

# --- inference --------------------------------------------------------------------------------------------------------

ENGINES = {
    404: "`model_not_found`: the message names those that there are. Or the engine has no such route",
    413: "`request_too_large`: more than MAX_REQUEST_BYTES",
    429: "`rate_limit_exceeded`: of the key; `backends_busy`: all that serve it ask for fewer requests",
    502: "`upstream_error`, `engine_died`, `bad_answer`; or why its model failed to load",
    503: "`queue_full`, `stopping`, `engine_stopped`, `no_server_up`, `server_lost`, `shutting_down`; or why its model "
         "failed to load, for now",
    504: "`queue_timeout`: its model is still loading; `upstream_timeout`: no answer in time",
    507: "Memory or disk ran out while its model loaded"}
BY_MODEL = merged(ENGINES, {
    400: "`invalid_json`, `missing_model`, `invalid_model`, `invalid_form`; or a flag with which its model cannot load",
    403: "`model_not_allowed`: the key may not use this model; `model_gated`",
    415: "`unsupported_media_type`: neither JSON nor a form",
    508: "`loop_detected`: it has been here before, two vllm-servers list each other"})

_KNOWN = {
    "/v1/chat/completions": ("Chat", CHAT, named("ChatCompletion")),
    "/v1/completions": ("Complete a text", COMPLETION, named("Completion")),
    "/v1/embeddings": ("Vectors of texts", EMBED, named("Embeddings")),
}
_FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations")


def _by_model(path: str) -> Route:
    summary, body, schema = _KNOWN.get(path, (f"As vLLM's {path}", FORM if path in _FORMS else INFERENCE, None))
    return Route(
        f"POST {path}", INFER, "inference", summary, {200: Answer("The engine's answer, byte for byte", schema)},
        BY_MODEL, body=body, body_required=True, stream=True, engine=True,
        body_kinds=("multipart/form-data",) if path in _FORMS else ("application/json",))


INFERENCE_ROUTES = (
    *map(_by_model, paths.BY_MODEL),
    Route("GET /v1/responses/{response_id}", INFER, "inference", "A response that was made before",
          {200: Answer("The engine's answer")},
          merged({404: "`response_not_found`: no running instance knows it"}, ENGINES), stream=True, engine=True),
    Route("POST /v1/responses/{response_id}/cancel", INFER, "inference", "Cancel it",
          {200: Answer("The engine's answer")},
          merged({404: "`response_not_found`: no running instance knows it"}, ENGINES), engine=True),
    Route(f"GET {paths.REALTIME}", INFER, "inference", "A WebSocket to a model",
          {101: Answer("The connection is the engine's now")},
          merged(BY_MODEL, {426: "`upgrade_required`: this is a WebSocket", 501: ""}),
          query={"model": text("Not needed when only one is active")}, engine=True),
    Route("GET /v1/models", INFER, "inference", "What requests may name",
          {200: Answer("All that this key may use", list_of(named("Model")))}),
    Route("GET /v1/models/{name}", INFER, "inference", "One of them", {200: Answer("It", named("Model"))}, NO_MODEL),
    Route("GET /load", INFER, "inference", "Requests in flight, as vLLM's", {200: Answer("", named("ServerLoad"))}),
    *(Route(f"{method} /proxy/{{instance_id}}/{{path}}", INFER, "inference", "Straight to one instance",
            {200: Answer("The engine's answer")},
            merged(BY_MODEL, {400: "`invalid_path`", 403: "`dev_mode_path`: never reachable",
                              405: "The engine takes no such method there"}),
            what="Whatever the body says.", stream=True, engine=True, body=free("Goes to the engine unchanged")
            if method not in ("GET", "DELETE") else None)
      for method in ("GET", "POST", "PUT", "PATCH", "DELETE")),
)

ROUTES: tuple[Route, ...] = (*INSTANCES, *MODELS, *DAEMON, *INFERENCE_ROUTES)
