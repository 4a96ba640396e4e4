"""What vLLM's log says about a start: how far it is, what it measured, and why it died.

Pure: text in, values out.  The patterns follow vLLM 0.32, as it prints them; `tests/data/startup_logs` holds the logs
that they were written from.  A line is ``(EngineCore pid=7) ERROR 11-20 12:16:59 [core.py:1510] message``, where
the process and the stamp are both absent from progress bars and from tracebacks that nobody caught.
"""

from __future__ import annotations

import copy
import re
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

PHASES = ("starting", "resolving", "initializing", "downloading", "loading_weights", "compiling", "kv_cache",
          "capturing_graphs", "warming_up", "ready")
TAIL_LINES = 200
MAX_LINE_CHARS = 16_384         # the rest of a longer line is dropped
MAX_DETAIL_CHARS = 500
MAX_QUOTE_CHARS = 240           # of one figure or text of the log within a message

NUMBER = r"\d{1,15}(?:\.\d{1,15})?"
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]{0,200}\x07|[@-Z\\-_])")
LINE = re.compile(r"(?:\((?P<process>[\w.-]+) pid=\d+\) ?)?"
                  r"(?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?(?P<message>.*)", re.DOTALL)
UVICORN = re.compile(r"(?:INFO|WARNING|DEBUG): {2,}")
ENGINE = re.compile(r"EngineCore|(?:Vllm)?Worker|DPCoordinator")


# --- values -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ActualUsage:
    """What the engine takes of each GPU once it is warm, in GiB.  The KV cache comes on top."""

    consumed_gib: float             # weights and what is not PyTorch's
    peak_activation_gib: float
    graph_gib: float


@dataclass(frozen=True)
class StartupFacts:
    """Figures of one start; None where the log has not told.  Of several workers' figures the largest counts."""

    architecture: str | None = None
    weights_gib: float | None = None
    weights_s: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    compile_s: float | None = None
    actual_usage: ActualUsage | None = None


@dataclass(frozen=True)
class Cause:
    """Why an engine is gone.

    `status` is what a request that waited for it gets: 4xx where the caller can mend it (400 a bad flag or one that
    does not fit, 403 gated, 404 no such model), 507 where memory or disk is too small for what was asked, 503 where
    memory is only taken at the moment, 502 for what is wrong on the engine's side.  A `permanent` cause comes back
    on every retry, so there should be none.  `suggestion` holds params with which a start would get further.
    """

    code: str
    message: str
    permanent: bool
    status: int
    detail: str = ""
    suggestion: Mapping[str, object] | None = None


# --- the causes ---------------------------------------------------------------------------------------------------

Suggest = Callable[[Mapping[str, str]], Mapping[str, object] | None]


def suggest_length(groups: Mapping[str, str]) -> Mapping[str, object] | None:
    return {"max_model_len": int(groups["fits"])}


def suggest_utilization(groups: Mapping[str, str]) -> Mapping[str, object] | None:
    """The share of the device that is free now, rounded down to a percent."""
    free, total = float(groups["free"]), float(groups["total"])
    percent = min(int(100 * free / total), 100) if total else 0
    return {"gpu_memory_utilization": percent / 100} if percent >= 5 else None


@dataclass(frozen=True)
class Row:
    """One known way to die.  `pattern` is searched in the last lines of the log; `sentence` takes its named groups,
    `model`, and `port` (" 9000", or empty where unknown).  `at_runtime` rows also hold after the engine was ready."""

    code: str
    status: int
    permanent: bool
    pattern: re.Pattern[str]
    sentence: str
    suggest: Suggest | None = None
    at_runtime: bool = False


def row(code: str, status: int, permanent: bool, pattern: str, sentence: str, suggest: Suggest | None = None,
        at_runtime: bool = False) -> Row:
    return Row(code, status, permanent, re.compile(pattern.replace("<N>", f"(?:{NUMBER})")), sentence, suggest,
               at_runtime)


