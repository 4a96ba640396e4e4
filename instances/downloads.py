"""Watches a model arrive in the Hugging Face cache: the engine is silent while it downloads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

GROWING_FOR_S = 30.0  # a download that stood still for so long no longer holds the start's deadline


def cache_folder(model: str, env: Mapping[str, str], download_dir: object = None) -> Path | None:
    """Where huggingface_hub keeps this repository's files; None for a local path.  `download_dir` is vLLM's flag.

    Source: huggingface_hub.constants (HF_HUB_CACHE, HF_HOME) and its `models--ORG--NAME` folder names.
    """
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists():
        return None
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    folder = (Path(download_dir) if isinstance(download_dir, str) else hub) / f"models--{model.replace('/', '--')}"
    user = env.get("HOME")
    return Path(user, *folder.parts[1:]) if user and folder.parts[0] == "~" else folder.expanduser()


def size_bytes(folder: Path | None) -> int:
    """Bytes on disk, unfinished files included; 0 while there is nothing."""
    if folder is None:
        return 0
    total = 0
    for parent, _, files in os.walk(folder / "blobs"):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118
            except OSError:
                continue  # renamed from .incomplete in this moment
    return total


class DownloadWatch:
    """Tells for how long the deadline of a start has to be put off."""

    def __init__(self, folder: Path | None, now: float) -> None:
        self.folder = folder
        self.bytes_seen = size_bytes(folder)
        self.first_bytes = self.bytes_seen
        self._grew_at: float | None = None
        self._looked_at = now

    @property
    def downloaded_bytes(self) -> int:
        return self.bytes_seen - self.first_bytes

    def look(self, now: float) -> float:
        """Seconds since the last look that a growing download has taken; walks the folder, so not every tick."""
        elapsed, self._looked_at = now - self._looked_at, now
        size = size_bytes(self.folder)
        if size > self.bytes_seen:
            self.bytes_seen, self._grew_at = size, now
        return elapsed if self.growing(now) else 0.0

    def growing(self, now: float) -> bool:
        return self._grew_at is not None and now - self._grew_at < GROWING_FOR_S
