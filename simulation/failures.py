"""How vLLM fails to start: the text of each failure, where it arises, and what is printed around it.

`Failure.phase` is the loading phase (startup.py) that it interrupts.  A failure of the API server is a traceback on
stderr; one of the engine is an ERROR record with the cause on stdout, and after it the API server's own traceback,
which only says that the engine failed.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulation.flags import Options
from simulation.log import err, log
from simulation.memory import GIB, out_of_memory, profiling_text, too_full_text, too_long_text

OFFLINE = ("We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached "
           "files.\nCheck your internet connection or see how to run the library in offline mode at "
           "'https://huggingface.co/docs/transformers/installation#offline-mode'.")


@dataclass(frozen=True)
class Failure:
    process: str                        # "api" or "engine"
    phase: str
    error: str                          # the exception's name, with its module where Python prints it
    message: str
    cause: str = ""                     # the exception that it was raised from, as its last line
    also_logged: str = ""               # an ERROR record before it


def failure_of(code: str, options: Options) -> Failure:
    """The failure that the knob `fail` names, told for this command line."""
    model, length = options.model, options.max_model_len
    utilization = options.gpu_memory_utilization
    memory_error, memory_message, memory_log = out_of_memory(0, 1.96 * GIB, 1.2 * GIB, 79.11 * GIB)
    config = "pydantic_core._pydantic_core.ValidationError"
    validation = ("1 validation error for ModelConfig\n  Value error, {} [type=value_error, "
                  "input_value=ArgsKwargs((), {{'model': ...nderer_num_workers': 1}}), input_type=ArgsKwargs]\n"
                  "    For further information visit https://errors.pydantic.dev/2.14/v/value_error")
    table = {
        "bad_local_path": Failure(
            "api", "config", "OSError", f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{model}'. "
            "Use `repo_type` argument if needed.",
            cause="huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
                  f"'namespace/repo_name': '{model}'. Use `repo_type` argument if needed."),
        "offline": Failure(
            "api", "config", "OSError", OFFLINE,
            cause="huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the file "
                  "on the Hub and we cannot find the requested files in the local cache. Please check your connection "
                  "and try again or make sure your Internet connection is on."),
        "model_not_found": Failure(
            "api", "config", "OSError", f"{model} is not a local folder and is not a valid model identifier listed on "
            "'https://huggingface.co/models'\nIf this is a private repository, make sure to pass a token having "
            "permission to this repo either by logging in with `hf auth login` or by passing `token=<your_token>`"),
        "gated": Failure(
            "api", "config", "OSError", f"You are trying to access a gated repo.\nMake sure to have access to it at "
            f"https://huggingface.co/{model}.\n401 Client Error. Access to model {model} is restricted. You must have "
            "access to it and be authenticated to access it. Please log in."),
        "unsupported_architecture": Failure(
            "api", "config", config, validation.format(
                "Model architectures ['SimulatedForNothing'] are not supported for now. Supported architectures: "
                "dict_keys(['LlamaForCausalLM', 'Qwen3ForCausalLM', 'BertModel'])")),
        "bad_config_transformers": Failure(
            "api", "config", config, validation.format(
                "The checkpoint you are trying to load has model type `simulated` but Transformers does not recognize "
                "this architecture. This could be because of an issue with the checkpoint, or because your version of "
                "Transformers is out of date.")),
        "length_too_large": Failure(
            "api", "architecture", config, validation.format(
                f"User-specified max_model_len ({length}) is greater than the derived max_model_len "
                f"(max_position_embeddings={length // 2}.0 or model_max_length=None in model's config.json). To allow "
                "overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1.")),
        "sleep_mode_unsupported": Failure(
            "api", "architecture", config, validation.format("Sleep mode is not supported on current platform.")),
        "no_weights": Failure(
            "engine", "load", "RuntimeError", f"Cannot find any model weights with `{model}`"),
        "kv_cache_too_small": Failure(
            "engine", "cache", "ValueError", too_long_text(length, 4 * GIB, 1.25 * GIB, length * 5 // 16)),
        "gpu_too_full": Failure(
            "engine", "engine", "ValueError", too_full_text(0, 6.1 * GIB, 79.11 * GIB, utilization)),
        "out_of_memory": Failure("engine", "load", memory_error, memory_message, also_logged=memory_log),
        "profiling_memory": Failure(
            "engine", "profile", "AssertionError", profiling_text(31.5 * GIB, 58.2 * GIB)),
        "engine_error": Failure("engine", "load", "RuntimeError", "simulated failure of the engine"),
    }
    return table[code]


SITE = "/usr/lib/python3.12/site-packages/vllm"
ENTRY = "entrypoints/launchers/api_server/entry.py"
API_FRAMES = (("entrypoints/cli/main.py", 120, "main", "args.dispatch_function(args)"),
              ("entrypoints/cli/serve.py", 156, "cmd", "uvloop.run(run_server(args))"))
SERVER_FRAMES = (*API_FRAMES,
                 (ENTRY, 177, "run_server", "await run_server_worker(listen_address, sock, args, **uvicorn_kwargs)"),
                 (ENTRY, 195, "run_server_worker", "async with build_async_engine_client("))
SOCKET_FRAMES = (*API_FRAMES,
                 (ENTRY, 176, "run_server", "listen_address, sock = setup_server(args, reuse_port=False)"),
                 ("entrypoints/launchers/launcher.py", 348, "create_server_socket", "sock.bind(addr)"))
CONFIG_FRAMES = (*SERVER_FRAMES, ("engine/arg_utils.py", 1955, "create_model_config", "return ModelConfig("))
WAIT_FRAMES = (*SERVER_FRAMES,
               ("v1/engine/core_client.py", 682, "__init__", "with launch_core_engines("),
               ("v1/engine/utils.py", 1431, "wait_for_engine_startup", "raise RuntimeError("))
ENGINE_FRAMES = (("v1/engine/core.py", 1482, "run_engine_core",
                  "engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)"),
                 ("v1/engine/core.py", 144, "__init__", "self.model_executor = executor_class(vllm_config)"))
WORKER_FRAMES = (("v1/executor/multiproc_executor.py", 928, "worker_main", "worker = WorkerProc(*args, **kwargs)"),
                 ("v1/worker/gpu_worker.py", 501, "load_model", "self.model_runner.load_model()"))

Frames = tuple[tuple[str, int, str, str], ...]


def traceback_text(frames: Frames, last: str, cause: str = "") -> str:
    lines = [f'  File "{SITE}/{path}", line {number}, in {name}\n    {source}' for path, number, name, source in frames]
    text = "\n".join(["Traceback (most recent call last):", *lines, last])
    if not cause:
        return text
    return (f"Traceback (most recent call last):\n{lines[0]}\n{cause}\n\n"
            f"The above exception was the direct cause of the following exception:\n\n{text}")


def print_api_failure(failure: Failure, frames: Frames = CONFIG_FRAMES) -> None:
    err(traceback_text(frames, f"{failure.error}: {failure.message}", failure.cause))


def print_engine_failure(failure: Failure, name: str, pid: int, device_process: tuple[int, str]) -> None:
    """`device_process` is the worker, or the engine itself where it has none."""
    worker_pid, worker = device_process
    last = f"{failure.error}: {failure.message}"
    if failure.also_logged:
        log(worker, failure.also_logged, where="gpu_model_runner.py:5147", level="ERROR", pid=worker_pid)
    if worker_pid != pid:
        log(worker, "WorkerProc failed to start.\n" + traceback_text(WORKER_FRAMES, last),
            where="multiproc_executor.py:953", level="ERROR", pid=worker_pid)
        last = ("Exception: WorkerProc initialization failed due to an exception in a background process. See stack "
                "trace for root cause.")
    text = traceback_text(ENGINE_FRAMES, last)
    log(name, "EngineCore failed to start.\n" + text, where="core.py:1510", level="ERROR", pid=pid)
    err(f"Process {name}:\n{text}")
    print_lost_engine()


def print_lost_engine() -> None:
    err(traceback_text(WAIT_FRAMES, "RuntimeError: Engine core initialization failed. See root cause above. Failed "
                                    "core proc(s): {}"))