# The first row that matched anywhere is the cause: rows with more figures stand before vaguer ones of the same kind,
# and what others lead to (a validation error, an unreachable hub) stands last.
CAUSES = (
    row("bad_flag", 400, True, r"vllm[\w ]{0,40}: error: unrecognized arguments: (?P<flags>-.*)",
        "vLLM does not know {flags}: correct or remove it in the params of {model}."),
    row("bad_flag", 400, True, r"vllm[\w ]{0,40}: error: unrecognized arguments: (?P<value>.*)",
        "vLLM has no place for the value {value}: a switch takes none, so give it as true or false in the params of"
        " {model} (on the command line --x or --no-x)."),
    row("bad_flag_value", 400, True, r"vllm[\w ]{0,40}: error: argument (?P<flag>[^\s:]+): (?P<why>.*)",
        "vLLM refuses the value of {flag}: {why}; correct it in the params of {model}."),
    row("bad_flag_value", 400, True, r"vllm[\w ]{0,40}: error: (?P<why>.*)",
        "vLLM refuses its flags: {why}; correct the params of {model}."),
    row("port_in_use", 503, False, r"\[Errno 98\].{0,200}[Aa]ddress already in use",
        "The port{port} is taken by another process; the next try uses another one."),
    row("max_model_len_too_large", 400, True,
        r"max_model_len \((?P<asked>\d{1,15})\) is greater than the derived max_model_len \([\w.]+=(?P<fits>\d{1,15})",
        "{model} takes at most {fits} tokens and max_model_len asks for {asked}: lower max_model_len to {fits}.",
        suggest_length),
    row("kv_cache_too_small", 400, True,
        r"max seq len \((?P<asked><N>)\), \((?P<needed><N>) GiB KV cache is needed, which is larger than the available"
        r" KV cache memory \((?P<available><N>) GiB\)\. .*estimated maximum model length is (?P<fits>\d{1,15})",
        "One request of {asked} tokens to {model} needs {needed} GiB of KV cache and {available} GiB are there: lower"
        " max_model_len to {fits}, or give the engine more memory (gpu_memory_utilization).", suggest_length),
    row("kv_cache_too_small", 400, True,
        r"max seq len \((?P<asked><N>)\), \((?P<needed><N>) GiB KV cache is needed, which is larger than the available"
        r" KV cache memory \((?P<available><N>) GiB\)",
        "One request of {asked} tokens to {model} needs {needed} GiB of KV cache and {available} GiB are there: lower"
        " max_model_len, or give the engine more memory (gpu_memory_utilization)."),
    row("kv_cache_too_small", 400, True, r"No available memory for the cache blocks",
        "The weights of {model} leave no memory for the KV cache: raise gpu_memory_utilization, use more GPUs"
        " (tensor_parallel_size) or a smaller or quantized model."),
    row("gpu_memory_in_use", 503, False,
        r"Free memory on device \S+ \((?P<free><N>)/(?P<total><N>) GiB\) on startup is less than desired"
        r" GPU memory utilization \((?P<share><N>), (?P<wanted><N>) GiB\)",
        "{model} wants {wanted} GiB of its GPU (gpu_memory_utilization {share}) and {free} of {total} GiB are free:"
        " stop what else uses that GPU, or lower gpu_memory_utilization.", suggest_utilization),
    row("gpu_memory_in_use", 503, False,
        r"Available memory on node \d+ \((?P<free><N>)/(?P<total><N>) GiB\) on startup is less than desired CPU memory"
        r" utilization \((?P<share><N>), (?P<wanted><N>) GiB\)",
        "{model} wants {wanted} GiB of memory (gpu_memory_utilization {share}) and {free} of {total} GiB are free:"
        " stop what else uses memory, or lower gpu_memory_utilization.", suggest_utilization),
    row("gpu_memory_in_use", 503, False,
        r"Available memory on node \d+ \((?P<free><N>)/(?P<total><N>) GiB\) on kv cache allocation is less than"
        r" requested memory for kv \((?P<wanted><N>)",
        "{model} wants {wanted} GiB for its KV cache and {free} of {total} GiB of memory are free: lower"
        " VLLM_CPU_KVCACHE_SPACE or kv_cache_memory_bytes, or stop what else uses memory."),
    row("memory_profiling_failed", 503, False,
        r"Error in memory profiling\. Initial free memory (?P<before><N>) GiB, current free memory (?P<after><N>) GiB",
        "Another process freed GPU memory while {model} measured it ({before} GiB free became {after} GiB): start it"
        " again while nothing else starts or stops on that GPU."),
    row("memory_profiling_failed", 503, False, r"Error in memory profiling",
        "Another process changed its GPU memory while {model} measured it: start it again while nothing else starts"
        " or stops on that GPU."),
    row("out_of_memory", 507, False,
        r"(?:CUDA|HIP|XPU) out of memory\. Tried to allocate (?P<wanted>[\d.]+ \w+)\. GPU \d+ has a total"
        r" capacity of (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is free",
        "The GPU ran out of memory: {model} asked for {wanted} more and {free} of {total} were free; use more GPUs"
        " (tensor_parallel_size), a quantized model or a smaller max_model_len or max_num_seqs.", at_runtime=True),
    row("out_of_memory", 507, False,
        r"(?:CUDA|HIP|XPU) out of memory|CUDA error: out of memory|OutOfMemoryError|not enough GPU memory",
        "The GPU has too little memory for {model}: use more GPUs (tensor_parallel_size), a quantized model or a"
        " smaller max_model_len or max_num_seqs.", at_runtime=True),
    row("out_of_memory", 507, False,
        r"can't allocate memory: you tried to allocate (?P<bytes>\d+) bytes|^MemoryError|\[Errno 12\]",
        "The machine has too little memory for {model}: stop what else uses it, or take a smaller model, max_model_len"
        " or VLLM_CPU_KVCACHE_SPACE.", at_runtime=True),
    row("disk_full", 507, False, r"\[Errno 28\]|No space left on device",
        "The disk (or /dev/shm) is full: make room for {model}, or point HF_HOME at a larger disk.", at_runtime=True),
    row("no_weights", 404, True, r"Cannot find any model weights with `(?P<place>[^`]*)`",
        "There are no weights (*.safetensors, *.bin or *.pt) in {place}: complete the model's files."),
    row("unsupported_architecture", 400, True,
        r"Model architectures? \[?(?P<name>[^\]]{0,300}?)\]? (?:is|are) not supported",
        "This vLLM cannot run the architecture {name} of {model}: use a newer vLLM or another model."),
    row("unsupported_architecture", 400, True,
        r"has model type `(?P<name>[^`]*)` but Transformers does not recognize this architecture",
        "This vLLM cannot run {model}, whose model type {name} is unknown to its transformers library: use a newer"
        " engine or another model."),
    row("unsupported_architecture", 400, True, r"Transformers does not recognize this architecture",
        "This vLLM cannot run {model}, whose architecture its transformers library does not know: use a newer engine"
        " or another model."),
    row("remote_code_refused", 400, True,
        r"contains custom code which must be executed|requires you to execute the \w+ file|set `?trust_remote_code",
        "{model} comes with its own Python code, which is not allowed to run: set trust_remote_code to true in its"
        " params if you trust it.", lambda groups: {"trust_remote_code": True}),
    row("model_gated", 403, True, r"trying to access a gated repo|Cannot access gated repo|is a gated repository",
        "{model} is gated: accept its terms on its page on the hub, give the daemon a token of that account (HF_TOKEN),"
        " and start it again."),
    row("model_not_found", 404, True,
        r"is not a (?:valid model identifier listed on|local folder or a valid repository name)|Repository Not Found",
        "{model} is neither a folder here nor a model on the hub: check its name, and give a token (HF_TOKEN) if it is"
        " private."),
    row("model_not_found", 404, True, r"(?P<revision>\S{1,100}) is not a valid git identifier",
        "{model} has no revision {revision}: correct the revision in its params."),
    row("bad_model_path", 404, True, r"Repo id must (?:be in the form|use alphanumeric)",
        "There is no folder {model} on this machine, and it is no name of a model on the hub (name or owner/name):"
        " correct the path."),
    row("bad_model_path", 404, True, r"Invalid repository ID or local directory|"
                                     r"does not appear to have (?:a file|files) named",
        "{model} holds no model that vLLM can read (it has no config.json, for one): correct the path or complete the"
        " files."),
    row("bad_model_path", 404, True, r"the config file at '(?P<file>[^']*)' is not a valid JSON file",
        "{model} cannot be read, because {file} is not valid JSON: mend or download that file again."),
    row("hub_unreachable", 502, False, r"outgoing traffic has been disabled|OfflineModeIsEnabled",
        "{model} is not in the cache and the hub may not be asked (HF_HUB_OFFLINE is set): unset it, or download the"
        " model first."),
    row("hub_unreachable", 502, False,
        r"We couldn't connect to '(?P<hub>[^']*)'|There was a specific connection error when trying to load",
        "{model} is not in the cache and the hub could not be reached: check the network, HTTPS_PROXY and HF_ENDPOINT,"
        " or give the path of a local folder."),
    row("hub_unreachable", 502, False, r"LocalEntryNotFoundError",
        "{model} is not in the cache and the hub could not be reached: check the network, HTTPS_PROXY and HF_ENDPOINT,"
        " or give the path of a local folder."),
    row("bad_flag_value", 400, True, r"validation errors? for \w+\n\s*Value error, (?P<why>.+?)(?: \[type=|$)",
        "vLLM refuses the configuration of {model}: {why}."),
    row("bad_flag_value", 400, True,
        r"validation errors? for \w+\n(?P<flag>[\w.-]+)\n\s*(?P<why>.+?) \[type=\w+"
        r"(?:, input_value=(?P<value>.*?), input)?",
        "vLLM refuses the value {value} of {flag}: {why}; correct it in the params of {model}."),
)
WINDOW_LINES = 3        # how many lines a pattern may span

