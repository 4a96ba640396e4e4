"""What the daemon reads out of vLLM's log, proved on logs of real starts and deaths.

`*.composed.log` could not be had without a GPU or the hub; they are written after the format strings in vLLM's source.
"""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instances.startup_log import CAUSES, MAX_DETAIL_CHARS, PHASES, TAIL_LINES, ActualUsage, Cause, StartupLog

LOGS = Path(__file__).parent / "data" / "startup_logs"
MODEL = "owner/model"


def text_of(name: str) -> str:
    return (LOGS / name).read_bytes().decode()


def read(text: str) -> StartupLog:
    log = StartupLog()
    log.feed(text)
    return log


# (log, exit code, code, status, permanent, what the sentence must name, suggestion)
DEATHS = [
    ("bad_flag.log", 2, "bad_flag", 400, True, ["--no-such-flag"], None),
    ("bad_switch_value.log", 2, "bad_flag", 400, True, ["true", "--no-x"], None),
    ("bad_flag_value.log", 2, "bad_flag_value", 400, True, ["--max-model-len", "many"], None),
    ("bad_choice.log", 2, "bad_flag_value", 400, True, ["--kv-cache-dtype", "float99", "bfloat16"], None),
    ("bad_range.log", 1, "bad_flag_value", 400, True, ["gpu_memory_utilization", "1.5", "less than or equal"], None),
    ("wrong_runner.log", 1, "bad_flag_value", 400, True, ["--runner pooling"], None),
    ("sleep_mode_on_cpu.log", 1, "bad_flag_value", 400, True, ["Sleep mode is not supported"], None),
    ("odd_tensor_parallel.log", 1, "bad_flag_value", 400, True, ["divisible by tensor parallel size (3)"], None),
    ("port_in_use.log", 1, "port_in_use", 503, False, ["9602"], None),
    ("bad_path.log", 1, "bad_model_path", 404, True, [MODEL, "folder"], None),
    ("bad_relative_path.log", 1, "bad_model_path", 404, True, [MODEL, "folder"], None),
    ("empty_folder.log", 1, "bad_model_path", 404, True, [MODEL, "config.json"], None),
    ("config_not_json.log", 1, "bad_model_path", 404, True, ["badjson/config.json", "JSON"], None),
    ("no_weights.log", 1, "no_weights", 404, True, ["models/no-weights", "safetensors"], None),
    ("hub_offline.log", 1, "hub_unreachable", 502, False, [MODEL, "HF_HUB_OFFLINE"], None),
    ("hub_no_network.log", 1, "hub_unreachable", 502, False, [MODEL, "HF_ENDPOINT"], None),
    ("model_gated.composed.log", 1, "model_gated", 403, True, [MODEL, "HF_TOKEN"], None),
    ("model_not_found.composed.log", 1, "model_not_found", 404, True, [MODEL, "name"], None),
    ("revision_not_found.composed.log", 1, "model_not_found", 404, True, ["v9"], None),
    ("unsupported_architecture.log", 1, "unsupported_architecture", 400, True, ["FooForCausalLM"], None),
    ("unknown_model_type.log", 1, "unsupported_architecture", 400, True, ["foonet"], None),
    ("remote_code.log", 1, "remote_code_refused", 400, True, ["trust_remote_code"], {"trust_remote_code": True}),
    ("length_too_large.log", 1, "max_model_len_too_large", 400, True, ["4096", "512"], {"max_model_len": 512}),
    ("kv_cache_too_small.log", 1, "kv_cache_too_small", 400, True, ["600000", "1.14 GiB", "1.0 GiB", "524160"],
     {"max_model_len": 524160}),
    ("kv_cache_too_small_without_estimate.composed.log", 1, "kv_cache_too_small", 400, True,
     ["131072", "16.0 GiB", "0.01 GiB"], None),
    ("no_memory_for_kv_cache.composed.log", 1, "kv_cache_too_small", 400, True, ["gpu_memory_utilization"], None),
    ("kv_cache_beyond_ram.log", 1, "gpu_memory_in_use", 503, False, ["1000.0 GiB", "7.04", "VLLM_CPU_KVCACHE_SPACE"],
     None),
    ("gpu_memory_in_use.composed.log", 1, "gpu_memory_in_use", 503, False, ["72.85 GiB", "11.21", "79.19", "0.92"],
     {"gpu_memory_utilization": 0.14}),
    ("memory_profiling_failed.composed.log", 1, "memory_profiling_failed", 503, False, ["40.12", "61.87"], None),
    ("out_of_memory.composed.log", 1, "out_of_memory", 507, False, ["224.00 MiB", "118.06 MiB", "23.55 GiB"], None),
    ("out_of_memory_at_runtime.composed.log", 0, "out_of_memory", 507, False, ["224.00 MiB", "23.55 GiB"], None),
    ("corrupt_weights.log", 1, "engine_failed", 502, False, ["incomplete metadata, file not fully covered"], None),
    ("death_at_first_request.log", 0, "engine_failed", 502, False, ["head_dim=16"], None),
]
GOOD = ["good_llama.log", "good_bert.log", "good_compiled.log", "good_gpu.composed.log"]


