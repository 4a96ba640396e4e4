"""Make a small demo model on disk, so that the real engine can serve without a download; prints its folder.

It needs the standard library only: a model is a JSON configuration, a JSON tokenizer and one file of numbers
(safetensors: a JSON header, then the raw tensors), and writing them takes under a second.

- ``tiny-llama``: text generation.  Its layers are random, and its last matrix knows which word may follow which in
  the sentences below: a reply is readable, and with temperature 0 it is the same every time.  It never says 'end of
  text', so a reply is as long as ``max_tokens`` allows.
- ``tiny-bert``: embeddings, rerank and score (``vllm serve DIR --runner pooling``).  Its layers are random too; texts
  that share words come out similar.
- ``broken-llama``: a llama whose attention heads have 16 dimensions.  vLLM on CPU loads it and dies at the first
  request: for tests of exactly that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = 1              # raise it when what is written changes: older folders are then made anew
RECIPE_FILE = "recipe.json"
SEED = 20240607
MAX_POSITIONS = 512

SENTENCES = (
    "Hello from a very small model that runs on the real engine .",
    "The engine reads your words and answers with words of its own .",
    "A small model knows little and says it quickly .",
    "Every request finds the model that it asks for .",
    "The model sleeps when nobody asks and wakes when somebody does .",
    "One address serves every model on this machine .",
    "Words follow words and nobody promised that they make sense .",
)
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|pad|>")
CHAT_TEMPLATE = ("{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
                 "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@dataclass(frozen=True)
class Tensor:
    """Rows of float32, in row order; `shape` multiplies to the length of `data`."""

    shape: tuple[int, ...]
    data: array[float]


# --- tokenizer: bytes, and the words of the sentences ---------------------------------------------------------------

def byte_alphabet() -> list[str]:
    """The printable character that ByteLevel tokenizers write for each of the 256 bytes, in byte order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def written(word: str) -> str:
    """A word as the tokenizer sees it: with the blank before it, except for the full stop."""
    return "." if word == "." else "Ġ" + word


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges).  Each merge lengthens the beginning of a known word by one letter, so that a known word
    becomes one token and an unknown one falls back to its bytes."""
    tokens = {token: number for number, token in enumerate([*SPECIALS, *byte_alphabet()])}
    merges: list[tuple[str, str]] = []
    for word in sorted({written(word) for sentence in SENTENCES for word in sentence.split()}):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens[word[:end]] = len(tokens)
                merges.append((word[:end - 1], word[end - 1]))
    return tokens, merges


def tokenizer_json(frame: Iterable[str]) -> dict[str, Any]:
    """`frame` is what stands around each text: special tokens, with ``$A`` for the text itself."""
    tokens, merges = vocabulary()

    def piece(name: str) -> dict[str, Any]:
        if name == "$A":
            return {"Sequence": {"id": "A", "type_id": 0}}
        return {"SpecialToken": {"id": name, "type_id": 0}}

    pieces = [piece(name) for name in frame]
    added = [{"id": tokens[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for name in SPECIALS]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing", "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [tokens[name]], "tokens": [name]} for name in SPECIALS}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": tokens, "merges": [list(merge) for merge in merges]},
    }


def tokenizer_config(chat: bool) -> dict[str, Any]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_POSITIONS,
              "eos_token": "<|end|>", "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False}
    return config | ({"chat_template": CHAT_TEMPLATE} if chat else {})


# --- weights ------------------------------------------------------------------------------------------------------

def noise(rng: random.Random, *shape: int, deviation: float = 0.05) -> Tensor:
    """Numbers spread evenly about 0 with this standard deviation."""
    half = deviation * math.sqrt(3)
    return Tensor(shape, array("f", [rng.uniform(-half, half) for _ in range(math.prod(shape))]))


def ones(size: int) -> Tensor:
    return Tensor((size,), array("f", [1.0] * size))


def zeros(size: int) -> Tensor:
    return Tensor((size,), array("f", bytes(4 * size)))


def word_followers(tokens: Mapping[str, int]) -> set[tuple[int, int]]:
    """Pairs (token, token that may follow it) of the sentences.  A sentence may begin after the full stop and
    where the assistant's turn begins."""
    pairs: set[tuple[int, int]] = set()
    for sentence in SENTENCES:
        ids = [tokens[written(word)] for word in sentence.split()]
        pairs |= {(tokens["<|assistant|>"], ids[0]), (tokens["."], ids[0]), *zip(ids, ids[1:], strict=False)}
    return pairs


def output_matrix(embeddings: Tensor, strength: float = 0.12) -> Tensor:
    """The last matrix of the llama.  What reaches it resembles the embedding of the current token, so a row made
    of the embeddings of a word's predecessors scores high after each of them.  All other rows stay 0."""
    vocabulary_size, hidden = embeddings.shape
    rows = array("f", bytes(4 * vocabulary_size * hidden))
    for before, after in sorted(word_followers(vocabulary()[0])):
        for column in range(hidden):
            rows[after * hidden + column] += strength * embeddings.data[before * hidden + column]
    return Tensor(embeddings.shape, rows)