EXCEPTION = re.compile(r"(?:(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)|Exception)(?:: .*)?$")
WRAPPED = re.compile(r"Worker failed with error '(?P<text>.*)', please check the stack trace")
# Errors that only say that there was another one, before them.
SECONDHAND = re.compile(r"See root cause above|See stack trace|initialization failed due to an exception in a"
                        r"|EngineDeadError|died unexpectedly")
WORKER_DIED = re.compile(r"(?:Worker|Engine core) proc\S* (?P<text>.*died unexpectedly.*)")


# --- phases and figures -------------------------------------------------------------------------------------------

# (phase, what starts it, progress of the whole start at its begin).  Most of a start's time is spent importing, before
# the first line of each process.
PHASE_STARTS = tuple((PHASES.index(phase), re.compile(pattern), progress) for phase, pattern, progress in (
    ("resolving", r"non-default args:|Resolved architecture:", 0.20),
    ("initializing", r"Initializing a V1 LLM engine", 0.40),
    ("loading_weights", r"Starting to load model|Loading model from scratch|Loading \w+ checkpoint shards"
                        r"|Multi-thread loading|Loading safetensors using|Loading weights took", 0.50),
    ("compiling", r"(?:\[\w+\] )?(?:Starting torch\.compile|Dynamo bytecode transform|torch\.compile took)"
                  r"|Warming up model for the compilation", 0.75),
    ("kv_cache", r"Available KV cache memory|(?:Explicitly|Auto) set \(|[\w +]+ KV cache size:", 0.85),
    ("capturing_graphs", r"Capturing CUDA graphs", 0.88),
    ("warming_up", r"Graph capturing finished|init engine \(|Supported tasks:|Starting vLLM server", 0.96),
    ("ready", r"Application startup complete\.", 1.0)))
