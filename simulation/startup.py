"""The loading of a simulated server: vLLM's phases in order, with its log lines, spread over the start time."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from simulation.failures import (
    Failure,
    failure_of,
    print_api_failure,
    print_engine_failure,
    print_lost_engine,
)
from simulation.flags import Options
from simulation.knobs import Knobs
from simulation.log import err, log
from simulation.memory import GIB, Ledger, MemoryFailure
from simulation.processes import EXIT, SERVING, EngineProcess, spawn_engines

VERSION = "0.32.0"
LOGO = ("\n       █     █     █▄   ▄█\n ▄▄ ▄█ █     █     █ ▀▄▀ █  version {version} (simulated)\n"
        "  █▄█▀ █     █     █     █  model   {model}\n   ▀▀  ▀▀▀▀▀ ▀▀▀▀▀ ▀     ▀\n")


class StartFailed(Exception):
    """The server failed to start and has printed why; the process exits with 1."""


@dataclass(frozen=True)
class Phase:
    name: str                           # failures.py says which phase a failure interrupts
    share: float                        # of the start time, before it
    print: Callable[[], None]
    take: Callable[[], object] | None = None    # memory, before it is printed; raises MemoryFailure


def runner_of(options: Options) -> str:
    """generate, pooling or transcription: as the flag says, else as the model's name suggests."""
    name = options.model.lower()
    if options.runner != "auto":
        return options.runner
    if "whisper" in name:
        return "transcription"
    return "pooling" if any(word in name for word in ("bert", "embed", "rerank")) else "generate"


def load(options: Options, knobs: Knobs, ledger: Ledger, started_at: float,
         meanwhile: Callable[[], object]) -> list[EngineProcess]:
    """Prints the phases and makes the engines; `meanwhile` runs while these start.

    Raises StartFailed with everything printed and no child left.
    """
    failure = planned_failure(options, knobs)
    deadline = started_at
    log("APIServer", LOGO.format(version=VERSION, model=options.model), where="api_utils.py:347")
    log("APIServer", f"non-default args: {options.given}", where="api_utils.py:286")
    for phase in api_phases(options):
        deadline += knobs.start_s * phase.share
        _pause_until(deadline, [])
        if failure is not None and failure.phase == phase.name:
            _fail(failure, started_at + (knobs.fail_after_s or 0), [])
        phase.print()
    try:
        engines = spawn_engines(options, knobs, meanwhile)
    except OSError as error:
        log("EngineCore", f"EngineCore failed to start.\n{error}", where="core.py:1510", level="ERROR")
        print_lost_engine()
        raise StartFailed from error
    try:
        for phase in engine_phases(options, knobs, ledger, engines):
            deadline += knobs.start_s * phase.share
            _pause_until(deadline, engines)
            if failure is not None and failure.phase == phase.name:
                _fail(failure, started_at + (knobs.fail_after_s or 0), engines)
            try:
                if phase.take is not None:
                    phase.take()
            except MemoryFailure as short:
                _fail(Failure("engine", phase.name, short.error, short.message, also_logged=short.also_logged),
                      started_at, engines)
            phase.print()
        _pause_until(started_at + knobs.start_s, engines)
    except StartFailed:
        end_engines(engines)
        ledger.release()
        raise
    for engine in engines:
        engine.tell(SERVING)
    return engines


def planned_failure(options: Options, knobs: Knobs) -> Failure | None:
    if options.enable_sleep_mode and knobs.device == "cpu":
        return failure_of("sleep_mode_unsupported", options)
    if knobs.fail in ("", "bad_flag", "port_in_use") or not fails_now(knobs):
        return None
    return failure_of(knobs.fail, options)


def fails_now(knobs: Knobs) -> bool:
    """False when this start is past the first `fail_times`.  Counts it, once a process."""
    if knobs.fail_times is None:
        return True
    with open(knobs.fail_counter, "ab") as counter:
        counter.write(b".")
        counter.flush()
        return counter.tell() <= knobs.fail_times


def end_engines(engines: list[EngineProcess]) -> None:
    for engine in engines:
        engine.tell(EXIT)
    for engine in engines:
        os.waitpid(engine.pid, 0)


def _fail(failure: Failure, at: float, engines: list[EngineProcess]) -> NoReturn:
    _pause_until(at, engines)
    if failure.process == "api":
        print_api_failure(failure)
    else:
        print_engine_failure(failure, engines[0].name, engines[0].pid, engines[0].device_processes[0])
    raise StartFailed


def _pause_until(deadline: float, engines: list[EngineProcess]) -> None:
    """Raises StartFailed when an engine dies meanwhile."""
    delay_s = deadline - time.monotonic()
    if delay_s > 0 and not engines:
        time.sleep(delay_s)
        return
    dead, _, _ = select.select([engine.alive_fd for engine in engines], [], [], max(0.0, delay_s))
    if dead:
        print_lost_engine()
        raise StartFailed


def api_phases(options: Options) -> Iterator[Phase]:
    def say(message: str, where: str) -> Callable[[], None]:
        return lambda: log("APIServer", message, where=where)

    architecture = {"pooling": "BertModel", "transcription": "WhisperForConditionalGeneration"}.get(
        runner_of(options), "LlamaForCausalLM")
    yield Phase("config", 0.05, say(f"Resolved architecture: {architecture}", "model.py:733"))
    yield Phase("architecture", 0.01, say(f"Using max model len {options.max_model_len}", "model.py:2152"))
    yield Phase("scheduler", 0, say("Chunked prefill is enabled with max_num_batched_tokens=8192.", "scheduler.py:307"))


