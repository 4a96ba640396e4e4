"""The command line of `vllm serve`, version 0.32: every flag with its kind, parsed as vLLM parses it.

The tables hold what `vllm serve --help=all` prints: a name, its aliases after commas, and `?` where the word None
(or nothing) stands for "not set".  Only a few of the flags mean something to the simulator (`Options`); the others
are checked and forgotten.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

SWITCHES = """
allow-credentials allow-deprecated-quantization async-scheduling cohere-is-reasoning-model cudagraph-metrics
data-parallel-external-lb,-dpe data-parallel-hybrid-lb,-dph dcp-q-replicate disable-cascade-attn
disable-chunked-mm-input disable-custom-all-reduce disable-fastapi-docs disable-hybrid-kv-cache-manager
disable-nccl-for-dp-synchronization disable-sliding-window disable-uvicorn-access-log enable-auto-tool-choice
enable-batch-sharded-sampling enable-chunked-prefill enable-cumem-allocator enable-dbo enable-elastic-ep
enable-ep-weight-filter enable-eplb enable-expert-parallel,-ep enable-fault-tolerance enable-flash-late-interaction
enable-flashinfer-autotune enable-force-include-usage enable-hc-sp enable-layerwise-nvtx-tracing enable-log-deltas
enable-log-outputs enable-log-requests enable-logging-iteration-details enable-lora
enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint enable-mfu-metrics
enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras enable-nccl-comm-suspend enable-offline-docs
enable-per-request-metrics enable-prefix-caching enable-prompt-embeds enable-prompt-tokens-details
enable-request-id-headers enable-return-routed-experts enable-scale-out enable-server-load-tracking
enable-shm-tensor-arena enable-sleep-mode enable-ssl-refresh enable-tokenizer-info-endpoint
enable-tower-connector-lora enable-trace-replay enforce-eager exclude-tools-when-tool-choice-none
fail-on-environ-validation fully-sharded-loras interleave-mm-strings jit-monitor-verbose kv-cache-metrics
kv-sharing-fast-prefill language-model-only log-error-stack long-prefill-token-threshold-adaptive
mm-device-do-normalize mm-encoder-only numa-bind ray-workers-use-nsight return-sampling-mask
return-tokens-as-token-ids scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init
sleep-mode-offload-cudagraph specialize-active-lora swa-bounded-replay tokens-only trust-remote-code
trust-request-chat-template trust-request-mm-kwargs use-fp64-gumbel use-replayssm use-tqdm-on-load
"""

STORE_TRUE = """
aggregate-engine-logging data-parallel-multi-port-external-lb,-dpm disable-log-stats grpc headless
"""

INTEGERS = """
api-server-count,-asc block-size cp-kv-cache-interleave-size cpu-distributed-timeout-seconds?
data-parallel-rank,-dpn data-parallel-rpc-port,-dpp data-parallel-size,-dp data-parallel-size-local,-dpl
data-parallel-start-rank,-dpr data-parallel-supervisor-port dbo-decode-token-threshold dbo-prefill-token-threshold
dcp-kv-cache-interleave-size decode-context-parallel-size,-dcp distributed-timeout-seconds?
dp-supervisor-probe-failure-threshold dp-sync-interval elastic-ep-max-dp-size grpc-port? h11-max-header-count
h11-max-incomplete-event-size long-prefill-token-threshold mamba-block-size? mamba-cache-philox-rounds master-port
max-cpu-loras? max-cudagraph-capture-size max-log-len? max-logprobs max-lora-cls-labels? max-loras
max-num-active-seqs? max-num-queued-reqs? max-num-seqs max-parallel-loading-workers? mm-shm-cache-max-object-size-mb
nnodes,-n node-rank,-r num-gpu-blocks-override? offload-group-size offload-num-in-group offload-prefetch-step
pipeline-parallel-size,-pp port prefill-context-parallel-size,-pcp prefill-schedule-interval
prefix-cache-retention-interval? prefix-match-unit? renderer-num-workers replayssm-buffer-len
safetensors-prefetch-num-threads seed shutdown-timeout spec-tokens sse-keep-alive-interval ssl-cert-reqs
stream-interval tensor-parallel-size,-tp ubatch-size
"""

FLOATS = """
cpu-offload-gb dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s
gpu-memory-utilization,--device-memory-utilization kv-cache-metrics-sample kv-offloading-size?
mm-encoder-fp8-scale-save-margin mm-ipc-gpu-memory-gb mm-processor-cache-gb video-pruning-rate? watermark
"""

SIZES = """
kv-cache-memory-bytes? max-num-batched-tokens max-num-queued-tokens? max-num-scheduled-tokens?
safetensors-prefetch-block-size
"""

TEXTS = """
allowed-local-media-path attention-backend chat-template code-revision cohere-format config-format
data-parallel-address,-dpa data-parallel-backend,-dpb disable-access-log-for-endpoints distributed-executor-backend
download-dir fingerprint-value generation-config hf-config-path host io-processor-plugin load-format log-config-file
mamba-backend master-addr mm-encoder-attn-backend mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-path
model-impl optimization-level otlp-traces-endpoint quantization,-q reasoning-parser reasoning-parser-plugin
response-role revision root-path scheduler-cls show-hidden-metrics-for-version spec-model ssl-ca-certs ssl-certfile
ssl-ciphers ssl-keyfile tokenizer tokenizer-mode tokenizer-revision tool-call-parser tool-parser-plugin tool-server
uds worker-cls worker-extension-cls
"""

JSONS = """
additional-config allowed-headers allowed-methods allowed-origins attention-config,-ac aux-output-config
compilation-config,-cc custom-histogram-buckets default-chat-template-kwargs default-mm-loras diffusion-config,-dc
ec-manager-config ec-transfer-config engram-config eplb-config fault-tolerance-config hf-overrides ir-op-priority
kernel-config kv-events-config kv-transfer-config limit-mm-per-prompt logging-config media-io-kwargs
mm-processor-kwargs model-class-overrides model-loader-extra-config override-generation-config pooler-config
profiler-config pt-load-map-location quantization-config reasoning-config speculative-config,-sc
structured-outputs-config watermark-config weight-transfer-config
"""

LISTS = """
allowed-media-domains api-key cpu-offload-params ignore-patterns kv-cache-dtype-skip-layers logits-processors
lora-modules lora-target-modules middleware numa-bind-cpus offload-params served-model-name
sleep-preserve-parameter-names
"""

INTEGER_LISTS = """
cudagraph-capture-sizes numa-bind-nodes
"""

CHOICES = """
all2all-backend: allgather_reducescatter deepep_high_throughput deepep_low_latency deepep_v2 flashinfer_all2allv
    flashinfer_nvlink_one_sided flashinfer_nvlink_two_sided moonep mori_high_throughput mori_low_latency naive
    nixl_ep pplx