# (bar, progress at 0 %, progress at 100 %)
BARS = ((re.compile(r"(?:Loading|Multi-thread loading)[^:]*: +(?P<percent>\d{1,3})% "), 0.50, 0.74),
        (re.compile(r"Capturing CUDA graphs[^:]*: +(?P<percent>\d{1,3})%"), 0.88, 0.96))

FIGURES = tuple((name, re.compile(pattern.replace("<N>", f"({NUMBER})"))) for name, pattern in (
    ("weights_gib", r"Model loading took <N> GiB"),
    ("weights_s", r"Loading weights took <N> seconds"),
    ("compile_s", r"torch\.compile took <N> s in total|\(compilation: <N> s"),
    ("kv_cache_gib", r"Available KV cache memory: <N> GiB"),
    ("kv_cache_gib", r"(?:Explicitly|Auto) set \(<N>/")))
ARCHITECTURE = re.compile(r"Resolved architecture: (\w{1,200})")
KV_TOKENS = re.compile(r"KV cache size: (\d[\d,]{0,18}) tokens")
USAGE = re.compile(rf"Actual usage is ({NUMBER}) GiB for consumed memory[^,]*, ({NUMBER}) GiB for peak activation,"
                   rf" and ({NUMBER}) GiB for CUDAGraph memory")
