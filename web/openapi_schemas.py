"""The shapes of what the daemon takes and answers, as JSON Schema.  Data: a new field of an answer gets its line here.

Every answer of the tests' daemon is held against these (tests/contract.py), in both directions: a field that stands
here and not in the answer, or there and not here, fails.
"""

from __future__ import annotations

from typing import Any

from instances.instance import State
from web.shown import UNLOADED

Schema = dict[str, Any]


# --- words ------------------------------------------------------------------------------------------------------------

def text(what: str = "", **more: Any) -> Schema:
    return _about({"type": "string", **more}, what)


def number(what: str = "", **more: Any) -> Schema:
    return _about({"type": "number", **more}, what)


def whole(what: str = "", **more: Any) -> Schema:
    return _about({"type": "integer", **more}, what)


def boolean(what: str = "", **more: Any) -> Schema:
    return _about({"type": "boolean", **more}, what)


def one_of(what: str, *words: str) -> Schema:
    return _about({"type": "string", "enum": list(words)}, what)


def many(item: Schema, what: str = "", **more: Any) -> Schema:
    return _about({"type": "array", "items": item, **more}, what)


def free(what: str, **more: Any) -> Schema:
    """An object with keys of its owner's choice."""
    return _about({"type": "object", **more}, what)


def or_null(schema: Schema) -> Schema:
    """`null` when there is none."""
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"],
            **({"enum": [*schema["enum"], None]} if "enum" in schema else {})}