anthropic-disabled-thinking-effort: auto high low max medium none xhigh
chat-template-content-format: auto openai string
collect-detailed-traces: all model worker None
convert: auto classify embed none
dcp-comm-backend: a2a ag_rs None
dtype: auto bfloat16 float float16 float32 half
expert-placement-strategy: linear round_robin
fingerprint-mode: custom full hash none
gdn-prefill-backend: flashinfer triton cutedsl aiter_flydsl
jit-monitor-mode: error warn
kda-decode-backend: auto native flashinfer triton
kda-prefill-backend: auto triton flashkda flashinfer fused
kv-cache-dtype: auto bfloat16 float16 fp8 fp8_ds_mla fp8_e4m3 fp8_e5m2 fp8_inc fp8_per_token_head
    int4_per_token_head int8_per_token_head nvfp4 nvfp4_4over6 nvfp4_ds_mla turboquant_3bit_nc turboquant_4bit_nc
    turboquant_k3v4_nc turboquant_k8v4 ultraquant_4bit
kv-offloading-backend: lmcache native
linear-backend: aiter auto b12x conch cutlass deep_gemm emulation exllama fbgemm flashinfer_b12x flashinfer_cudnn
    flashinfer_cutedsl flashinfer_cutlass flashinfer_trtllm humming machete marlin torch triton xpu xpu_woq
