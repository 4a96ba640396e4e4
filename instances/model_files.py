"""What the files of a model tell before its first start: how large its weights are, and its config.json.

Reads the disk (a few small files), so it is called once a start and never under a lock.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instances.downloads import cache_folder
from instances.footprint import ModelFacts

log = logging.getLogger("vllm_server.instances")

LARGEST_JSON_BYTES = 64 << 20
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")      # the first kind that is there is what vLLM loads
NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"})


def look_up(model: str, env: Mapping[str, str], *, download_dir: object = None, revision: object = None) -> ModelFacts:
    """`model` as the engine is given it: a folder, a .gguf file, or a name on the hub.  Raises nothing."""
    try:
        folder = _folder(model, env, download_dir, revision)
        if folder is None:
            return ModelFacts()
        if folder.is_file():
            return ModelFacts(folder.stat().st_size if folder.suffix == ".gguf" else None)
        return ModelFacts(_weights_bytes(folder), _json(folder / "config.json"))
    except OSError as error:
        log.info("the files of %s cannot be looked at: %s", model, error)
        return ModelFacts()


def _folder(model: str, env: Mapping[str, str], download_dir: object, revision: object) -> Path | None:
    """Where its files are; None while nothing of it is on this machine."""
    cache = cache_folder(model, env, download_dir)
    if cache is None:
        path = Path(model).expanduser()
        return path if path.exists() else None
    wanted = revision if isinstance(revision, str) and revision else "main"
    reference = cache / "refs" / wanted
    snapshot = cache / "snapshots" / (reference.read_text().strip() if reference.is_file() else wanted)
    return snapshot if snapshot.is_dir() else None


def _weights_bytes(folder: Path) -> int | None:
    """As an index says, also while shards are still missing; else the sizes of the files."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = _json(folder / name)
        metadata = (index or {}).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        if isinstance(total, int | float) and total > 0:
            return int(total)
    for pattern in WEIGHTS:
        sizes = {path.name: path.stat().st_size for path in folder.glob(pattern) if path.name not in NOT_WEIGHTS}
        if pattern == "*.gguf" and sizes:       # each is a whole model, in one quantization
            return max(sizes.values())
        # Mistral's consolidated files hold the same weights once more
        named = {name: size for name, size in sizes.items() if not name.startswith("consolidated")} or sizes
        if named:
            return sum(named.values())
    return None


def _json(path: Path) -> dict[str, Any] | None:
    """The object in this file; None where there is none that can be read."""
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