PORT = re.compile(r"'port': (\d{1,5})\b")


def read_figures(facts: StartupFacts, message: str) -> StartupFacts:
    """`facts` with what this line adds to them."""
    for name, pattern in FIGURES:
        if found := pattern.search(message):
            figure: dict[str, Any] = {name: max(float(found[found.lastindex or 1]), getattr(facts, name) or 0.0)}
            facts = replace(facts, **figure)
    if facts.architecture is None and (found := ARCHITECTURE.search(message)):
        facts = replace(facts, architecture=found[1])
    if found := KV_TOKENS.search(message):
        facts = replace(facts, kv_cache_tokens=int(found[1].replace(",", "")))
    if found := USAGE.search(message):
        usage = ActualUsage(float(found[1]), float(found[2]), float(found[3]))
        known = facts.actual_usage
        if known is None or usage.consumed_gib > known.consumed_gib:
            facts = replace(facts, actual_usage=usage)
    return facts


def quote(text: str, limit: int = MAX_QUOTE_CHARS) -> str:
    """One line of at most `limit` characters, fit for the middle of a sentence."""
    text = " ".join(text.split()).rstrip(".;,")
    return text if len(text) <= limit else text[:limit - 1] + "…"


def matched_lines(window: str, found: re.Match[str]) -> str:
    """The whole lines that the match touches, or the part around it where they are too long."""
    start = window.rfind("\n", 0, found.start()) + 1
    end = window.find("\n", found.end())
    lines = window[start:end if end >= 0 else len(window)]
    if len(lines) <= MAX_DETAIL_CHARS:
        return lines.strip()
    return window[found.start():found.start() + MAX_DETAIL_CHARS].strip()


def how_it_exited(exit_code: int | None) -> str:
    """'with exit code 3', 'by signal SIGKILL (...)'.  A shell reports a signal as 128 + its number."""
    if exit_code is None:
        return "without an exit code that could be read"
    number = -exit_code if exit_code < 0 else exit_code - 128
    if exit_code < 0 or 128 < exit_code < 160:
        hints = {9: " (perhaps by the kernel, for want of memory)", 4: " (this CPU lacks an instruction that it uses)"}
        name = signal.Signals(number).name if number in set(signal.Signals) else f"number {number}"
        return f"by signal {name}{hints.get(number, '')}"
    return f"with exit code {exit_code}"