log-level: CRITICAL ERROR WARNING INFO DEBUG NOTSET
logprobs-mode: processed_logits processed_logprobs raw_logits raw_logprobs
lora-dtype: auto bfloat16 float16
mamba-cache-dtype: auto bfloat16 float16 float32
mamba-cache-mode: align none
mamba-ssm-cache-dtype: auto bfloat16 float16 float32
mamba-ssu-algorithm: auto horizontal simple vertical None
mm-encoder-attn-dtype: fp8 None
mm-encoder-tp-mode: data weights
mm-hasher-algorithm: blake3 sha256 sha512
mm-processor-cache-type: lru shm
mm-processor-device: auto cpu
mm-tensor-ipc: direct_rpc torch_shm
moe-backend: aiter aiter_mega_moe aiter_triton_mxfp4_bf16 auto b12x batched_triton cutlass deep_gemm
    deep_gemm_mega_moe emulation flashinfer_b12x flashinfer_cutedsl flashinfer_cutlass flashinfer_moe_ep_cutedsl
    flashinfer_moe_ep_mega_deep_gemm flashinfer_trtllm flydsl hpc humming marlin rdna3 triton triton_unfused
offload-backend: auto prefetch uva
per-request-spec-decode-metrics: detailed none summary
performance-mode: balanced interactivity throughput
prefix-caching-hash-algo: sha256 sha256_cbor xxhash xxhash_cbor
runner: auto draft generate pooling
safetensors-load-strategy: eager lazy prefetch torchao None
scheduling-policy: fcfs priority
sparse-indexer-topk-backend: aiter auto cooperative deep_select flashinfer per_row persistent torch
spec-method: bailing_hybrid_mtp bailing_hybrid_v3_mtp custom_class deepseek_mtp dflash dots3_note_mtp draft_model
    dspark eagle eagle3 ernie_mtp exaone4_5_mtp exaone_moe_mtp extract_hidden_states gemma4_mtp glm4_moe_lite_mtp
    glm4_moe_mtp glm5_next_mtp glm_ocr_mtp hy_v3_mtp hy_v4_mtp inkling_mtp kimi_k3_mtp longcat_flash_mtp medusa
    mimo_mtp mimo_v2_mtp minimax_m3_mtp mlp_speculator mtp nemotron_h_mtp ngram ngram_gpu pangu_ultra_moe_mtp
    qwen3_5_mtp qwen3_next_mtp qwen4_exp_mtp step3p5_mtp suffix None
tool-strict-level: auto function parameter
uvicorn-log-level: critical debug error info trace warning
video-pruning-method: evs vidcom2
"""


@dataclass(frozen=True)
class Options:
    """What the simulator itself uses of a command line; names and units as vLLM's flags."""

    model: str
    served_model_names: tuple[str, ...]
    host: str | None
    port: int
    uds: str | None
    runner: str
    max_model_len: int
    fits_length: bool                   # --max-model-len auto: as long as the cache allows
    max_num_seqs: int
    max_num_queued_reqs: int | None
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    shutdown_timeout_s: int
    api_keys: tuple[str, ...]
    lora_modules: tuple[tuple[str, str], ...]
    enable_sleep_mode: bool
    enforce_eager: bool
    enable_server_load_tracking: bool
    enable_request_id_headers: bool
    access_log: bool
    access_log_skips: frozenset[str]
    root_path: str
    ssl_files: tuple[str, str] | None
    additional_config: dict[str, Any]
    given: dict[str, Any]               # what the log prints as non-default args


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:") and re.search(r"(^|\s)--task(=|\s|$)", message):
            message += ("\n\nHint: --task is not a vllm serve option. For embedding, reranking, or reward models, use "
                        "--runner pooling. To adapt a generative model for pooling, also use --convert embed, "
                        "--convert classify, or --convert reward.")
        super().error(message)