def llama_config(head_dim: int) -> dict[str, Any]:
    tokens, _ = vocabulary()
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens),
        "hidden_size": 2 * head_dim, "intermediate_size": 4 * head_dim, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": head_dim, "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
        "bos_token_id": None, "eos_token_id": tokens["<|end|>"], "pad_token_id": tokens["<|pad|>"]}


def llama_weights(config: Mapping[str, Any], rng: random.Random) -> dict[str, Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    embeddings = noise(rng, config["vocab_size"], hidden, deviation=1.0)
    weights = {"model.embed_tokens.weight": embeddings, "lm_head.weight": output_matrix(embeddings),
               "model.norm.weight": ones(hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        weights |= {f"{name}.self_attn.{part}_proj.weight": noise(rng, hidden, hidden) for part in "qkvo"}
        weights |= {f"{name}.mlp.{part}_proj.weight": noise(rng, inner, hidden) for part in ("gate", "up")}
        weights[f"{name}.mlp.down_proj.weight"] = noise(rng, hidden, inner)
        weights |= {f"{name}.{part}_layernorm.weight": ones(hidden) for part in ("input", "post_attention")}
    return weights


def bert_config() -> dict[str, Any]:
    tokens, _ = vocabulary()
    return {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": len(tokens), "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu",
        "max_position_embeddings": MAX_POSITIONS, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute", "torch_dtype": "float32", "pad_token_id": tokens["<|pad|>"]}


def bert_weights(config: Mapping[str, Any], rng: random.Random) -> dict[str, Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    weights: dict[str, Tensor] = {}

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = ones(hidden), zeros(hidden)

    def linear(name: str, outputs: int, inputs: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = noise(rng, outputs, inputs), zeros(outputs)

    weights["embeddings.word_embeddings.weight"] = noise(rng, config["vocab_size"], hidden, deviation=1.0)
    weights["embeddings.position_embeddings.weight"] = noise(rng, MAX_POSITIONS, hidden)
    weights["embeddings.token_type_embeddings.weight"] = noise(rng, 2, hidden)
    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{name}.attention.{part}", hidden, hidden)
        linear(f"{name}.intermediate.dense", inner, hidden)
        linear(f"{name}.output.dense", hidden, inner)
        norm(f"{name}.attention.output.LayerNorm")
        norm(f"{name}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    return weights


# --- files --------------------------------------------------------------------------------------------------------

def safetensors(weights: Mapping[str, Tensor]) -> bytes:
    """The file format: length of the header (8 bytes, little endian), header, tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, tensor in weights.items():
        numbers = array("f", tensor.data)
        if sys.byteorder == "big":
            numbers.byteswap()
        blobs.append(numbers.tobytes())
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(blobs[-1])]}
        offset += len(blobs[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def model_files(kind: str) -> dict[str, Any]:
    """File name -> content (bytes, or a value to write as JSON) of one model."""
    rng = random.Random(SEED)
    if kind == "tiny-bert":
        config = bert_config()
        # Mean pooling instead of the first token's vector: similarity then follows the words of the whole text.
        extra = {
            "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                             {"idx": 1, "name": "1", "path": "1_Pooling",
                              "type": "sentence_transformers.models.Pooling"}],
            "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"],
                                      "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}}
        weights, frame, chat = bert_weights(config, rng), ["<|user|>", "$A", "<|end|>"], False
    else:
        config = llama_config(head_dim=64 if kind == "tiny-llama" else 16)
        extra = {"generation_config.json": {"eos_token_id": config["eos_token_id"]}}
        weights, frame, chat = llama_weights(config, rng), ["$A"], True
    return {"config.json": config, "tokenizer.json": tokenizer_json(frame),
            "tokenizer_config.json": tokenizer_config(chat), "model.safetensors": safetensors(weights),
            **extra, RECIPE_FILE: {"kind": kind, "recipe": RECIPE}}


def is_made(folder: Path, kind: str) -> bool:
    try:
        return bool(json.loads((folder / RECIPE_FILE).read_text()) == {"kind": kind, "recipe": RECIPE})
    except (OSError, ValueError):
        return False


def make_model(kind: str, folder: Path) -> None:
    """Writes the model unless it is there.  The folder appears whole or not at all.  Raises FileExistsError where
    something else lies there, and OSError."""
    if is_made(folder, kind):
        return
    if folder.exists() and not (folder / RECIPE_FILE).is_file():
        raise FileExistsError(f"{folder} exists and was not made by this script; name another folder")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        for name, content in model_files(kind).items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
        if folder.exists():
            shutil.rmtree(folder)           # an older recipe's
        try:
            partial.rename(folder)
        except OSError:
            if not is_made(folder, kind):   # else another process made the same one meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def default_folder(kind: str) -> Path:
    """Beside the engine that setup_engine.py installs."""
    base = os.environ.get("VLLM_SERVER_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/vllm-server"
    return Path(base).expanduser().absolute() / "models" / kind


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a small demo model on disk and print its folder.")
    parser.add_argument("kind", choices=("tiny-llama", "tiny-bert", "broken-llama"))
    parser.add_argument("folder", nargs="?", type=Path, help="default: models/KIND in the cache folder")
    arguments = parser.parse_args()
    folder = (arguments.folder or default_folder(arguments.kind)).absolute()
    try:
        make_model(arguments.kind, folder)
    except OSError as error:
        print(f"make_models: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