def assert_readable(cause: Cause) -> None:
    """What holds for every cause: a sentence and no traceback."""
    assert cause.message.endswith(".")
    assert "\n" not in cause.message
    for noise in ("Traceback", 'File "', "{", "  "):
        assert noise not in cause.message
    assert len(cause.detail) <= MAX_DETAIL_CHARS
    assert 400 <= cause.status < 600
    assert not (cause.permanent and cause.status in (502, 503, 507)), "a permanent cause is the caller's to mend"


@pytest.mark.parametrize(("name", "exit_code", "code", "status", "permanent", "words", "suggestion"), DEATHS,
                         ids=[death[0] for death in DEATHS])
def test_each_death_is_told_from_its_log(name: str, exit_code: int, code: str, status: int, permanent: bool,
                                         words: list[str], suggestion: dict[str, object] | None) -> None:
    cause = read(text_of(name)).cause(exit_code, MODEL)
    assert (cause.code, cause.status, cause.permanent, cause.suggestion) == (code, status, permanent, suggestion)
    for word in words:
        assert word in cause.message
    assert cause.detail
    assert_readable(cause)


def test_every_recorded_log_is_tested() -> None:
    assert {path.name for path in LOGS.iterdir()} == {death[0] for death in DEATHS} | set(GOOD)


# Rows that no log above ends in: the line that they are for.
SINGLE_LINES = [
    ("vllm serve: error: ambiguous option: --max could match --max-model-len, --max-num-seqs", "bad_flag_value"),
    ("(Worker pid=9) ERROR 11-20 12:00:00 [cpu_worker.py:83] ValueError: Available memory on node 0 (3.5/16.0 GiB) on"
     " startup is less than desired CPU memory utilization (0.92, 14.7 GiB).", "gpu_memory_in_use"),
    ("AssertionError: Error in memory profiling. This happens when memory was not cleaned up.",
     "memory_profiling_failed"),
    ("RuntimeError: CUDA error: out of memory", "out_of_memory"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
     " to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)", "out_of_memory"),
    ("OSError: [Errno 28] No space left on device", "disk_full"),
    ("ValueError: Transformers does not recognize this architecture", "unsupported_architecture"),
    ("huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the files on the Hub",
     "hub_unreachable"),
]


@pytest.mark.parametrize(("line", "code"), SINGLE_LINES)
def test_lines_that_no_recorded_log_holds(line: str, code: str) -> None:
    cause = read(line + "\n").cause(1, MODEL)
    assert cause.code == code
    assert_readable(cause)


def test_every_row_of_the_table_decides_some_death() -> None:
    texts = [text_of(death[0]) for death in DEATHS] + [line + "\n" for line, _ in SINGLE_LINES]
    deciding = {min(log._matches) for log in map(read, texts) if log._matches}
    assert [row.pattern.pattern for index, row in enumerate(CAUSES) if index not in deciding] == []