def parse(argv: Sequence[str]) -> Options:
    """The options of `argv` (without the program's name).  Exits with 2 and vLLM's text on stderr when it is wrong."""
    top = Parser(prog="vllm", usage=USAGE)
    top.add_argument("-v", "--version", action="version", version="0.32.0")
    commands = top.add_subparsers(prog="vllm", dest="command", required=True)
    parsers = {name: commands.add_parser(name, usage=f"vllm {name} [model_tag] [options]") for name in COMMANDS}
    serve = parsers["serve"]
    add_flags(serve)
    namespace = top.parse_args(normalize(argv))
    if namespace.command != "serve":
        top.error(f"the simulator has no command {namespace.command!r}, only serve")
    return options_of(namespace, serve)


COMMANDS = ("chat", "complete", "serve", "launch", "bench", "collect-env", "download-kernels", "preload", "run-batch",
            "snapshot")
USAGE = f"vllm [-h] [-v]\n            {{{','.join(COMMANDS)}}}\n            ..."


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--config", type=no_config_file)
    parser.add_argument("--hf-token", nargs="?", const=True)
    parser.add_argument("--max-model-len", type=size_or_auto)
    parser.add_argument("--max-lora-rank", type=int, choices=(1, 8, 16, 32, 64, 128, 256, 320, 512))
    parser.add_argument("--device-ids")
    for entry in SWITCHES.split():
        parser.add_argument(*spellings(entry), action=argparse.BooleanOptionalAction)
    for entry in STORE_TRUE.split():
        parser.add_argument(*spellings(entry), action="store_true")
    kinds: tuple[tuple[str, Callable[[str], Any]], ...] = (
        (INTEGERS, int), (FLOATS, float), (SIZES, size), (TEXTS, str), (JSONS, json_or_text))
    for entries, kind in kinds:
        for entry in entries.split():
            parser.add_argument(*spellings(entry), type=optional(kind) if entry.endswith("?") else kind)
    for entry in LISTS.split():
        parser.add_argument(*spellings(entry), nargs="+")
    for entry in INTEGER_LISTS.split():
        parser.add_argument(*spellings(entry), nargs="+", type=int)
    for line in re.sub(r"\n\s+", " ", CHOICES.strip()).splitlines():
        name, values = line.split(": ")
        parser.add_argument(f"--{name}", choices=values.split())


def spellings(entry: str) -> list[str]:
    name, *aliases = entry.rstrip("?").split(",")
    return [f"--{name}", *aliases]


def optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(value: str) -> Any:
        if value in ("", "None"):
            return None
        try:
            return kind(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"Value {value} cannot be converted to {kind}.") from error
    return convert


