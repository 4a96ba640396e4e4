"""What an engine will take: where the figure comes from, and the flags that make the engine keep to it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instances.footprint import (
    GIB,
    MIB,
    Footprint,
    Measured,
    ModelFacts,
    claim,
    estimate,
    ranks_of,
    size_of,
)
from instances.model_files import look_up

LLAMA_8B = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
            "torch_dtype": "bfloat16", "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072}
FACTS_8B = ModelFacts(int(14.96 * GIB), LLAMA_8B)
DEEPSEEK = {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
            "kv_lora_rank": 512, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16", "quantization_config": {}}


def kv_bytes(found: Footprint) -> float:
    """Without the margin for blocks."""
    return (found.keep["kv_cache_memory_bytes"] - 16 * MIB) / 1.01


# --- which figure counts ----------------------------------------------------------------------------------------------

def test_the_order_of_sources() -> None:
    known: dict[str, Any] = {"memory_bytes": 20 * GIB, "measured": Measured(30 * GIB, 8 * GIB), "facts": FACTS_8B}
    found = []
    for name in ("memory_bytes", "measured", "facts", ""):
        footprint = estimate({}, **known)
        found.append((footprint.source, footprint.bytes_per_device))
        known.pop(name, None)
    assert [source for source, _ in found] == ["memory_mb", "measured", "estimated", "utilization"]
    assert [count for _, count in found[:2]] == [20 * GIB, 30 * GIB] and found[3][1] is None


def test_memory_mb_is_divided_over_its_devices() -> None:
    found = estimate({"tensor_parallel_size": 2, "pipeline_parallel_size": "2"}, memory_bytes=80 * GIB + 1)
    assert found == Footprint(20 * GIB + 1, "memory_mb", because="memory_mb")


def test_a_measured_configuration_gets_the_kv_cache_that_it_had() -> None:
    """The one that follows from its config: its log tells it rounded, or not at all."""
    estimated = estimate({}, facts=FACTS_8B)
    for told in (None, 8 * GIB):
        found = estimate({}, measured=Measured(30 * GIB, told), facts=FACTS_8B)
        assert (found.bytes_per_device, found.source, found.keep) == (30 * GIB, "measured", estimated.keep)
    assert estimate({}, measured=Measured(30 * GIB, 8 * GIB)).keep == {"kv_cache_memory_bytes": 8 * GIB}


def test_a_device_that_was_filled_up_is_no_figure_once_the_model_is_known() -> None:
    filled = Measured(73 * GIB, 56 * GIB, filled=True)
    assert estimate({}, measured=filled).bytes_per_device == 73 * GIB and not estimate({}, measured=filled).keep
    found = estimate({"max_model_len": 4096}, measured=filled, facts=FACTS_8B)
    # what it took beside its KV cache is known better than any formula tells
    assert found.source == "estimated" and found.bytes_per_device == 17 * GIB + found.keep["kv_cache_memory_bytes"]


def test_a_share_of_the_users_own_is_that_share() -> None:
    flags = {"gpu_memory_utilization": "0.3"}
    for known in ({}, {"facts": FACTS_8B}):
        found = estimate(flags, **known)      # type: ignore[arg-type]
        assert (found.bytes_per_device, found.utilization, found.given, found.keep) == (None, 0.3, True, {})
    assert estimate(flags, measured=Measured(50 * GIB, 1, filled=True)).bytes_per_device == 50 * GIB
    assert estimate(flags, memory_bytes=40 * GIB).bytes_per_device == 40 * GIB


def test_a_kv_cache_of_the_users_own_is_counted_and_not_overridden() -> None:
    flags = {"kv_cache_memory_bytes": "20G", "max_model_len": 1024}
    found = estimate(flags, facts=FACTS_8B)
    assert found.keep == {} and found.bytes_per_device is not None
    assert 40 * GIB > found.bytes_per_device > 35 * GIB
    both = estimate({**flags, "gpu_memory_utilization": 0.1}, facts=FACTS_8B)
    assert (both.bytes_per_device, both.utilization, both.given) == (found.bytes_per_device, 0.1, True)
    assert estimate(flags, measured=Measured(30 * GIB, 20 * GIB)).keep == {}


def test_nothing_known() -> None:
    assert estimate({}).utilization == 0.92 and estimate({}, utilization=0.8).utilization == 0.8
    assert not estimate({}).given
    assert estimate({}, kind="host") == Footprint(because="nothing is known of it")


def test_what_was_promised_or_taken_counts() -> None:
    assert [claim(5, 7), claim(7, 5), claim(None, 3), claim(3, None), claim(None, None)] == [7, 7, 3, 3, 0]


# --- the reckoning ----------------------------------------------------------------------------------------------------

def test_a_llama_as_vllm_measures_it() -> None:
    """vLLM's own profile of it on an H100: weights 14.96, non-torch 1.79, activations 1.26 GiB; 128 KiB a token."""
    found = estimate({"max_model_len": 8192}, facts=FACTS_8B)
    assert kv_bytes(found) == pytest.approx(4 * 8192 * 128 * 1024)
    without_cache = (found.bytes_per_device or 0) - found.keep["kv_cache_memory_bytes"]
    assert 18.0 * GIB < without_cache < 20.5 * GIB
    assert found.least_bytes == FACTS_8B.weights_bytes
    assert found.because == ("weights 15.0 + KV cache 4.1 (32768 tokens) + overhead 4.3 GiB, estimated")