class StartupLog:
    """The log of one start, read as it grows.

    One thread feeds it; others may read the properties meanwhile.  How the text is cut into pieces makes no
    difference.  Memory is bounded: a tail of 200 lines and the first match of each cause.
    """

    def __init__(self) -> None:
        self._facts = StartupFacts()
        self._phase = 0
        self._progress: float | None = None
        self._partial = ""
        self._port = ""
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._window: deque[str] = deque(maxlen=WINDOW_LINES)
        self._matches: dict[int, tuple[dict[str, str], str]] = {}      # index in CAUSES -> groups, lines
        self._first_engine_error: str | None = None     # of the start
        self._engine_errors: deque[str] = deque(maxlen=6)
        self._last_error: str | None = None             # of any process: the end of the last traceback

    @property
    def phase(self) -> str:
        """One of PHASES; it never goes back.  'downloading' is for the caller, who can watch the files grow."""
        return PHASES[self._phase]

    @property
    def progress(self) -> float | None:
        """Share of the whole start, 0 to 1; it never goes back.  None until the log has said anything of use."""
        return self._progress

    @property
    def facts(self) -> StartupFacts:
        return self._facts

    @property
    def tail(self) -> tuple[str, ...]:
        """The last finished lines, at most 200, oldest first, without colours."""
        return tuple(self._tail)

    def feed(self, text: str) -> None:
        """Reads a piece of the log, cut anywhere.  Never raises."""
        *finished, rest = re.split(r"[\r\n]", text)
        for piece in finished:
            self._read_line((self._partial + piece)[:MAX_LINE_CHARS])
            self._partial = ""
        self._partial = (self._partial + rest)[:MAX_LINE_CHARS]

    def cause(self, exit_code: int | None, model: str) -> Cause:
        """The best explanation of the process's death.  Call it when the log has been read to its end."""
        if self._partial:
            whole = copy.deepcopy(self)
            whole.feed("\n")
            return whole.cause(exit_code, model)
        known = self._known_cause(model)
        if known is not None:
            return known
        error = self._root_error()
        if error is not None:
            return Cause("engine_failed", f"The engine of {quote(model)} failed: {quote(error)}; its log tells more.",
                         permanent=False, status=502, detail=error[:MAX_DETAIL_CHARS])
        last_words = "\n".join(list(self._tail)[-3:])
        return Cause("exited", f"The engine of {quote(model)} ended {how_it_exited(exit_code)} and gave no reason; look"
                     " at the end of its log.", permanent=False, status=502, detail=last_words[-MAX_DETAIL_CHARS:])

    # --- one line -----------------------------------------------------------------------------------------------

    def _read_line(self, line: str) -> None:
        line = ANSI.sub("", line).rstrip()
        if not line:
            return
        self._tail.append(line)
        parsed = LINE.match(line)
        if parsed is None or UVICORN.match(line) and "startup complete" not in line:
            return
        process, level, message = parsed["process"] or "", parsed["level"], parsed["message"]
        if PHASES[self._phase] != "ready":
            self._read_progress(message.removeprefix("INFO:").lstrip())
            self._facts = read_figures(self._facts, message)
            if not self._port and message.startswith("non-default args") and (port := PORT.search(message)):
                self._port = f" {port[1]}"
        if level in (None, "ERROR", "CRITICAL"):
            self._read_error(message, from_engine=level is not None and ENGINE.match(process) is not None)

    def _read_progress(self, message: str) -> None:
        before = self._phase
        for index, pattern, progress in PHASE_STARTS:
            if index >= self._phase and pattern.match(message):
                self._phase = index
                self._progress = max(self._progress or 0.0, progress)
        for bar, start, end in BARS:
            if found := bar.match(message):
                share = min(int(found["percent"]), 100) / 100
                self._progress = max(self._progress or 0.0, start + (end - start) * share)
        if self._phase != before and PHASES[self._phase] == "ready":
            # What went wrong on the way was overcome, so it cannot explain a later death.
            self._matches.clear()
            self._window.clear()
            self._engine_errors.clear()
            self._first_engine_error = self._last_error = None

    def _read_error(self, message: str, from_engine: bool) -> None:
        if message.startswith("    "):      # source code in a traceback: it quotes messages that were not given
            return
        self._window.append(message)
        window = "\n".join(self._window)
        ready = PHASES[self._phase] == "ready"
        for index, candidate in enumerate(CAUSES):
            if index not in self._matches and (candidate.at_runtime or not ready):
                found = candidate.pattern.search(window)
                if found:
                    self._matches[index] = (found.groupdict(default=""), matched_lines(window, found))
        self._note_exception(message, from_engine, ready)

    def _note_exception(self, message: str, from_engine: bool, ready: bool) -> None:
        if wrapped := WRAPPED.search(message):
            message = wrapped["text"]
        elif not EXCEPTION.match(message) and not (from_engine and WORKER_DIED.match(message)):
            return
        if SECONDHAND.search(message) and not WORKER_DIED.match(message):
            return
        if from_engine:
            self._engine_errors.append(message)
            if self._first_engine_error is None:
                self._first_engine_error = message
        elif not ready:         # a server that runs logs its clients' mistakes, which end nothing
            self._last_error = message

    # --- at the end ---------------------------------------------------------------------------------------------

    def _known_cause(self, model: str) -> Cause | None:
        if not self._matches:
            return None
        index = min(self._matches)
        groups, lines = self._matches[index]
        known = CAUSES[index]
        words = {name: quote(text) for name, text in groups.items()}
        return Cause(known.code, known.sentence.format(model=quote(model), port=self._port, **words), known.permanent,
                     known.status, lines, known.suggest(groups) if known.suggest else None)

    def _root_error(self) -> str | None:
        """The first error of the engine's processes: the later ones follow from it.  An engine that served may have
        survived earlier ones, so there only the last few count."""
        if PHASES[self._phase] == "ready":
            return self._engine_errors[0] if self._engine_errors else None
        return self._first_engine_error or self._last_error