def size(value: str) -> int:
    """32k is 32,000 and 32K is 32,768; decimals only before a small letter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", value.strip())
    if match is None:
        return int(value)
    number, suffix = match.groups()
    power = "kmgt".index(suffix.lower()) + 1
    if suffix.islower():
        return int(float(number) * int(1000 ** power))
    if "." in number:
        raise argparse.ArgumentTypeError(f"Decimals are not allowed with binary suffixes like {suffix}. Did you mean "
                                         f"to use {number}{suffix.lower()} instead?")
    return int(number) * int(1024 ** power)


def size_or_auto(value: str) -> int:
    return -1 if value.strip().lower() in ("-1", "auto") else size(value)


def json_or_text(value: str) -> Any:
    """A value that opens as JSON must be JSON; any other is a plain word."""
    if not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"Value {value} cannot be converted to <function loads>.") from error


def no_config_file(value: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"the simulator reads no configuration file ({value})")


def normalize(argv: Sequence[str]) -> list[str]:
    """`_` for `-` in names, and the dotted form of JSON flags gathered to one JSON value each, as vLLM does."""
    plain: list[str] = []
    gathered: dict[str, dict[str, Any]] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            optimization = re.fullmatch(r"-O(\d)", word)
            plain.extend(["--optimization-level", optimization[1]] if optimization else [word])
            continue
        name, equals, value = word.partition("=")
        root, *path = name.split(".")
        root = root.replace("_", "-")
        if not path:
            plain.append(root + equals + value)
            continue
        text = value if equals else next(words, "")
        if path[-1].endswith("+"):
            path[-1], text = path[-1][:-1], json.dumps(text.split(","))
        node = gathered.setdefault(root, {})
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = dotted_value(text)
    for root, tree in gathered.items():
        plain += [root, json.dumps(tree)]
    return plain


def dotted_value(text: str) -> Any:
    for read in (json.loads, size):
        try:
            return read(text)
        except (ValueError, argparse.ArgumentTypeError):
            continue
    return text


def options_of(namespace: argparse.Namespace, parser: argparse.ArgumentParser) -> Options:
    seen = vars(namespace)
    model = namespace.model_tag or namespace.model
    certificates = (namespace.ssl_certfile, namespace.ssl_keyfile)
    additional = namespace.additional_config
    return Options(
        model=model,
        served_model_names=tuple(namespace.served_model_name or (model,)),
        host=namespace.host,
        port=8000 if namespace.port is None else namespace.port,
        uds=namespace.uds,
        runner=namespace.runner or "auto",
        max_model_len=namespace.max_model_len if (namespace.max_model_len or 0) > 0 else 32768,
        fits_length=(namespace.max_model_len or 0) < 0,
        max_num_seqs=namespace.max_num_seqs or 1024,
        max_num_queued_reqs=namespace.max_num_queued_reqs,
        gpu_memory_utilization=(0.92 if namespace.gpu_memory_utilization is None
                                else namespace.gpu_memory_utilization),
        kv_cache_memory_bytes=namespace.kv_cache_memory_bytes,
        tensor_parallel_size=namespace.tensor_parallel_size or 1,
        pipeline_parallel_size=namespace.pipeline_parallel_size or 1,
        data_parallel_size=namespace.data_parallel_size or 1,
        shutdown_timeout_s=namespace.shutdown_timeout or 0,
        api_keys=tuple(namespace.api_key or ()),
        lora_modules=tuple(lora_module(text, parser) for text in namespace.lora_modules or ()),
        enable_sleep_mode=bool(namespace.enable_sleep_mode),
        enforce_eager=bool(namespace.enforce_eager),
        enable_server_load_tracking=bool(namespace.enable_server_load_tracking),
        enable_request_id_headers=bool(namespace.enable_request_id_headers),
        access_log=not namespace.disable_uvicorn_access_log,
        access_log_skips=frozenset((namespace.disable_access_log_for_endpoints or "").split(",")),
        root_path=(namespace.root_path or "").rstrip("/"),
        ssl_files=certificates if all(certificates) else None,
        additional_config=additional if isinstance(additional, dict) else {},
        given={name: "***" if name in ("api_key", "hf_token") else value for name, value in seen.items()
               if name != "command" and value != parser.get_default(name)})


def lora_module(text: str, parser: argparse.ArgumentParser) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if equals and "," not in text:
        return name, path
    try:
        fields = json.loads(text)
        return fields["name"], fields["path"]
    except ValueError:
        parser.error(f"Invalid JSON format for --lora-modules: {text}")
    except (KeyError, TypeError) as error:
        parser.error(f"Invalid fields for --lora-modules: {text} - {error}")