@pytest.mark.parametrize("name", GOOD)
def test_a_good_start_goes_through_its_phases_and_never_back(name: str) -> None:
    log, phases, progress = StartupLog(), ["starting"], [0.0]
    for character in text_of(name):
        log.feed(character)
        if log.phase != phases[-1]:
            phases.append(log.phase)
        if log.progress is not None and log.progress != progress[-1]:
            progress.append(log.progress)
    assert phases == [phase for phase in PHASES if phase in phases]
    assert {"resolving", "initializing", "loading_weights", "warming_up"} <= set(phases)
    assert phases[-1] == "ready"
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_phases_of_a_start_that_compiles_and_captures_graphs() -> None:
    log, seen = StartupLog(), []
    for line in text_of("good_gpu.composed.log").splitlines(keepends=True):
        log.feed(line)
        seen.append(log.phase)
    assert list(dict.fromkeys(seen)) == [phase for phase in PHASES if phase not in ("starting", "downloading")]


def test_shards_and_graphs_move_the_progress_within_their_phase() -> None:
    text = text_of("good_gpu.composed.log")
    for bar in ("Loading safetensors checkpoint shards", "Capturing CUDA graphs"):
        log, seen = StartupLog(), []
        for line in text.replace("\r", "\n").splitlines(keepends=True):
            log.feed(line)
            if line.startswith(bar):
                seen.append(log.progress)
        assert len(seen) == 5
        assert seen == sorted(set(seen))


def test_a_log_that_has_said_nothing_has_no_progress() -> None:
    assert StartupLog().progress is None
    assert read("Triton is installed\n").progress is None
    assert read("").phase == "starting"


def test_figures_of_a_start_on_two_gpus() -> None:
    facts = read(text_of("good_gpu.composed.log")).facts
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.weights_gib == 7.24        # the larger of the two workers'
    assert facts.weights_s == 4.12
    assert facts.compile_s == 22.46
    assert facts.kv_cache_gib == 58.31
    assert facts.kv_cache_tokens == 955_344
    assert facts.actual_usage == ActualUsage(consumed_gib=8.02, peak_activation_gib=5.63, graph_gib=0.61)


def test_figures_of_a_start_without_gpu() -> None:
    facts = read(text_of("good_llama.log")).facts
    assert (facts.architecture, facts.kv_cache_gib, facts.kv_cache_tokens) == ("LlamaForCausalLM", 1.0, 524_288)
    assert facts.weights_gib is None
    assert facts.actual_usage is None


@pytest.mark.parametrize(("exit_code", "words"), [
    (-9, "by signal SIGKILL"), (137, "by signal SIGKILL"), (-11, "SIGSEGV"), (-4, "SIGILL"), (3, "with exit code 3"),
    (0, "with exit code 0"), (None, "without an exit code"), (159, "by signal"), (255, "with exit code 255")])
def test_a_silent_death_tells_its_exit_code(exit_code: int | None, words: str) -> None:
    cause = read(text_of("good_llama.log")).cause(exit_code, MODEL)
    assert (cause.code, cause.permanent) == ("exited", False)
    assert words in cause.message
    assert_readable(cause)


def test_the_reason_may_stand_in_a_last_line_that_was_never_ended() -> None:
    log = read(text_of("bad_flag.log").rstrip())
    assert log.cause(2, MODEL).code == "bad_flag"
    log.feed(" --and-more 1\n")              # asking changed nothing
    assert "--and-more" in log.cause(2, MODEL).message


def test_what_was_overcome_before_the_start_was_ready_explains_no_later_death() -> None:
    hiccup = "OSError: We couldn't connect to 'https://huggingface.co' to load the files\n"
    assert read(hiccup).cause(1, MODEL).code == "hub_unreachable"
    assert read(hiccup + text_of("good_llama.log")).cause(-9, MODEL).code == "exited"


def test_what_clients_and_flags_say_is_no_cause() -> None:
    said = "CUDA out of memory. [Errno 98] Address already in use"
    quiet = (f"(APIServer pid=1) INFO 11-20 12:00:00 [logger.py:1] prompt: '{said}'\n"
             f"(APIServer pid=1) WARNING 11-20 12:00:00 [x.py:1] {said}\n")
    assert read(quiet).cause(1, MODEL).code == "exited"
    after = text_of("good_llama.log") + "(APIServer pid=1) ERROR 11-20 12:00:00 [x.py:1] ValueError: bad request\n"
    assert read(after).cause(-9, MODEL).code == "exited"