def test_parallel_ranks_share_weights_and_heads() -> None:
    alone = estimate({"max_model_len": 8192}, facts=FACTS_8B)
    halved = estimate({"max_model_len": 8192, "tensor_parallel_size": 2}, facts=FACTS_8B)
    assert halved.least_bytes == math.ceil((FACTS_8B.weights_bytes or 0) / 2)
    assert kv_bytes(halved) == pytest.approx(kv_bytes(alone) / 2)
    piped = estimate({"max_model_len": 8192, "pipeline_parallel_size": 2}, facts=FACTS_8B)
    assert kv_bytes(piped) == pytest.approx(kv_bytes(alone) / 2)
    # at least one head a rank, which is then the same on several
    sixteen = estimate({"max_model_len": 8192, "tensor_parallel_size": 16}, facts=FACTS_8B)
    assert kv_bytes(sixteen) == pytest.approx(kv_bytes(alone) / 8)
    copied = estimate({"max_model_len": 8192, "data_parallel_size": 2}, facts=FACTS_8B)
    assert copied.bytes_per_device == alone.bytes_per_device


@pytest.mark.parametrize(("flags", "tokens"), [
    ({"max_model_len": 1024}, 4 * 1024), ({"max_model_len": "8k"}, 4 * 8000), ({"max_model_len": 65536}, 65536),
    ({}, 131072), ({"max_model_len": "auto"}, 4 * 8192), ({"max_model_len": -1}, 4 * 8192)])
def test_the_kv_cache_holds_one_long_request_and_several_usual_ones(flags: dict[str, Any], tokens: int) -> None:
    assert kv_bytes(estimate(flags, facts=FACTS_8B)) == pytest.approx(tokens * 128 * 1024)