def record(what: str, optional: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """All fields are there, but those in `optional`."""
    return _about({"type": "object", "required": [name for name in fields if name not in optional],
                   "properties": fields}, what)


def named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(item: Schema) -> Schema:
    """As OpenAI lists: `{"object": "list", "data": [...]}`."""
    return record("", object={"const": "list"}, data=many(item))


def _about(schema: Schema, what: str) -> Schema:
    return {"description": what, **schema} if what else schema


# --- what people send -------------------------------------------------------------------------------------------------

LONGEST_S = 1e9
SECONDS_OR_NULL = {"type": ["number", "null"], "maximum": LONGEST_S}

CREATE = record(
    "An instance to start", ("params", "timeout", "start_timeout", "sleep", "stop_after", "wait", "replace", "new"),
    model_name=text("A Hugging Face id or a local path", minLength=1, maxLength=512, examples=["Qwen/Qwen3-0.6B"],
                    pattern=r"^[!-,.-~]([ -~]*[!-~])?$"),
    params={"description": "Flags of vLLM without the dashes", "type": ["object", "null"],
            "examples": [{"max_model_len": 4096, "gpu_memory_utilization": 0.4}]},
    timeout={**SECONDS_OR_NULL, "minimum": 0,
             "description": "Seconds without a request after which it is stopped or sleeps; 0: never; else "
                            "VLLM_DEFAULT_TIMEOUT"},
    start_timeout={**SECONDS_OR_NULL, "exclusiveMinimum": 0,
                   "description": "Seconds that it may take to load; else START_TIMEOUT"},
    sleep={"description": "Sleep at that level of vLLM when it idles, instead of being stopped; 0 or off: no",
           "enum": [0, 1, 2, "off", False, None]},
    stop_after={**SECONDS_OR_NULL, "exclusiveMinimum": 0,
                "description": "Seconds asleep after which it is stopped; else when its memory is wanted"},
    wait=boolean("Answer when it is ready, or with the cause of its failure", default=False),
    replace=boolean("If the model is active with other flags: stop it, and start with these", default=False),
    new=boolean("One more replica of the model; not together with `replace`", default=False))

WAIT = record("", ("wait",), wait=boolean("Answer when it is done, or with why not", default=False))

UNLOAD = record("", ("wait", "force"), wait=boolean("Answer when it has gone", default=False),
                force=boolean("Cut the requests in flight", default=False))

SLEEP = record("", ("level", "wait"), wait=boolean("Answer when it sleeps", default=False),
               level={"description": "1: weights to the host's memory, 2: weights discarded; else as it was made for",
                      "enum": [1, 2, None]})

ADAPTER = record("Other fields go to the engine as they are", ("lora_path",), model=text("Whose engine gets it"),
                 lora_name=text("The adapter's name, which then routes there"), lora_path=text())

INFERENCE = record("`model` names the model; all else is vLLM's, and goes to its engine unchanged", (),
                   model=text(minLength=1, maxLength=1024))

CHAT = record("Other fields (`temperature`, `tools`, ...) go to the engine unchanged", ("stream", "max_tokens"),
              model=text(minLength=1, maxLength=1024), stream=boolean("Answer in server-sent events", default=False),
              messages=many(free("`role` and `content`, as in OpenAI's API")), max_tokens=whole(minimum=1))

COMPLETION = record("Other fields go to the engine unchanged", ("stream", "max_tokens"),
                    model=text(minLength=1, maxLength=1024), prompt={"description": "A text, or a list of them"},
                    stream=boolean("Answer in server-sent events", default=False), max_tokens=whole(minimum=1))

EMBED = record("Other fields go to the engine unchanged", (), model=text(minLength=1, maxLength=1024),
               input={"description": "A text, or a list of them"})

FORM = record("An audio file and the model's name; other fields go to the engine unchanged", (),
              model=text(minLength=1, maxLength=1024), file={"type": "string", "format": "binary"})

# --- what is answered -------------------------------------------------------------------------------------------------

_STATES = [str(state) for state in State]
_BYTES, _SECONDS = whole(minimum=0), number(minimum=0)
_AT = or_null(text("ISO 8601"))
_COLUMN = many(or_null(number()))
COLUMNS = record("", (), **dict.fromkeys((
    "tokens_per_s", "prompt_tokens_per_s", "requests_per_s", "ttft_s", "in_flight", "waiting", "cache_usage"), _COLUMN))
_CHOICES = many(free("As vLLM and OpenAI write it"))
_USAGE = or_null(free("`prompt_tokens`, `completion_tokens`, `total_tokens`"))

SCHEMAS: dict[str, Schema] = {
    "Error": record(
        "OpenAI's envelope, of every error of the daemon", error=record(
            "", message=text("For people: what happened, and what to do"), type=text(),
            param=or_null(text("The field that is wrong")), code=text("For programs"))),

    "Instance": record(
        "One `vllm serve`",
        id=text(), object={"const": "instance"}, model_name=text("As it was asked for"),
        aliases=many(text(), "Its other names in requests"),
        status=one_of("`README.md` tells what each means", *_STATES),
        why=text("Why it is in this status"), because=or_null(text("Why it stands on these devices")),
        phase=or_null(text("Of its start")),
        progress=or_null(number("Of its start", minimum=0, maximum=1)), elapsed=number("Seconds in this status"),
        expected=or_null(number("Seconds that this start or wake should take, by those before")),
        port=or_null(whole()), pid=or_null(whole()),
        gpus=many(whole(), "Indexes of its devices"),
        memory=record("In bytes, on each of its devices", planned_bytes=or_null(_BYTES), measured_bytes=or_null(_BYTES),
                      configured_bytes=or_null(_BYTES)),
        params=free("Flags that were asked for; secrets are hidden"), flags=free("Flags that it runs with"),
        env=many(text(), "Names of variables of its own"),
        timeout=number("Idle seconds after which it is stopped or sleeps; 0: never"),
        expires_in=or_null(number("Seconds until then")), in_flight=whole("Requests", minimum=0),
        sleep=whole("Level at which it may sleep; 0: not"), asleep=or_null(whole("Level at which it sleeps")),
        stop_after=or_null(_SECONDS), priority=whole(), pinned=boolean(),
        configured_as=or_null(text("Its id in config.yaml")),
        added_for_load=boolean("One more replica that the load called for"),
        made_with_new=boolean("Made with `new`: its model's replicas are counted without it"),
        created=whole("Unix time"), last_used=whole("Unix time"),
        restarts=whole(minimum=0), retry_in=or_null(_SECONDS), engine=free("What its start-up log told"),
        last_error=or_null(named("LastError")), simulated=boolean("Whether no model answers"), load=named("Figures")),

    "Figures": record(
        "Of the last few seconds; null is what nobody knows", tokens_per_s=or_null(number("Generated")),
        prompt_tokens_per_s=or_null(number()), requests_per_s=number("Answered"),
        ttft_s=or_null(number("To the first token, their mean")), in_flight=whole(), waiting=number("In the engine"),
        cache_usage=or_null(number("Of its KV cache, 0 to 1"))),

    "LastError": record(
        "Why it failed; `README.md` lists the codes", code=text(), message=text(),
        detail=or_null(text("The decisive line of its log")),
        suggestion=or_null(free("Params with which a start would get further"))),

    "Model": record(
        "What requests may name", id=text(), object={"const": "model"}, created=whole(), owned_by=text(),
        root=text("Where it is loaded from"), status=one_of("", *_STATES, UNLOADED, "down"),
        instances=many(record("", id=text(), status=one_of("", *_STATES))),
        servers=many(record("", url=text(), status=text()), "On other machines"),
        via=many(text(), "The vllm-servers on the way to it, this one first")),

    "ConfiguredModel": record(
        "A model of config.yaml; times that are null are the daemon's defaults", id=text(), object={"const": "model"},
        model_path=text(), aliases=many(text()), status=one_of("", *_STATES, UNLOADED),
        instances=many(record("", id=text(), status=one_of("", *_STATES), phase=or_null(text()),
                              progress=or_null(number()), gpus=many(whole()), in_flight=whole())),
        params=free("Secrets are hidden"), env=many(text(), "Names only"),
        gpus={"description": "How many, or which", "type": ["integer", "array", "null"], "items": whole()},
        memory_bytes=or_null(_BYTES), param_count=or_null(number()), precision=or_null(text()),
        idle_timeout=or_null(_SECONDS), start_timeout=or_null(_SECONDS), sleep=whole(), stop_after=or_null(_SECONDS),
        preload=boolean(), pinned=boolean(), priority=whole(), replicas=named("Replicas")),

    "Replicas": record(
        "How many instances; where `max` is more than 1, as the load is", ("running", "wanted", "because"),
        min=whole(), max=whole(), running=whole("Those that serve or will, not asleep"), wanted=whole(),
        because=text("What the last look at the load came to")),

    "Plan": record(
        "What a load would do", object={"const": "plan"}, model=text(), fits=boolean(), gpus=many(whole()),
        bytes_per_gpu=or_null(_BYTES), source=text("Where the bytes come from"),
        sleep=many(named("Displaced"), "Who would sleep for it"), stop=many(named("Displaced"), "Who would be stopped"),
        seconds_expected=or_null(_SECONDS), because=text()),

    "Displaced": record("", id=text(), model=or_null(text())),

    "Devices": record(
        "GPUs, or the host's memory where there is none", object={"const": "list"}, driver=or_null(text()),
        cuda=or_null(text()), data=many(named("Device"))),

    "Device": record(
        "", index=whole(), uuid=text(), name=text(), kind=text("`host` where there is no GPU"),
        memory=record("In bytes", total=_BYTES, used=_BYTES, free=_BYTES),
        utilization=or_null(number(minimum=0, maximum=1)), temperature_c=or_null(whole()),
        processes=many(record("", pid=whole(), memory=or_null(_BYTES))), error=or_null(text("Of its driver")),
        instances=many(text(), "Ids of those on it")),

    "Reloaded": record(
        "What has changed", object={"const": "reload"}, changed=many(text(), "Settings"),
        models=record("", added=many(text()), removed=many(text()), changed=many(text()))),

    "AuditEntry": record(
        "One call to the management", (), at=number("Unix time"), who=text("The key's name"),
        **{"from": or_null(text("Address"))}, method=text(), path=text(), status=whole(), code=or_null(text()),
        id=or_null(text("Of the instance that was answered")), model=or_null(text()), request_id=text()),

    "History": record(
        "A sample every few seconds, column by column, each as long as `at`", object={"const": "history"},
        every_s=number(), kept_s=number(), at=many(number("Unix time")), total=named("Columns"),
        instances=free("By id; `model` beside the columns", additionalProperties={
            **COLUMNS, "required": ["model", *COLUMNS["required"]],
            "properties": {"model": text(), **COLUMNS["properties"]}}),
        models=free("By name", additionalProperties=named("Columns"))),

    "Columns": COLUMNS,

    "Event": record(
        "What happened: a new `state` of an instance, or a `phase` of its load",
        ("instance", "model", "from", "to", "why", "phase", "progress"), id=whole(), at=number("Unix time"),
        event=text("`state`, `phase`"), instance=text(), model=text(), **{"from": or_null(text("State"))},
        to=text("State"), why=text(), phase=text(), progress=or_null(number())),

    "RecentRequest": record(
        "A request for a model, never what it asked", at=number("Unix time"), model=or_null(text()),
        backend=or_null(text("Who answered: an instance's id or a server")), path=text(), status=or_null(whole()),
        code=or_null(text("Of the daemon's own error")), key=or_null(text("Name of the key that came with it")),
        first_byte_s=or_null(number()), seconds=or_null(number("All of it; null: its answer goes on")),
        request_id=text()),

    "Health": record(
        "", status={"const": "ok"}, instances=whole(), ready=whole(), vllm_processes=whole(),
        config=record("Which config.yaml is in force, and what is wrong with the one on disk", file=or_null(text()),
                      error=or_null(text())),
        version=text(), simulated=boolean("Whether the engine is the simulator")),

    "Version": record("", version=text(), simulated=boolean()),

    "ServerLoad": record("", server_load=whole("Requests in flight, over all instances", minimum=0)),

    "LoadStats": record("", servers=many(named("BackendLoad")), policy=text("ROUTING_POLICY"), summary=record(
        "Capacity and load are those of the ones that serve", total_servers=whole(), healthy_servers=whole(),
        total_running=number(), total_waiting=number(), total_active_load=number(), total_capacity=number(),
        overall_utilization_percent=number())),

    "BackendLoad": record(
        "An instance, or a server on another machine; some figures also under mvllm's names", id=text(),
        kind=one_of("", "instance", "server"), url=or_null(text()), health=text(), why=text(),
        status=boolean("Whether it takes requests"), running=number("As it said last, and what was sent since"),
        waiting=number(), in_flight=whole("Requests of this daemon"), capacity=whole(), weight=number(),
        utilization=number("(running + waiting / 2) / capacity"), cache_usage=or_null(number("Of its KV cache")),
        tokens_per_s=or_null(number("Generated, lately; of instances only, as the following")),
        prompt_tokens_per_s=or_null(number()), requests_per_s=or_null(number()), ttft_s=or_null(number()),
        circuit=text("Of its circuit breaker"), models=many(text()), current_load=number(), max_capacity=whole(),
        available_capacity=number(), utilization_percent=number(), last_updated=_AT),

    "Targets": many(record("", targets=many(text()), labels=free("", additionalProperties={"type": "string"})),
                    "For Prometheus' `http_sd_configs`"),

    "ChatCompletion": record(
        "As vLLM writes it; the most common fields", ("usage",), id=text(), object={"const": "chat.completion"},
        created=whole(), model=text(), choices=_CHOICES, usage=_USAGE),

    "Completion": record(
        "As vLLM writes it; the most common fields", ("usage",), id=text(), object={"const": "text_completion"},
        created=whole(), model=text(), choices=_CHOICES, usage=_USAGE),

    "Embeddings": record(
        "As vLLM writes it; the most common fields", ("usage",), id=text(), object={"const": "list"}, model=text(),
        data=many(free("`index` and `embedding`")), usage=_USAGE),
}

OF_THE_ENGINE = frozenset({"ChatCompletion", "Completion", "Embeddings"})
"""Written by an engine, which may add fields."""