def engine_phases(options: Options, knobs: Knobs, ledger: Ledger, engines: list[EngineProcess]) -> Iterator[Phase]:
    engine = engines[0]
    worker_pid, worker = engine.device_processes[0]
    weights, cache, tokens = ledger_figures(knobs, ledger)

    def core(message: Callable[[], str], where: str) -> Callable[[], None]:
        return lambda: log(engine.name, message(), where=where, pid=engine.pid)

    def work(message: Callable[[], str], where: str) -> Callable[[], None]:
        return lambda: log(worker, message(), where=where, pid=worker_pid)

    yield Phase("engine", 0.24, core(
        lambda: f"Initializing a V1 LLM engine (v{VERSION}) with config: model={options.model!r}, simulated=True, "
        f"max_seq_len={options.max_model_len}, tensor_parallel_size={options.tensor_parallel_size}, "
        f"device_config={knobs.device}, enforce_eager={options.enforce_eager}", "core.py:133"),
        lambda: ledger.begin([pid for each in engines for pid, _ in each.device_processes]))
    yield Phase("load", 0.1, work(lambda: f"Starting to load model {options.model}...", "gpu_model_runner.py:5040"))
    for done in range(5):
        yield Phase("shards", 0.05, _bar("Loading safetensors checkpoint shards: ", done, 4, "Completed | "),
                    partial(ledger.take_weights, done / 4))
    yield Phase("weights", 0, work(lambda: f"Loading weights took {knobs.start_s / 4:.2f} seconds",
                                   "default_loader.py:501"))
    yield Phase("weights", 0, work(
        lambda: f"Model loading took {weights() / GIB:.2f} GiB memory and {knobs.start_s / 3:.6f} seconds",
        "gpu_model_runner.py:5150"))
    if not options.enforce_eager:
        yield Phase("compile", 0.15, work(lambda: f"torch.compile took {knobs.start_s / 10:.2f} s in total",
                                          "monitor.py:53"))
    yield Phase("profile", 0.05, work(lambda: f"Available KV cache memory: {cache() / GIB:.2f} GiB",
                                      "gpu_worker.py:760"), ledger.profile)
    yield Phase("cache", 0.05, core(
        lambda: f"{'CPU' if knobs.device == 'cpu' else 'GPU'} KV cache size: {tokens():,} tokens, Maximum concurrency "
        f"for {options.max_model_len:,} tokens per request: {tokens() / options.max_model_len:.2f}x",
        "kv_cache_utils.py:2327"), ledger.take_cache)
    if knobs.device != "cpu":
        yield from _graph_phases(options, ledger, weights, work)
    yield Phase("warm", 0.02, core(
        lambda: f"init engine (profile, create kv cache, warmup model) took {knobs.start_s / 2:.2f} s", "core.py:402"))


def ledger_figures(knobs: Knobs, ledger: Ledger) -> tuple[Callable[[], int], Callable[[], int], Callable[[], int]]:
    """Bytes of weights, bytes of the KV cache and its tokens, on one device; made up where no device is simulated."""
    made_up = int((knobs.memory_mb or 1024) * (1 << 20)) // 2

    def cache() -> int:
        return ledger.ranks[0].cache_bytes if ledger.ranks else made_up

    def tokens() -> int:
        per_token = ledger.share.kv_per_token
        return int(cache() / per_token) if ledger.ranks and per_token else 524288

    return lambda: ledger.share.weights if ledger.ranks else made_up, cache, tokens


def _graph_phases(options: Options, ledger: Ledger, weights: Callable[[], int],
                  work: Callable[[Callable[[], str], str], Callable[[], None]]) -> Iterator[Phase]:
    if not options.enforce_eager:
        for done in range(5):
            yield Phase("graphs", 0.01, _bar("Capturing CUDA graphs: ", done, 4, "| "))
        yield Phase("graphs", 0, work(lambda: "Graph capturing finished in 1 secs, took 0.12 GiB",
                                      "gpu_model_runner.py:6582"))
    if options.kv_cache_memory_bytes:
        return      # then vLLM has measured nothing that it could tell

    def usage() -> str:
        free, total, utilization = ledger.start_figures()
        return (f"Free memory on device ({free / GIB:.2f}/{total / GIB:.2f} GiB) on startup. Desired GPU memory "
                f"utilization is ({utilization}, {total * utilization / GIB:.2f} GiB). Actual usage is "
                f"{(weights() + ledger.share.overhead) / GIB - 0.22:.2f} GiB for consumed memory (weights + "
                "non-torch), 0.10 GiB for peak activation, and 0.12 GiB for CUDAGraph memory.")
    yield Phase("usage", 0, work(usage, "gpu_worker.py:1012"))


def _bar(title: str, done: int, total: int, unit: str) -> Callable[[], None]:
    """One step of a progress bar: it overwrites itself after a carriage return, and the last step ends the line."""
    text = f"\r{title}{100 * done // total:3d}% {unit}{done}/{total} [00:00<00:00, 12.50it/s]"
    return lambda: err(text, end="\n\n" if done == total else "")


def announce(options: Options, paths: list[tuple[str, str]], address: str) -> None:
    """The last lines before the server listens; `paths` are its routes with their methods."""
    log("APIServer", f"Supported tasks: ['{runner_of(options)}']", where="entry.py:136")
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        log("APIServer", "SECURITY WARNING: Development endpoints are enabled! This should NOT be used in production!",
            where="__init__.py:44", level="WARNING")
    log("APIServer", f"Starting vLLM server on {address}", where="entry.py:140")
    log("APIServer", "Available routes are:", where="launcher.py:186")
    for method, path in paths:
        log("APIServer", f"Route: {path}, Methods: {method}", where="launcher.py:195")