def test_other_shapes_of_attention() -> None:
    latent = estimate({"max_model_len": 1024, "tensor_parallel_size": 8}, facts=ModelFacts(700 * GIB, DEEPSEEK))
    assert kv_bytes(latent) == pytest.approx(4096 * 61 * 576 * 2)       # the same on every rank
    hybrid = {**LLAMA_8B, "layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}
    assert kv_bytes(estimate({"max_model_len": 1024}, facts=ModelFacts(GIB, hybrid))) == pytest.approx(4096 * 32 * 1024)
    wide = {**LLAMA_8B, "head_dim": 256}
    assert kv_bytes(estimate({"max_model_len": 1024}, facts=ModelFacts(GIB, wide))) == pytest.approx(4096 * 256 * 1024)
    nested = {"vision_config": {}, "torch_dtype": "bfloat16", "text_config": {**LLAMA_8B, "torch_dtype": None}}
    seeing, blind = (estimate({"max_model_len": 1024}, facts=ModelFacts(GIB, config)) for config in (nested, LLAMA_8B))
    assert kv_bytes(seeing) == kv_bytes(blind) and seeing.bytes_per_device == (blind.bytes_per_device or 0) + 3 * GIB


def test_types_of_values() -> None:
    base = estimate({"max_model_len": 1024}, facts=FACTS_8B)
    small = estimate({"max_model_len": 1024, "kv_cache_dtype": "fp8"}, facts=FACTS_8B)
    assert kv_bytes(small) == pytest.approx(kv_bytes(base) / 2)
    full = estimate({"max_model_len": 1024, "dtype": "float32"}, facts=FACTS_8B)
    assert kv_bytes(full) == pytest.approx(kv_bytes(base) * 2) and full.least_bytes == 2 * (base.least_bytes or 0)
    stored_full = ModelFacts(8 * GIB, {**LLAMA_8B, "torch_dtype": "float32"})      # auto runs it in 16 bits
    assert estimate({}, facts=stored_full).least_bytes == 4 * GIB
    quantized = ModelFacts(5 * GIB, {**LLAMA_8B, "quantization_config": {"bits": 4}})
    assert estimate({"dtype": "float32"}, facts=quantized).least_bytes == 5 * GIB


def test_the_parameter_count_where_there_are_no_files() -> None:
    found = estimate({"max_model_len": 4096}, param_count=7, precision="fp16")
    assert found.source == "estimated" and found.least_bytes == 14_000_000_000 and found.keep == {}
    per_token = ((found.bytes_per_device or 0) - 14e9 - 4.3 * GIB) / 16384
    assert per_token == pytest.approx(512 * 1024, rel=0.15)     # Llama-2-7B: 512 KiB a token
    sizes = [estimate({}, param_count=7, precision=each).least_bytes for each in ("fp32", None, "fp8", "int4")]
    assert sizes == [28_000_000_000, 14_000_000_000, 7_000_000_000, 3_920_000_001]


def test_what_adds_to_it() -> None:
    def more(**flags: Any) -> int:
        base = estimate({"max_model_len": 1024}, facts=FACTS_8B).bytes_per_device or 0
        return (estimate({"max_model_len": 1024, **flags}, facts=FACTS_8B).bytes_per_device or 0) - base
    assert more(enforce_eager=True) == -GIB and more(enable_lora=True) == GIB and more(cpu_offload_gb=4) == -4 * GIB
    assert more(speculative_config={"method": "mtp"}) > GIB
    wide = estimate({"max_model_len": 1024}, facts=ModelFacts(GIB, {**LLAMA_8B, "hidden_size": 8192}))
    assert (wide.bytes_per_device or 0) - wide.keep["kv_cache_memory_bytes"] == pytest.approx(6.8 * GIB, rel=0.01)


# --- the host as the device -------------------------------------------------------------------------------------------

TINY = ModelFacts(2 * MIB, {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 64,
                            "max_position_embeddings": 512, "torch_dtype": "float32"})


def test_a_cpu_engine_is_told_its_kv_cache() -> None:
    """Else it would want nearly all of the host's memory, and refuse to start where less is free."""
    found = estimate({"dtype": "float32"}, facts=TINY, kind="host")
    assert kv_bytes(found) == pytest.approx(4 * 512 * 2 * 2 * 128 * 4)
    assert 1.9 * GIB < (found.bytes_per_device or 0) < 2 * GIB
    whole = estimate({"tensor_parallel_size": 2}, facts=TINY, kind="host", memory_bytes=3 * GIB)
    assert whole.bytes_per_device == 3 * GIB
    assert whole.keep["kv_cache_memory_bytes"] == pytest.approx(1.1 * GIB, rel=0.01)
    assert estimate({}, facts=TINY, kind="host", memory_bytes=GIB).keep == {}       # too little for it: not our guess


@pytest.mark.parametrize(("flags", "env"), [
    ({"kv_cache_memory_bytes": GIB}, {}), ({}, {"VLLM_CPU_KVCACHE_SPACE": "1"}),
    ({"kv_cache_memory_bytes": 7 * GIB}, {"VLLM_CPU_KVCACHE_SPACE": "1"})])
def test_a_cpu_engine_whose_kv_cache_the_user_set(flags: dict[str, Any], env: dict[str, str]) -> None:
    found = estimate(flags, facts=TINY, kind="host", env=env)
    assert found.keep == {} and (found.bytes_per_device or 0) == pytest.approx(2.9 * GIB, rel=0.01)
    # its share does not matter to vLLM then
    assert estimate({**flags, "gpu_memory_utilization": 0.9}, facts=TINY, kind="host", env=env) == found
    for filled in (False, True):
        measured = estimate(flags, facts=TINY, kind="host", env=env, measured=Measured(GIB, None, filled))
        assert (measured.bytes_per_device, measured.source, measured.keep) == (GIB, "measured", {})


def test_a_share_of_the_host() -> None:
    found = estimate({"gpu_memory_utilization": 0.4}, facts=TINY, kind="host")
    assert (found.utilization, found.given, found.keep) == (0.4, True, {})


# --- anything at all --------------------------------------------------------------------------------------------------

def test_counts_as_vllm_reads_them() -> None:
    sizes = [size_of(value) for value in (4096, "4096", "32k", "32K", "25.6k", "2G", 1e3, " 7 ")]
    assert sizes == [4096, 4096, 32000, 32768, 25600, 2 << 30, 1000, 7]
    nothing: list[Any] = [None, True, 0, -1, "", "x", "0", "auto", math.inf, math.nan, [], {}]
    assert [size_of(value) for value in nothing] == [None] * 12


def test_ranks() -> None:
    flags = {"tensor_parallel_size": 2, "pipeline_parallel_size": "3", "data_parallel_size": 4}
    assert ranks_of(flags) == 24 and ranks_of(flags, "host") == 1 and ranks_of({"tensor_parallel_size": "two"}) == 1


VALUES = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
          | st.lists(st.integers(), max_size=2))