def test_the_first_error_of_the_engine_is_the_root() -> None:
    stamp = "11-20 12:00:00 [x.py:1]"
    lines = [f"(Worker_TP1 pid=3) ERROR {stamp} RuntimeError: NCCL error: unhandled system error",
             f"(EngineCore_DP0 pid=2) ERROR {stamp} Exception: WorkerProc initialization failed due to an exception in"
             " a background process. See stack trace for root cause.",
             f"(EngineCore_DP0 pid=2) ERROR {stamp} TypeError: a later one",
             "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"]
    cause = read("\n".join(lines) + "\n").cause(1, MODEL)
    assert cause.code == "engine_failed"
    assert "NCCL error: unhandled system error" in cause.message


def test_source_code_in_a_traceback_is_no_cause() -> None:
    quoted = '    raise ValueError("CUDA out of memory. No space left on device")\nValueError: something else\n'
    assert "something else" in read(quoted).cause(1, MODEL).message


def test_a_worker_that_was_killed_is_named() -> None:
    line = ("(EngineCore pid=2) ERROR 11-20 12:00:00 [multiproc_executor.py:315] Worker proc VllmWorker-0 died"
            " unexpectedly (exit code: -9), shutting down executor.\n")
    cause = read(text_of("good_llama.log") + line).cause(0, MODEL)
    assert cause.code == "engine_failed"
    assert "VllmWorker-0 died unexpectedly (exit code: -9)" in cause.message


def test_colours_are_no_part_of_the_text() -> None:
    coloured = "".join(f"\x1b[36m{word}\x1b[0m " for word in text_of("bad_flag.log").split(" "))
    assert read(coloured).cause(2, MODEL).code == "bad_flag"
    assert not any("\x1b" in line for line in read(coloured).tail)


def test_memory_is_bounded() -> None:
    log = StartupLog()
    for number in range(1000):
        log.feed(f"(EngineCore pid=2) ERROR 11-20 12:00:00 [x.py:1] ValueError: {number}\n")
    for _ in range(100):
        log.feed("x" * 10_000)
    assert len(log.tail) == TAIL_LINES
    assert len(log._partial) <= 16_384
    assert len(log._engine_errors) <= 6


# --- any text, in any pieces --------------------------------------------------------------------------------------

LINES = sorted({line for path in LOGS.iterdir() for line in path.read_bytes().decode().split("\n")})
lines = st.one_of(st.sampled_from(LINES), st.text(max_size=60),
                  st.text(alphabet=string.printable + "\x1b", max_size=60),
                  st.sampled_from([row.pattern.pattern.replace("\\", "") for row in CAUSES]))
texts = st.lists(st.tuples(lines, st.sampled_from(["\n", "\r", "\r\n", ""])), max_size=25).map(
    lambda pairs: "".join(line + end for line, end in pairs))


def outcome(log: StartupLog, exit_code: int | None) -> tuple[object, ...]:
    return log.phase, log.progress, dataclasses.astuple(log.facts), log.tail, log.cause(exit_code, MODEL)


@given(text=texts, cuts=st.lists(st.integers(0, 4000), max_size=12),
       exit_code=st.one_of(st.none(), st.integers(-70, 300)))
@settings(max_examples=150, deadline=None)
def test_how_the_text_is_cut_makes_no_difference(text: str, cuts: list[int], exit_code: int | None) -> None:
    log, start = StartupLog(), 0
    for cut in [*sorted(cuts), len(text)]:
        log.feed(text[start:max(cut, start)])
        start = max(cut, start)
    whole = read(text)
    assert outcome(log, exit_code) == outcome(whole, exit_code)
    cause = whole.cause(exit_code, MODEL)
    assert "\n" not in cause.message
    assert len(cause.detail) <= MAX_DETAIL_CHARS