NAMES = st.sampled_from([
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "tensor_parallel_size", "dtype",
    "kv_cache_dtype", "pipeline_parallel_size", "cpu_offload_gb", "enforce_eager", "enable_lora",
    "speculative_config", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank", "layer_types",
    "torch_dtype", "text_config", "max_position_embeddings"])


@given(st.dictionaries(NAMES, VALUES), st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES)),
       st.none() | st.integers(1, 1 << 40), st.sampled_from(["cuda", "host"]), st.none() | st.floats(0.1, 1000))
def test_whatever_stands_in_flags_and_config(flags: dict[str, Any], config: dict[str, Any], weights: int | None,
                                             kind: str, params: float | None) -> None:
    found = estimate(flags, facts=ModelFacts(weights, config), kind=kind, param_count=params)
    assert found.bytes_per_device is None or found.bytes_per_device > 0
    assert all(isinstance(value, int) and value > 0 for value in found.keep.values())
    assert found.utilization is None or 0 < found.utilization <= 1
    assert not found.keep.keys() & {name for name, value in flags.items() if size_of(value)}


# --- files ------------------------------------------------------------------------------------------------------------

def write(folder: Path, **files: Any) -> Path:
    """A name with __ for each dot; a number is so many bytes, a mapping JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_of_", "-of-")
        path.write_bytes(b"\0" * content) if isinstance(content, int) else path.write_text(
            content if isinstance(content, str) else json.dumps(content))
    return folder


def test_weights_by_their_index_even_before_all_shards_are_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", model__safetensors__index__json={"metadata": {"total_size": 1234}},
                   model_1_of_9__safetensors=7, config__json={"hidden_size": 5})
    assert look_up(str(folder), {}) == ModelFacts(1234, {"hidden_size": 5})


@pytest.mark.parametrize(("files", "size"), [
    ({"a__safetensors": 5, "b__safetensors": 6, "pytorch_model__bin": 100, "x__txt": 1}, 11),
    ({"model__safetensors": 5, "consolidated__safetensors": 5}, 5), ({"consolidated__safetensors": 5}, 5),
    ({"pytorch_model__bin": 9, "training_args__bin": 50}, 9), ({"model__pt": 3, "optimizer__pt": 50}, 3),
    ({"q4__gguf": 4, "q8__gguf": 8}, 8), ({"config__json": "{"}, None), ({"readme__md": 1}, None),
    ({"model__safetensors__index__json": {"metadata": {"total_size": "x"}}, "m__safetensors": 8}, 8),
    ({"model__safetensors__index__json": [], "m__safetensors": 8}, 8)])
def test_weights_by_their_files(tmp_path: Path, files: dict[str, Any], size: int | None) -> None:
    assert look_up(str(write(tmp_path / "m", **files)), {}) == ModelFacts(size, None)


def test_one_file(tmp_path: Path) -> None:
    folder = write(tmp_path, one__gguf=77, other__txt=3)
    assert look_up(str(folder / "one.gguf"), {}).weights_bytes == 77
    assert look_up(str(folder / "other.txt"), {}) == look_up(str(folder / "absent"), {}) == ModelFacts()


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    for number, revision in enumerate(("abc", "def"), 1):
        write(cache / "blobs", **{f"blob{number}": number})
        (cache / "snapshots" / revision).mkdir(parents=True)
        (cache / "snapshots" / revision / "model.safetensors").symlink_to(cache / "blobs" / f"blob{number}")
    write(cache / "refs", main="abc", v2="def\n")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert [look_up("org/name", env, revision=revision).weights_bytes for revision in (None, "v2", "def", "no")] == [
        1, 2, 2, None]
    assert look_up("org/other", env) == ModelFacts()
    assert look_up("org/name", {}, download_dir=str(tmp_path / "hub")).weights_bytes == 1


def test_a_folder_that_may_not_be_read_or_is_half_gone(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", config__json=[1, 2])
    (folder / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert look_up(str(folder), {}) == ModelFacts()
